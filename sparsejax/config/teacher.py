"""The section `train.teacher`: the losses of distillation, and the layers that they compare."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparsejax import patterns
from sparsejax.config.source import ModelSource
from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers import MixerConfig

if TYPE_CHECKING:
    from sparsejax.config.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Distillation from a trained model, which is frozen. The teacher runs in phases in which a weight is above 0.

    With `p` and `q` the distributions of teacher and model at the temperature `T`, `x` an activation of the teacher,
    `y` that of the model, and `ms` the mean square over the features, the losses are

    | weight | loss | mean over |
    |---|---|---|
    | `kl` | `T ** 2 * sum(p * log(p / q))` (arXiv:1503.02531) | scored tokens |
    | `hidden` | `ms(y - x) / (ms(x) + 1e-6)` of the residual streams after the layers | tokens and layers |
    | `attention_output` | the same of the outputs of the mixers, both on the teacher's input | tokens and layers |
    | `loss` | the cross entropy | scored tokens |

    With `top_k`, `p` and `q` are distributions over `top_k + 1` outcomes: the most likely tokens of the teacher, and
    one for all other tokens. The divergence is then a lower bound of that of all tokens, and while the model runs, the
    logits of `top_k` tokens are kept instead of all.

    `attention_output` aligns every mixer by itself (MOHAWK, arXiv:2408.10189, stage 2; LoLCATs, arXiv:2410.10254):
    its gradient reaches no other parameters of the model.
    """

    # "hf:FOLDER", "run:WORKDIR", "run:WORKDIR@STEP" or "run:WORKDIR@best"; its vocabulary is that of the model
    source: str = dataclasses.field(metadata={"resume": "none"})
    dtype: str | None = None  # dtype of the teacher, "float32" or "bfloat16"; none for that of `sparsejax.load`
    kl: float = 0.0  # weight of the divergence of the predictions from those of the teacher
    temperature: float = 1.0  # temperature of both in `kl`
    top_k: int = 0  # number of the teacher's most likely tokens that `kl` distinguishes; 0 for all
    hidden: float = 0.0  # weight of the error of the residual streams
    # layers whose streams are compared, "LAYER" or "LAYER:LAYER OF THE TEACHER" from 0, separated by commas, such as
    # "0:0, 3:7"; by default every layer with the layer of the same index
    hidden_layers: str = ""
    attention_output: float = 0.0  # weight of the error of the mixers' outputs
    # layers whose mixers are compared, as for `hidden_layers`; by default those whose mixers differ from the teacher's
    attention_layers: str = ""
    loss: float = 1.0  # weight of the cross entropy

    def __post_init__(self) -> None:
        ModelSource.parse(self.source)
        if self.dtype is not None:
            require_choice(self, "dtype", ("float32", "bfloat16"))
        require_at_least(self, 0, "kl", "top_k", "hidden", "attention_output", "loss")
        if self.temperature <= 0:
            raise InputError("temperature", f"{self.temperature} is not above 0")
        for name in ("hidden_layers", "attention_layers"):
            self.layers(name)
        if not (self.loss or self.is_active):
            raise InputError("loss", "is 0, and so are kl, hidden and attention_output; set one of them")

    @property
    def is_active(self) -> bool:
        """Whether a loss depends on the teacher."""
        return bool(self.kl or self.hidden or self.attention_output)

    def pair_streams(self, model: ModelConfig, teacher: ModelConfig) -> dict[int, int]:
        """Returns the layer of the teacher by layer of the model whose streams are compared; none if `hidden` is 0.

        Raises:
          InputError: The streams differ in width, or a layer does not exist.
        """
        if not self.hidden:
            return {}
        _require_same_width("hidden", model, teacher)
        if model.reversible != teacher.reversible:
            raise InputError("hidden", "one of the model and the teacher is reversible, and the other is not")
        if model.streams != teacher.streams:
            raise InputError("hidden", f"the model has {model.streams} streams, and the teacher {teacher.streams}")
        return self._pair_layers("hidden_layers", model, teacher)

    def pair_mixers(self, model: ModelConfig, teacher: ModelConfig) -> dict[int, int]:
        """Returns the layer of the teacher by layer of the model whose mixers are compared.

        There are none if `attention_output` is 0.

        Raises:
          InputError: The mixers differ in width, a layer does not exist or has no mixer, or no mixers differ.
        """
        if not self.attention_output:
            return {}
        _require_same_width("attention_output", model, teacher)
        layers = self._pair_layers("attention_layers", model, teacher)
        mixers = {
            layer: (model.layers[model.names[layer]].mixer, teacher.layers[teacher.names[other]].mixer)
            for layer, other in layers.items()
        }
        if not self.attention_layers:
            changed = [layer for layer, pair in mixers.items() if _describe(pair[0]) != _describe(pair[1])]
            layers = {layer: layer for layer in changed if None not in mixers[layer]}
            if not layers:
                raise InputError("attention_layers", "no mixer differs from that of the teacher; name the layers")
        for layer, other in layers.items():
            if None in mixers[layer]:
                raise InputError("attention_layers", f"{layer}:{other}: one of the layers has no mixer")
        return layers

    def _pair_layers(self, name: str, model: ModelConfig, teacher: ModelConfig) -> dict[int, int]:
        """The layers that a key names, or all layers."""
        depths, layers = (len(model.names), len(teacher.names)), self.layers(name)
        if not layers and depths[0] != depths[1]:
            raise InputError(
                name, f"the model has {depths[0]} layers, the teacher {depths[1]}; name pairs, such as 3:7"
            )
        for pair in layers.items():
            for kind, layer, depth in zip(("model", "teacher"), pair, depths, strict=True):
                if layer >= depth:
                    problem = f"the {kind} has no layer {layer}, only 0 to {depth - 1}"
                    raise InputError(name, f"{pair[0]}:{pair[1]}: {problem}")
        return layers or {layer: layer for layer in range(depths[0])}

    def layers(self, name: str) -> dict[int, int]:
        """Returns the layer of the teacher by layer of the model in `hidden_layers` or `attention_layers`."""
        layers: dict[int, int] = {}
        for item in filter(None, map(str.strip, getattr(self, name).split(","))):
            first, colon, second = (part.strip() for part in item.partition(":"))
            if not first.isdecimal() or not (second if colon else first).isdecimal():
                raise InputError(name, f"{item!r}: expected LAYER or LAYER:LAYER OF THE TEACHER, such as 3:7")
            if int(first) in layers:
                raise InputError(name, f"{item!r}: layer {first} is there twice")
            layers[int(first)] = int(second or first)
        return layers


def check_teacher(model: ModelConfig, teacher: ModelConfig, length: int) -> None:
    """Checks that a teacher reads the sequences of `length` tokens of a model, and predicts the same tokens.

    Raises:
      InputError: It does not; the argument is "source".
    """
    limit = teacher.embedding.max_length
    problem = ""
    if teacher.vocab != model.vocab:
        problem = f"the teacher has {teacher.vocab:,} token ids, but model.vocab = {model.vocab}"
    elif teacher.causal != model.causal:
        problem = f"the teacher is {'' if teacher.causal else 'not '}causal, but model.causal = {model.causal}".lower()
    elif teacher.head.pool != model.head.pool:
        problem = f"the teacher has head.pool = {teacher.head.pool!r}, but model.head.pool = {model.head.pool!r}"
    elif limit is not None and length > limit:
        problem = f"data.length = {length} exceeds the {limit:,} positions of the teacher"
    if problem:
        raise InputError("source", problem)


def _require_same_width(name: str, model: ModelConfig, teacher: ModelConfig) -> None:
    if model.width != teacher.width:
        raise InputError(name, f"the teacher has width {teacher.width}, but model.width = {model.width}")


def _describe(value: Any) -> Any:
    """What determines the output of a mixer, apart from its parameters and from rounding."""
    if not isinstance(value, MixerConfig):
        return tuple(map(_describe, value)) if isinstance(value, tuple) else value
    fields = [field.name for field in dataclasses.fields(value) if field.metadata.get("resume") != "rounding"]  # type: ignore[arg-type]
    values = {name: _describe(getattr(value, name)) for name in fields}
    if "pattern" in values:
        values["pattern"] = str(patterns.parse(values["pattern"]))  # from text or a pattern
    return type(value), values
