"""The schema of a configuration: its sections as frozen dataclasses, whose fields are the keys.

Every section checks its own values, and `Config` checks the sections against one another. Sections of the layers are
in `sparsejax.layers`, those of the data in `sparsejax.data.config`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from sparsejax import patterns
from sparsejax import schedule as schedules
from sparsejax.config.source import ModelSource
from sparsejax.config.teacher import TeacherConfig
from sparsejax.data.config import DataConfig
from sparsejax.data.probes import Probe
from sparsejax.errors import InputError, argument_path, require_at_least, require_choice
from sparsejax.layers import ACTIVATIONS, HyperConfig, LayerConfig, MixerConfig, NormConfig, SharedConfig
from sparsejax.overrides import Overrides

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class AxialConfig:
    """Axial position embeddings (Reformer, arXiv:2001.04451).

    Position `i` has the row `i // shape[1]` and the column `i % shape[1]`; the embeddings of both are concatenated.
    """

    shape: tuple[int, ...]  # rows and columns of the grid of positions
    widths: tuple[int, ...]  # widths of the row and column embeddings; their sum is the model's width

    def __post_init__(self) -> None:
        for name in ("shape", "widths"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise InputError(name, f"{list(value)} is not a pair of numbers of at least 1")

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """From tokens to the input of the first layer, in the order of the fields."""

    scale: float = 1.0  # factor on the token embedding, such as width ** 0.5 (arXiv:1706.03762)
    types: int = 0  # number of token types (BERT); every token has type 0
    positions: int = 0  # number of learned absolute positions; 0 for none
    axial: AxialConfig | None = None  # axial positions, an alternative to `positions`
    padding: int | None = None  # token id without a position; positions start at padding + 1 (RoBERTa)
    norm: NormConfig | None = None  # norm of the sum of the embeddings; none for no norm

    def __post_init__(self) -> None:
        require_at_least(self, 0, "types", "positions")
        if self.axial is not None and (self.positions or self.padding is not None):
            raise InputError("axial", "cannot be combined with positions or padding")

    @property
    def max_length(self) -> int | None:
        """Number of tokens that the learned or axial positions cover; None without them."""
        if self.axial is not None:
            return self.axial.length
        return self.positions - (0 if self.padding is None else self.padding + 1) if self.positions else None


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """From the last norm to the logits: with an `activation`, a linear map, the activation and a norm come first."""

    # activation after a linear map, as in BERT's head for masked language models; none for neither
    activation: str | None = None
    linear_bias: bool = True  # whether the linear map before the activation has a bias
    norm: NormConfig | None = None  # norm after the activation; none for no norm
    bias: bool = False  # whether the logits have a bias
    scale: float = 1.0  # factor on the logits
    # bound of the logits: softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); none for no bound
    softcap: float | None = None
    # "mean" averages over the tokens before the head, for sequence classification; "none" keeps all tokens
    pool: str = "none"

    def __post_init__(self) -> None:
        require_choice(self, "pool", ("none", "mean"))
        if self.activation is not None:
            require_choice(self, "activation", ACTIVATIONS)
        if self.softcap is not None and self.softcap <= 0:
            raise InputError("softcap", f"{self.softcap} is not above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A sequence model: an embedding, the layers of the schedule, a norm and a head."""

    vocab: int  # number of token ids
    width: int  # width of the residual stream
    schedule: str  # layer names and repetitions, such as "3x(ssm local) full"
    layers: dict[str, LayerConfig]  # layers by name, to which the schedule refers
    norm: NormConfig | None  # norm before the head; none for no norm
    tied: bool  # whether the head uses the token embedding's matrix
    dtype: str  # dtype of the computation
    # scan over the schedule's shortest repeating period instead of unrolling all layers
    scan: bool = dataclasses.field(metadata={"resume": "rounding"})
    causal: bool = True  # predict the next token: no layer attends to later positions
    embedding: EmbeddingConfig = EmbeddingConfig()  # map from tokens to the input of the first layer
    head: HeadConfig = HeadConfig()  # map from the last norm to the logits
    reversible: bool = False  # use a reversible residual stream (Reformer, arXiv:2001.04451), see `layers.Layer`
    hyper: HyperConfig | None = None  # hyper-connections between several residual streams; none for a single stream
    # shared blocks by name, to which `side` of a layer refers
    shared: dict[str, SharedConfig] = dataclasses.field(default_factory=dict)
    # dropout rate on the embedding and on the outputs of mixers and MLPs in training (arXiv:1706.03762)
    dropout: float = 0.0
    # dtype in which linear maps and embeddings are kept in training. "bfloat16" takes half the memory of "float32", and
    # loses updates below 1/256 of a parameter: gradients and updates are float32, and their sum is rounded to nearest
    param_dtype: str = "float32"
    # allow mixers that leak by definition, such as LSH attention, in a causal model; reports mark its runs
    allow_leaks: bool = dataclasses.field(default=False, metadata={"resume": "none"})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "vocab", "width")
        require_choice(self, "dtype", DTYPES)
        require_choice(self, "param_dtype", DTYPES)
        if not 0 <= self.dropout < 1:
            raise InputError("dropout", f"{self.dropout} is not in [0, 1)")
        axial = self.embedding.axial
        if axial is not None and sum(axial.widths) != self.width:
            raise InputError("embedding.axial.widths", f"{list(axial.widths)} do not add up to width = {self.width}")
        if self.reversible:
            self._check_reversible()
        if self.hyper is not None:
            self._check_hyper()
        if not self.layers:
            raise InputError("layers", "has no layer")
        schedules.check(self.schedule, self.layers)
        for name, layer in self.layers.items():
            if layer.side is not None and layer.side.shared not in self.shared:
                raise InputError(f"layers.{name}.side.shared", f"shared has no block {layer.side.shared!r}")
            self._check_causal(f"layers.{name}", layer.mixer)
        for name, block in self.shared.items():
            self._check_causal(f"shared.{name}", block.mixer)
        self._check_shared_selections()

    def _check_shared_selections(self) -> None:
        last = None
        for name in self.names:
            mixer = self.layers[name].mixer
            for indexer in () if mixer is None else mixer.indexers:
                key, fields = f"layers.{name}.mixer.indexer.shared", ("top_k", "block", "dense")
                values = tuple(getattr(indexer, field) for field in fields)
                if indexer.shared and last is None:
                    raise InputError(key, "no layer before it has an indexer that is not shared; set it to false")
                if indexer.shared and values != last:
                    names = ", ".join(fields)
                    raise InputError(key, f"({names}) = {values} differ from {last} of the indexer before it; set them")
                last = values

    def _check_reversible(self) -> None:
        for key, value in {
            "tied": self.tied, "head.activation": self.head.activation, "head.norm": self.head.norm
        }.items():  # fmt: skip
            if value:
                off = "false" if key == "tied" else "none"
                problem = f"the head of a reversible model reads both streams, twice the width; set it to {off}"
                raise InputError(key, problem)
        for name, layer in self.layers.items():
            if layer.side is not None:
                raise InputError(f"layers.{name}.side", "a reversible model cannot use shared blocks")

    def _check_hyper(self) -> None:
        if self.reversible:
            raise InputError("reversible", "cannot be combined with hyper-connections; set hyper to none")
        for name, layer in self.layers.items():
            with argument_path(f"layers.{name}"):
                layer.check_hyper()

    def _check_causal(self, section: str, mixer: MixerConfig | None) -> None:
        if mixer is None or not self.causal:
            return
        if mixer.connectivity.lookahead() > 0:
            raise InputError(
                f"{section}.mixer.pattern" if hasattr(mixer, "pattern") else f"{section}.mixer",
                f"{str(mixer.connectivity)!r} reads from later positions, but causal is true; write 'causal & ...'",
            )
        if mixer.leaks and not self.allow_leaks:
            raise InputError(
                f"{section}.mixer",
                f"reads the future: {mixer.leaks}; use another mixer, or set model.allow_leaks=true",
            )

    def check(self, length: int) -> None:
        """Checks that every mixer works on sequences of `length` tokens.

        Raises:
          InputError: names the key, such as `layers.local.mixer.pattern`.
        """
        for name, layer in self.layers.items():
            with argument_path(f"layers.{name}"):
                layer.check(length)
        for name, block in self.shared.items():
            with argument_path(f"shared.{name}"):
                block.check(length)

    def check_sharded(self, length: int, shards: int) -> None:
        """Checks that sequences of `length` tokens can be sharded.

        Raises:
          InputError: names the key of a mixer that cannot.
        """
        mixers: dict[str, MixerConfig | None]
        mixers = {f"layers.{name}.mixer": self.layers[name].mixer for name in dict.fromkeys(self.names)}
        mixers |= {f"shared.{name}.mixer": block.mixer for name, block in self.shared.items()}
        for key, mixer in mixers.items():
            if shards > 1 and mixer is not None and not mixer.exchange(length, shards):
                raise InputError(key, f"{mixer.summary} cannot be sharded over a sequence; set sharding.sequence = 1")

    @property
    def streams(self) -> int:
        """Number of residual streams of `width` features, which are side by side."""
        return self.hyper.streams if self.hyper is not None else 2 if self.reversible else 1

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names in the order of the schedule."""
        return schedules.parse(self.schedule)

    @property
    def shares_selections(self) -> bool:
        """Whether a layer attends to the keys that an earlier layer selected."""
        mixers = (layer.mixer for layer in self.layers.values())
        return any(i.shared and not i.dense for mixer in mixers if mixer is not None for i in mixer.indexers)

    @property
    def measures_selections(self) -> bool:
        """Whether a layer selects keys, or trains an indexer to select them."""
        return any(layer.mixer is not None and layer.mixer.is_measured for layer in self.layers.values())

    @property
    def fold(self) -> schedules.Fold:
        """The layers that are scanned and those that are unrolled."""
        return schedules.fold(self.names) if self.scan else schedules.Fold(self.names, (), 0, ())

    @property
    def connectivity(self) -> list[tuple[str, patterns.Pattern]]:
        """Name and pattern of each layer in the order of the schedule, from which the receptive field follows."""
        return [(name, self._layer_connectivity(self.layers[name])) for name in self.names]

    @property
    def layer_schedule(self) -> schedules.Schedule:
        """The schedule with the pattern and the mixer of each layer: receptive fields, pictures."""
        mixers = {name: layer.mixer.summary if layer.mixer else "-" for name, layer in self.layers.items()}
        return schedules.Schedule(self.names, dict(self.connectivity), mixers)

    def _repr_html_(self) -> str:
        return self.layer_schedule._repr_html_()

    def _layer_connectivity(self, layer: LayerConfig) -> patterns.Pattern:
        if layer.side is None:
            return layer.connectivity
        return layer.connectivity | self.shared[layer.side.shared].mixer.connectivity


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Overrides of the configuration from step `start` up to the next phase (staged training).

    `set` holds the overrides as nested sections, and each phase starts from the run's configuration, not from that of
    the previous phase:

        config.train.phases = dict(long=dict(start=10_000, set=dict(data=dict(length=4096))))

    The command line adds a phase by setting its keys:

        --config.train.phases.long.start=10000 --config.train.phases.long.set.data.length=4096

    A phase can set the keys in `PHASE_KEYS`.
    """

    start: int  # first step of the phase, counted from 0
    set: Overrides = dataclasses.field(default_factory=dict)  # overrides as nested sections

    def __post_init__(self) -> None:
        require_at_least(self, 0, "start")


BASE_PHASE = "base"  # name of the steps before the first phase
# Keys that a phase can set, and prefixes, which end in a dot. A phase cannot change the shapes of the parameters.
PHASE_KEYS = (
    "data.length",
    "data.sources.*.weight",
    "train.batch",
    "train.accumulate",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.freeze",
    "optimizer.groups",
    "train.teacher.kl",
    "train.teacher.temperature",
    "train.teacher.top_k",
    "train.teacher.hidden",
    "train.teacher.hidden_layers",
    "train.teacher.attention_output",
    "train.teacher.attention_layers",
    "train.teacher.loss",
    "eval.batch",
    "eval.batches",
    "eval.final",
    "eval.stride",
    "model.",
)


LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int  # number of updates of the parameters
    batch: int  # windows per step
    # microbatches per step, over which gradients are summed
    accumulate: int = dataclasses.field(metadata={"resume": "rounding"})
    seed: int  # seed of the initialization, the order of the data and dropout
    log_every: int = dataclasses.field(metadata={"resume": "none"})  # steps between two records of the training metrics
    # action if the loss diverges: "stop" with a checkpoint, or "skip" the update
    bad_loss: str = dataclasses.field(metadata={"resume": "divergence"})
    # multiple of the phase's mean above which a loss has diverged; 0: only a loss that is not finite
    spike: float = dataclasses.field(metadata={"resume": "divergence"})
    # check the model beside the first steps, see `sparsejax check`; a run whose model fails stops without a checkpoint
    check: bool = dataclasses.field(default=True, metadata={"resume": "none"})
    # consecutive updates that "skip" leaves out; after them the run stops with a checkpoint
    max_skips: int = dataclasses.field(default=20, metadata={"resume": "divergence"})
    phases: dict[str, PhaseConfig] = dataclasses.field(default_factory=dict)  # phases by name
    # weight of the squared logarithm of the normalizer of the logits (PaLM, arXiv:2204.02311), as an auxiliary loss
    z_loss: float = 0.0
    # probability that the targets spread evenly over the vocabulary (arXiv:1512.00567), as an auxiliary loss
    label_smoothing: float = 0.0
    # tokens of a row whose logits are in memory at a time; none for as many as have 128 MiB of logits per device
    loss_chunk: int | None = dataclasses.field(default=None, metadata={"resume": "rounding"})
    teacher: TeacherConfig | None = None  # model from which the run distils; none for no teacher
    # destinations of the metrics besides the workdir's tables: "tensorboard", "wandb" and "mlflow", separated by commas
    log_to: str = dataclasses.field(default="tensorboard", metadata={"resume": "none"})
    # steps between two histograms of gradients and activations; 0 for none
    histograms: int = dataclasses.field(default=0, metadata={"resume": "none"})
    # first and last step of a trace by `jax.profiler`, such as "10:13"; empty for none
    profile: str = dataclasses.field(default="", metadata={"resume": "none"})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "batch", "accumulate", "log_every", "max_skips", "loss_chunk")
        require_at_least(self, 0, "seed", "spike", "z_loss", "histograms")
        for name in self.loggers:
            if name not in LOGGERS:
                raise InputError("log_to", f"{name!r} is not one of {', '.join(LOGGERS)}")
        steps = self.profile_steps
        if self.profile and not 1 <= steps.start < steps.stop:
            raise InputError("profile", f"{self.profile!r} is not FIRST:LAST, such as 10:13 for the steps 10 to 13")
        if not 0 <= self.label_smoothing < 1:
            raise InputError("label_smoothing", f"{self.label_smoothing} is not in [0, 1)")
        require_choice(self, "bad_loss", ("stop", "skip"))
        if self.batch % self.accumulate:
            raise InputError("batch", f"{self.batch} is not divisible by accumulate = {self.accumulate}")
        starts = [phase.start for phase in self.phases.values()]
        if BASE_PHASE in self.phases:
            raise InputError(f"phases.{BASE_PHASE}", "the name is that of the steps before the first phase; rename it")
        if len(set(starts)) < len(starts):
            raise InputError("phases", "two phases start at the same step")
        for name, phase in self.phases.items():
            if phase.start >= self.steps:
                raise InputError(f"phases.{name}.start", f"{phase.start} is not below steps = {self.steps}")

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers."""
        return tuple(dict.fromkeys(name.strip() for name in self.log_to.split(",") if name.strip()))

    @property
    def profile_steps(self) -> range:
        """Steps to trace; empty if there are none, or `profile` is malformed."""
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.profile)
        return range(int(match[1]), int(match[2]) + 1) if match else range(0)

    @property
    def active_teacher(self) -> TeacherConfig | None:
        """The section `teacher`, if a loss depends on the teacher."""
        return self.teacher if self.teacher is not None and self.teacher.is_active else None

    @property
    def loss_weight(self) -> float:
        """Weight of the loss of the targets beside those that depend on the teacher."""
        return 1.0 if self.teacher is None else self.teacher.loss


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters whose paths match, and what differs for them."""

    match: str  # patterns of parameter paths, separated by commas, such as "period.0.mixer.*, *.norm.*"
    rate: float = 1.0  # factor on the learning rate
    weight_decay: float | None = None  # weight decay of those of the parameters that decay; none for that of the run
    freeze: bool = False  # leave the parameters as they are, without state of the optimizer

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rate")
        if self.weight_decay is not None:
            require_at_least(self, 0, "weight_decay")
        if self.freeze and (self.rate != 1 or self.weight_decay is not None):
            raise InputError("freeze", "is true, but frozen parameters have neither rate nor weight_decay")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates W + alpha / rank * a @ b of matrices (LoRA, arXiv:2106.09685).

    Only the factors a and b are trained, and the parameters that `also` matches. Their paths are those of the matrices
    after "lora.", such as `lora.period.0.mixer.query.weight.a`, so that `optimizer.groups` can match them.
    """

    match: str  # patterns of matrices of linear maps, separated by commas, such as "*.query.weight, *.value.weight"
    rank: int = 8  # columns of a and rows of b
    alpha: float = 16.0  # numerator of the factor on the update
    also: str = ""  # patterns of other parameters that are trained, separated by commas, such as "*norm*, head.*"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rank")
        if self.alpha <= 0:
            raise InputError("alpha", f"{self.alpha} is not above 0")
        if not self.match.strip():
            raise InputError("match", "is empty; name matrices, such as '*.query.weight'")


# The keys of each optimizer, besides those of all optimizers, and their defaults.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "adafactor": {"momentum": 0.0, "min_factored": 128},
    "sgd": {"momentum": 0.0, "nesterov": False},
    "muon": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.95, "nesterov": True},
    "schedule_free_adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
}
OPTIMIZER_KEYS = tuple(dict.fromkeys(key for keys in OPTIMIZERS.values() for key in keys))
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
UNBOUNDED_SCHEDULES = ("constant", "inverse_sqrt")  # those that do not depend on the number of steps
DECAY_KEYS = {"decay_fraction": 0.1, "decay_shape": "linear"}  # keys of "wsd", and their defaults


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of optax with linear warm-up, a learning-rate schedule and clipping by global norm.

    | `name` | optimizer | keys |
    |---|---|---|
    | `adamw` | AdamW (arXiv:1711.05101) | `beta1`, `beta2`, `eps` |
    | `lion` | Lion (arXiv:2302.06675) | `beta1`, `beta2` |
    | `adafactor` | Adafactor (arXiv:1804.04235), whose rate is relative to the scale of each parameter | `momentum`, `min_factored` |
    | `sgd` | gradient descent | `momentum`, `nesterov` |
    | `muon` | Muon (arXiv:2502.16982) on matrices of linear maps except the head, AdamW on the rest | `momentum`, `nesterov`, `beta1`, `beta2`, `eps` |
    | `schedule_free_adamw` | schedule-free AdamW (arXiv:2405.15682) | `beta1`, `beta2`, `eps` |

    A key that an optimizer lacks must be none, and one that is none has the default of the optimizer. Weight decay is
    decoupled from the gradient in all of them, and applies to the matrices of linear maps.

    `freeze` and `groups` refer to parameters by path, such as `period.0.mixer.query.weight`, with the wildcards `*`,
    `?` and `[...]`. The patterns of `freeze` come first, then the groups in order; the first that matches counts.

        config.optimizer.freeze = "embedding.*"
        config.optimizer.groups = [dict(match="*.mixer.*", rate=0.1), dict(match="head.*", weight_decay=0.0)]
    """  # noqa: E501

    learning_rate: float  # peak learning rate, reached at the end of the warm-up
    # learning rate at the last step as a fraction of the peak; the schedules "constant" and "inverse_sqrt" ignore it
    final_rate: float
    warmup: int  # steps of the linear warm-up
    weight_decay: float  # decay of matrices per step, times the learning rate
    clip: float | None  # maximal global norm of the gradient; none for no clipping
    name: str = "adamw"  # optimizer, see above
    beta1: float | None = None  # decay of the mean of the gradient
    beta2: float | None = None  # decay of the mean of the squared gradient
    eps: float | None = None  # number added to the denominator of the update
    momentum: float | None = None  # decay of the sum of the gradients; 0 for none
    nesterov: bool | None = None  # whether the momentum is that of Nesterov
    min_factored: int | None = None  # least size of both axes of a matrix whose squared gradients are factored
    # learning-rate schedule after the warm-up: "cosine", "linear", "constant", "wsd" (warm-up, stable, decay), or
    # "inverse_sqrt": the peak times (warmup / step) ** 0.5
    schedule: str = "cosine"
    decay_fraction: float | None = None  # fraction of the steps in which "wsd" decays, at the end; none for 0.1
    decay_shape: str | None = None  # decay of "wsd": "linear", "cosine" or "sqrt" (1 - sqrt); none for "linear"
    freeze: str = ""  # patterns of parameters that are not trained, separated by commas
    groups: tuple[GroupConfig, ...] = ()  # groups of parameters with other rates or weight decays
    lora: LoraConfig | None = None  # low-rank updates of matrices instead of training all parameters; none for none
    # decay of an exponential moving average of the parameters, which is evaluated and saved beside them; none for none
    ema: float | None = None
    # dtype in which the means of gradients (momenta) are kept. Means of squared gradients are float32: at beta2 = 0.999
    # they change by less per step than bfloat16 resolves
    moments: str = "float32"

    def __post_init__(self) -> None:
        require_choice(self, "moments", DTYPES)
        require_at_least(self, 0, "learning_rate", "final_rate", "warmup", "weight_decay")
        require_choice(self, "name", tuple(OPTIMIZERS))
        require_choice(self, "schedule", SCHEDULES)
        self._require_known(OPTIMIZER_KEYS, OPTIMIZERS[self.name], self.name)
        self._require_known(tuple(DECAY_KEYS), DECAY_KEYS if self.schedule == "wsd" else {}, self.schedule)
        for name in ("beta1", "beta2", "momentum", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(name, f"{value} is not in [0, 1)")
        for name in ("eps", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                hint = "; none turns clipping off" if name == "clip" else ""
                raise InputError(name, f"{value} is not above 0{hint}")
        if self.min_factored is not None:
            require_at_least(self, 1, "min_factored")
        if self.decay_shape is not None:
            require_choice(self, "decay_shape", ("linear", "cosine", "sqrt"))
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise InputError("decay_fraction", f"{self.decay_fraction} is not in (0, 1]")
        if self.name == "schedule_free_adamw":
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        if self.moments != "float32":
            raise InputError(
                "moments", f"{self.moments!r}: {self.name} keeps no mean of gradients; set it to 'float32'"
            )
        if self.schedule != "constant":
            raise InputError(
                "schedule", f"{self.schedule!r} decays the rate, which {self.name} replaces; use 'constant'"
            )
        if self.beta1 == 0:
            raise InputError("beta1", f"0.0 is not above 0, as {self.name} requires")
        if self.ema is not None:
            raise InputError("ema", f"{self.ema}: {self.name} averages the parameters itself; set it to none")

    def _require_known(self, names: tuple[str, ...], known: Mapping[str, Any], owner: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and name not in known:
                keys = f"it has {', '.join(known)}; " if known else ""
                raise InputError(name, f"{value!r}: {owner} has no such key; {keys}set it to none")

    def option(self, name: str) -> Any:
        """Returns the value of a key of the optimizer or the schedule, or its default."""
        value = getattr(self, name)
        return (OPTIMIZERS[self.name] | DECAY_KEYS)[name] if value is None else value


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The model from whose weights the parameters start; by default they are drawn at random.

    Each parameter is loaded from the layer of the same index, or derived by a named rule of `sparsejax.init.rules`, or
    listed in `fresh`; anything else is an error. A run that resumes does not read the source again.
    """

    source: str | None = (
        None  # "hf:FOLDER", "run:WORKDIR", "run:WORKDIR@STEP" or "run:WORKDIR@best"; none for no source
    )
    # parameters that are drawn at random: patterns of paths, separated by commas, such as "layers.3.mixer.gate.*"
    fresh: str = ""
    rules: str = "auto"  # rules that may derive parameters, separated by commas; "auto" for all, "none" for none

    def __post_init__(self) -> None:
        if self.source is not None:
            ModelSource.parse(self.source)
        elif self.fresh or self.rules != "auto":
            name = "fresh" if self.fresh else "rules"
            raise InputError(name, f"{getattr(self, name)!r}: has no effect without source; set source, or remove it")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, of which the newest and the best by evaluation loss are kept."""

    every: int = dataclasses.field(metadata={"resume": "none"})  # steps between two checkpoints
    keep_last: int = dataclasses.field(metadata={"resume": "none"})  # number of newest checkpoints that are kept
    # number of best checkpoints that are kept in addition; 0 for none
    keep_best: int = dataclasses.field(metadata={"resume": "none"})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "keep_last")
        require_at_least(self, 0, "keep_best")


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Number of devices along each mesh axis."""

    data: int  # devices along the data axis; -1 for those that the other axes leave
    fsdp: int  # devices that shard parameters, optimizer state and batch
    tensor: int  # devices that shard heads and feed-forward widths
    sequence: int = 1  # devices that shard the tokens of a row, each a contiguous part, and parameters

    def __post_init__(self) -> None:
        require_at_least(self, 1, "fsdp", "tensor", "sequence")
        if self.data != -1:
            require_at_least(self, 1, "data")

    def check_length(self, length: int) -> None:
        """Raises InputError if rows of `length` tokens cannot be split evenly."""
        shards = self.sequence
        if length % shards:
            nearest = f"{length // shards * shards or shards} or {-(-length // shards) * shards}"
            problem = f"{length} tokens cannot be split evenly over sharding.sequence = {shards} devices; use {nearest}"
            raise InputError("length", problem)


# Keys that an evaluation of `eval.also` can set, and prefixes, which end in a dot. Parameters and validation text stay.
EVALUATION_KEYS = ("data.length", "data.probe.", "eval.batch", "eval.final", "eval.stride", "model.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on validation text, during the run and at its end.

    `also` adds evaluations at the end, by name, each with overrides on top of those of the last phase:

        config.eval.also = dict(long=dict(data=dict(length=4096)), local=dict(model=dict(schedule="8x(local)")))

    The command line adds one in the same way, even to a run that has ended: `--config.eval.also.long.data.length=4096`.
    An evaluation can set the keys in `EVALUATION_KEYS`.
    """

    every: int = dataclasses.field(metadata={"resume": "none"})  # steps between two evaluations
    batch: int  # windows per batch
    batches: int  # batches per evaluation during the run
    sample: int = dataclasses.field(metadata={"resume": "none"})  # tokens of text to generate at the end
    stride: int = 0  # tokens between the starts of windows, which score their last `stride` tokens; 0: data.length
    final: int = 0  # batches of the evaluation at the end, evenly spaced; 0: all of the validation text
    # additional evaluations at the end by name, each with overrides as nested sections
    also: dict[str, Overrides] = dataclasses.field(default_factory=dict, metadata={"resume": "none"})

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "batch", "batches")
        require_at_least(self, 0, "sample", "stride", "final")
        for name in self.also:
            if not name or "/" in name:  # a metric has it as a suffix behind a slash
                raise InputError("also", f"the name {name!r} is empty or contains '/'")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    sharding: ShardingConfig = dataclasses.field(metadata={"resume": "rounding"})
    eval: EvalConfig
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        if self.checkpoint.keep_best and self.checkpoint.every % self.eval.every:
            raise InputError(
                "checkpoint.keep_best",
                f"ranks checkpoints by evaluation loss, but eval.every = {self.eval.every} does not divide"
                f" checkpoint.every = {self.checkpoint.every}; change one of them or set keep_best = 0",
            )
        if self.eval.stride > self.data.length:
            raise InputError("eval.stride", f"{self.eval.stride} is above data.length = {self.data.length}")
        if both := self.data.sources.keys() & self.eval.also:
            raise InputError("eval.also", f"{min(both)} is the name of a source of data.sources, too; rename it")
        longest = self.model.embedding.max_length
        if longest is not None and self.eval.sample > longest:
            raise InputError("eval.sample", f"{self.eval.sample} tokens exceed the model's {longest} positions")
        check_data(self.model, self.data)
        teacher = self.train.teacher
        if teacher is not None and teacher.top_k > self.model.vocab:
            raise InputError("train.teacher.top_k", f"{teacher.top_k} is above model.vocab = {self.model.vocab}")


def check_data(model: ModelConfig, data: DataConfig) -> None:
    """Checks that a model takes the sequences of the section `data`, and can predict what its objective asks for.

    Raises:
      InputError: It does not; the argument is the dotted key.
    """
    if data.sources:
        for name, source in data.sources.items():
            if source.probe is not None and source.probe.length != data.length:
                problem = f"{source.probe.length} is not data.length = {data.length}"
                raise InputError(f"data.sources.{name}.probe.length", problem)
            check_data(model, data.source(name))
    elif data.probe is not None:
        _check_probe(model, data, data.probe)
    else:
        _check_objective(model, data)
    with argument_path("model"):
        model.check(data.length)


def _check_probe(model: ModelConfig, data: DataConfig, probe: Probe) -> None:
    if probe.length != data.length:
        raise InputError("data.length", f"{data.length} is not data.probe.length = {probe.length}")
    if probe.vocab > model.vocab:
        raise InputError("model.vocab", f"{model.vocab} is below {probe.vocab}, the vocabulary of {data.task}")


def _check_objective(model: ModelConfig, data: DataConfig) -> None:
    """Compares what the objective predicts with what the model attends to."""
    objective, causal, pool = data.objective, model.causal, model.head.pool
    if objective == "causal" and not causal:
        raise InputError("model.causal", "is false, but data.objective = 'causal' predicts the next token")
    if objective != "classify" and pool != "none":
        raise InputError("model.head.pool", f"is {pool!r}, but data.objective = {objective!r} predicts tokens")
    if objective == "classify" and causal and pool == "none":
        raise InputError(
            "model.causal",
            "is true, but data.objective = 'classify' reads the class from the first token, which attends to itself"
            " alone; set it to false, or model.head.pool to 'mean'",
        )
    if objective == "masked" and causal:
        raise InputError("model.causal", "is true, but data.objective = 'masked' predicts from both sides")
    if objective == "prefix" and not causal:
        allowed = patterns.Causal() | patterns.Prefix(data.prefix)
        for name, pattern in dict(model.connectivity).items():
            if (pattern - allowed).pairs(data.length):
                raise InputError(
                    f"model.layers.{name}.mixer.pattern",
                    f"{str(pattern)!r} attends to tokens that data.objective = 'prefix' predicts; it can attend to"
                    f" {str(allowed)!r}",
                )
