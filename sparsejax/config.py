"""Configuration: a ConfigDict from a file and the command line, checked once into frozen dataclasses.

Below this module nobody sees a ConfigDict. Optional features have a default here that leaves them out; any other key
that is missing is an error. What a file leaves out is filled in at once, so that overrides, records and digests see
the whole configuration.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import operator
import sys
import traceback
import types
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax import patterns, schedule
from sparsejax.data import DataConfig
from sparsejax.data.probes import PROBES
from sparsejax.layers import (
    ACTIVATIONS,
    FEEDFORWARDS,
    MIXERS,
    FeedForwardConfig,
    LayerConfig,
    MixerConfig,
    NormConfig,
    SharedConfig,
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the key."""


def _require(config: Any, **least: float) -> None:
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")


def _choose(config: Any, name: str, *options: str) -> None:
    if getattr(config, name) not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(config, name)!r}")


# Sections whose class is told by their `kind`; that of `data.probe` is told by `data.task`.
KINDS = {MixerConfig: MIXERS, FeedForwardConfig: FEEDFORWARDS}


@dataclasses.dataclass(frozen=True)
class AxialConfig:
    """Learned positions in two parts (Reformer, arXiv:2001.04451), for `shape[0]` times `shape[1]` tokens.

    The place of a token in a table of this shape is a row and a column; each has an embedding of its width.
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self):
        for name in ("shape", "widths"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name} must be two numbers of at least 1, got {list(value)}")

    @property
    def length(self) -> int:
        """How many tokens have a position."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """What is done with a token's embedding before the first layer, in this order."""

    scale: float = 1.0  # a factor, such as width ** 0.5 (arXiv:1706.03762)
    types: int = 0  # token types; every token is of type 0
    positions: int = 0  # learned absolute positions; 0: none
    axial: AxialConfig | None = None  # learned positions that are made of two parts, instead
    padding: int | None = None  # RoBERTa: positions start behind this token id, and it takes none itself
    norm: NormConfig | None = None

    def __post_init__(self):
        _require(self, types=0, positions=0)
        if self.axial is not None and (self.positions or self.padding is not None):
            raise ValueError("axial positions are instead of others, and do not start behind padding")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """From the last norm to logits: linear, activation and norm if there is an `activation`, then the vocabulary."""

    activation: str | None = None  # BERT's masked language model: a linear map, an activation, a norm
    linear_bias: bool = True  # of that linear map
    norm: NormConfig | None = None  # after the activation
    bias: bool = False  # on the logits
    scale: float = 1.0  # of the logits
    softcap: float | None = None  # bounds the logits to softcap * tanh(logit / softcap) (Gemma 2)
    pool: str = "none"  # "mean": the same logits everywhere, of the mean over all tokens: to tell a sequence's class

    def __post_init__(self):
        _choose(self, "pool", "none", "mean")
        if self.activation is not None:
            _choose(self, "activation", *ACTIVATIONS)
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be above 0, got {self.softcap}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A sequence model: an embedding, layers in the order of the schedule, a norm, a head."""

    vocab: int
    width: int
    schedule: str
    layers: dict[str, LayerConfig]
    norm: NormConfig  # before the head
    tied: bool  # the head is the embedding's transpose
    dtype: str  # of the computation: float32 or bfloat16; parameters and optimizer state are float32
    scan: bool  # scan over the schedule's period, or unroll every layer
    causal: bool = True  # predicts the next token, so no layer may look ahead
    embedding: EmbeddingConfig = EmbeddingConfig()
    head: HeadConfig = HeadConfig()
    reversible: bool = False  # two streams, see `layers.Layer`
    shared: dict[str, SharedConfig] = dataclasses.field(default_factory=dict)  # blocks that layers share
    dropout: float = 0.0  # in training: of the embedding, and of what mixers and MLPs add (arXiv:1706.03762)

    def __post_init__(self):
        _require(self, vocab=1, width=1)
        _choose(self, "dtype", "float32", "bfloat16")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        axial = self.embedding.axial
        if axial is not None and sum(axial.widths) != self.width:
            raise ValueError(f"embedding.axial.widths = {list(axial.widths)} must add up to width = {self.width}")
        if not self.layers:
            raise ValueError("layers: needs at least one")
        schedule.check(self.schedule, self.layers)
        for name, layer in self.layers.items():
            if layer.side is not None and layer.side.shared not in self.shared:
                raise ValueError(f"layers.{name}.side.shared: no block {layer.side.shared!r} in shared")
            if layer.side is not None and self.reversible:
                raise ValueError(f"layers.{name}.side: a reversible stream has no shared blocks")
            self._check_causal(f"layers.{name}", layer.mixer)
        for name, block in self.shared.items():
            self._check_causal(f"shared.{name}", block.mixer)

    def _check_causal(self, place: str, mixer: MixerConfig | None) -> None:
        ahead = mixer.sees.lookahead() if self.causal and mixer is not None else 0
        if ahead > 0:
            raise ValueError(
                f"{place}.mixer.pattern: {str(mixer.sees)!r} sees {ahead} positions ahead; a model that predicts the"
                " next token needs 'causal & ...'"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names in order."""
        return schedule.parse(self.schedule)

    @property
    def fold(self) -> schedule.Fold:
        """Which layers are scanned, and which are unrolled."""
        return schedule.fold(self.names) if self.scan else schedule.Fold(self.names, (), 0, ())

    @property
    def sees(self) -> list[tuple[str, patterns.Pattern]]:
        """Name and pattern of each layer in order: what reach and advice start from."""
        return [(name, self._see(self.layers[name])) for name in self.names]

    def _see(self, layer: LayerConfig) -> patterns.Pattern:
        return layer.sees if layer.side is None else layer.sees | self.shared[layer.side.shared].mixer.sees


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """From step `start` on, up to the next phase, some keys have other values (staged training).

    `set` has them as on the command line, such as "data.length=4096". Each phase is the configuration with its own
    `set`: what an earlier one has set is not kept. It may set the keys in `PHASE_KEYS`.
    """

    start: int  # steps of the run before it
    set: tuple[str, ...] = ()

    def __post_init__(self):
        _require(self, start=0)


BASE_PHASE = "base"  # what comes before all phases
# What a phase may set; the model as far as its parameters keep their shapes.
PHASE_KEYS = (
    "data.length",
    "train.batch",
    "train.accumulate",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "eval.batch",
    "eval.batches",
    "eval.final",
    "eval.stride",
    "model.",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. A batch of `batch` windows is computed in `accumulate` parts."""

    steps: int
    batch: int
    accumulate: int
    seed: int
    log_every: int
    bad_loss: str  # when the loss is not finite or spikes: "stop" (with a checkpoint) or "skip" the update
    spike: float  # a spike is a loss above this multiple of its running mean; 0: only non-finite losses are bad
    phases: dict[str, PhaseConfig] = dataclasses.field(default_factory=dict)  # by any name; none: all steps are alike

    def __post_init__(self):
        _require(self, steps=1, batch=1, accumulate=1, seed=0, log_every=1, spike=0)
        _choose(self, "bad_loss", "stop", "skip")
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} is not divisible by accumulate = {self.accumulate}")
        starts = [phase.start for phase in self.phases.values()]
        if BASE_PHASE in self.phases:
            raise ValueError(f"phases.{BASE_PHASE}: is what comes before all phases; choose another name")
        if len(set(starts)) < len(starts):
            raise ValueError("phases: two of them start at the same step")
        for name, phase in self.phases.items():
            if phase.start >= self.steps:
                raise ValueError(f"phases.{name}.start: is {phase.start}, the run has {self.steps} steps")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with linear warm-up, a schedule behind it and clipping by global norm."""

    learning_rate: float  # at the end of the warm-up
    final_rate: float  # at the last step, as a share of learning_rate; a constant schedule has no use for it
    warmup: int  # steps
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # on the weights of linear maps only
    clip: float  # of the gradient's global norm
    schedule: str = "cosine"  # after the warm-up: "cosine" or "linear", down to final_rate, or "constant"

    def __post_init__(self):
        _require(self, learning_rate=0, final_rate=0, warmup=0, weight_decay=0)
        _choose(self, "schedule", "cosine", "linear", "constant")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0 and self.clip > 0):
            raise ValueError("needs 0 <= beta1, beta2 < 1, eps > 0 and clip > 0")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Steps between checkpoints, and how many of the newest and of the best (by evaluation loss) are kept."""

    every: int
    keep_last: int
    keep_best: int

    def __post_init__(self):
        _require(self, every=1, keep_last=1, keep_best=0)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Devices along each mesh axis; `data = -1` takes all that the others leave."""

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        _require(self, data=-1, fsdp=1, tensor=1)
        if self.data == 0:
            raise ValueError("data must be at least 1, or -1 for all remaining devices")


NAMED = ("eval.also",)  # sections of values by names that are free to choose: an override can add one
# What an evaluation of `eval.also` may set; the text held out is the same, and so are the parameters.
ALSO_KEYS = ("data.length", "data.probe.", "eval.batch", "eval.final", "eval.stride", "model.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation every `every` steps on `batches` batches of `batch` windows; at the end on `final`, or on all.

    At the end also under other settings, by name: `also` has for each what it sets, as on the command line, such as
    "model.schedule=8x(full)", on top of what the last phase sets. It may set the keys in `ALSO_KEYS`. A run that has
    ended is evaluated again as `also` says then.
    """

    every: int
    batch: int
    batches: int
    sample: int  # tokens of text to generate at the end
    stride: int = 0  # tokens from one window to the next, of which each scores only its last ones; 0: data.length
    final: int = 0  # batches of the evaluation at the end, spread evenly; 0: all of the validation text
    also: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _require(self, every=1, batch=1, batches=1, sample=0, stride=0, final=0)
        for name in self.also:
            if not name or "/" in name:  # it becomes a part of a metric's name
                raise ValueError(f"also: {name!r} is no name, nor is anything with a '/' in it")


@dataclasses.dataclass(frozen=True)
class Config:
    """A complete run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    sharding: ShardingConfig
    eval: EvalConfig

    def __post_init__(self):
        if self.checkpoint.keep_best and self.checkpoint.every % self.eval.every:
            raise ValueError(
                f"checkpoint.keep_best: ranks checkpoints by evaluation, so eval.every = {self.eval.every} must divide"
                f" checkpoint.every = {self.checkpoint.every} (or set keep_best = 0)"
            )
        if self.eval.stride > self.data.length:
            raise ValueError(f"eval.stride: {self.eval.stride} tokens are more than data.length = {self.data.length}")
        self._check_objective()
        for name, layer in self.model.layers.items():
            if hasattr(layer.mixer, "pattern"):
                try:
                    patterns.parse(layer.mixer.pattern, self.data.length)
                except patterns.PatternError as error:
                    raise ValueError(f"model.layers.{name}.mixer.pattern: {error}") from None

    def _check_objective(self) -> None:
        """Holds what is predicted against what the model can see and tell."""
        data, causal = self.data, self.model.causal
        if data.task != "text":
            if data.probe.length != data.length:
                raise ValueError(f"data.length: is {data.length}, the probe {data.task} has {data.probe.length} tokens")
            if data.probe.vocab > self.model.vocab:
                raise ValueError(f"model.vocab: is {self.model.vocab}, the probe {data.task} needs {data.probe.vocab}")
        elif data.objective == "causal" and not causal:
            raise ValueError("model.causal: is false, but data.objective = 'causal' predicts the next token")
        elif data.objective != "classify" and self.model.head.pool != "none":
            raise ValueError(f"model.head.pool: is 'mean', data.objective = {data.objective!r} predicts single tokens")
        elif data.objective == "classify" and causal and self.model.head.pool == "none":
            raise ValueError(
                "model.causal: is true, but data.objective = 'classify' asks the first token, which then sees nothing;"
                " or set model.head.pool = 'mean'"
            )
        elif data.objective == "masked" and causal:
            raise ValueError("model.causal: is true, but data.objective = 'masked' predicts from both sides")
        elif data.objective == "prefix" and not causal:
            given = patterns.Causal() | patterns.Prefix(data.prefix)
            for name, seen in dict(self.model.sees).items():
                if (seen - given).pairs(data.length):
                    raise ValueError(
                        f"model.layers.{name}.mixer.pattern: {str(seen)!r} sees what data.objective = 'prefix'"
                        f" predicts; it may see as much as {str(given)!r}"
                    )


def load(place: str, overrides: typing.Iterable[str] = ()) -> ConfigDict:
    """Reads `file.py` or `file.py:argument` and applies overrides like `model.width=256`.

    The file defines `get_config()`, or `get_config(argument)`, that returns a ConfigDict. It can import the
    config files beside it.

    Raises:
      ConfigError: no such file, an error inside it, an override of an unknown key.
    """
    path, _, argument = place.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config: no file {path!r}")
    try:
        module = run_file(path)
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{path}: line {line}" if line else path
        raise ConfigError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict")
    # A dict that a file uses twice would be one ConfigDict in both places, and an override of the one would
    # silently change the other.
    config = ConfigDict(_complete(Config, _copy_tree(config.to_dict())))
    # The task comes first: it decides which keys its section has.
    for text in sorted(overrides, key=lambda text: not text.startswith("data.task=")):
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--config.{key}: write --config.{key}=VALUE")
        before = config.data.task if key == "data.task" else None
        override(config, key, value)
        if key == "data.task" and value != before:
            config.data.probe = None
            config = ConfigDict(_complete(Config, config.to_dict()))
    return config


def run_file(path: str) -> types.ModuleType:
    """The module of a config file; what it imported from its own folder is forgotten, so no other file finds it."""
    spec = importlib.util.spec_from_file_location("sparsejax_config_file", path)
    if spec is None:
        raise ImportError("not a Python file")
    module, folder, before = importlib.util.module_from_spec(spec), str(Path(path).parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) == folder:
                del sys.modules[name]
    return module


def _copy_tree(value: Any) -> Any:
    return {key: _copy_tree(item) for key, item in value.items()} if isinstance(value, dict) else value


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key of a ConfigDict, in place; where the old value is no string, `text` is a literal.

    Raises:
      ConfigError: there is no such key, and it is in no section of `NAMED`.
    """
    *sections, name = key.split(".")
    section = config
    for i, part in enumerate([*sections, name]):
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"{'.'.join(key.split('.')[:i])}: is a value, not a section")
        if part not in section:
            if i == len(sections) and ".".join(sections) in NAMED:
                section[name] = _literal(text)
                return
            raise _unknown_key(".".join(key.split(".")[: i + 1]), part, list(section.keys()))
        section = section[part] if i < len(sections) else section
    value = text if isinstance(section[name], str) else _literal(text)
    if isinstance(section[name], ConfigDict) and value is not None:
        keys = f"{key}.NAME" if key in NAMED else f"one of its keys: {', '.join(section[name].keys())}"
        raise ConfigError(f"{key}: is a section; set {keys}")
    if isinstance(section[name], float) and type(value) is int:
        value = float(value)
    del section[name]  # set anew, so that ConfigDict does not convert it: `check` is to see what was given
    section[name] = value


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def build(kind: type, section: dict[str, Any]) -> Any:
    """A section, such as the model's, as the dataclass `kind`; raises ConfigError as `check` does."""
    return _build(kind, section, "")


def check(config: ConfigDict) -> Config:
    """The frozen form of a ConfigDict.

    Raises:
      ConfigError: an unknown, missing or mistyped key, or a value that cannot be; names the key and, for an
        unknown one, the nearest known. The same of every phase and every evaluation of `eval.also`.
    """
    checked = _build(Config, config.to_dict(), "")
    for name in checked.train.phases:
        check_phase(config, name)
    for name in checked.eval.also:
        check_also(config, name)
    return checked


def check_phase(config: ConfigDict, name: str) -> Config:
    """The frozen form of a ConfigDict with what its phase `name` sets.

    Raises:
      ConfigError: as `check`, with the phase's key before it; or something is set that a phase cannot set.
    """
    place = f"train.phases.{name}.set"
    return _check_at(place, _set_keys(config, place, config.train.phases[name]["set"], "a phase", PHASE_KEYS))


def check_also(config: ConfigDict, name: str) -> Config:
    """The frozen form of a ConfigDict with what its last phase and its evaluation `name` of `eval.also` set.

    Raises:
      ConfigError: as `check_phase`.
    """
    changed, place = config, f"eval.also.{name}"
    if config.train.phases:
        last, phase = max(config.train.phases.items(), key=lambda item: item[1]["start"])
        changed = _set_keys(config, f"train.phases.{last}.set", phase["set"], "a phase", PHASE_KEYS)
    return _check_at(place, _set_keys(changed, place, config.eval.also[name], "an evaluation", ALSO_KEYS))


def _set_keys(
    config: ConfigDict, place: str, given: typing.Iterable[str], who: str, known: tuple[str, ...]
) -> ConfigDict:
    """A copy with what is given at a place set; errors begin with the place."""
    changed = ConfigDict(_copy_tree(config.to_dict()))
    try:
        for text in given:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"write KEY=VALUE, got {text!r}")
            override(changed, key, value)
            if not any(key == one or (one.endswith(".") and key.startswith(one)) for one in known):
                listed = ", ".join(f"{one}*" if one.endswith(".") else one for one in known)
                raise ConfigError(f"{key}: {who} can only set {listed}")
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return changed


def _check_at(place: str, changed: ConfigDict) -> Config:
    try:
        return _build(Config, changed.to_dict(), "")
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the optional features that are newer than the record, left out."""
    return _complete(Config, settings)


def digest(config: ConfigDict) -> str:
    """12 hexadecimal digits that name the resolved configuration."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first key at which two resolved configurations differ, in words, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in old or key not in new:
                return f"{where} is only in {'this config' if key in new else 'the old one'}"
            found = difference(old[key], new[key], where)
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"


def _unknown_key(path: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return ConfigError(f"{path}: unknown key{f', did you mean {near[0]!r}?' if near else ''}")


def _complete(kind: Any, value: Any) -> Any:
    """`value` with the defaults of the sections in it; what cannot be understood is left for `check` to refuse."""
    kind = _resolve(kind, value)
    if isinstance(value, dict) and typing.get_origin(kind) is dict:
        return {key: _complete(typing.get_args(kind)[1], item) for key, item in value.items()}
    if not isinstance(value, dict) or not dataclasses.is_dataclass(kind):
        return value
    hints = _hint(kind, value)
    for field in dataclasses.fields(kind):
        if field.name not in value and _is_optional(field):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            value[field.name] = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
    if kind is DataConfig and value["probe"] is None and value.get("task") in PROBES:
        value["probe"] = {}
    return {key: _complete(hints[key], item) if key in hints else item for key, item in value.items()}


def _hint(kind: type, value: Any) -> dict[str, Any]:
    """The class of each field of a section."""
    hints = typing.get_type_hints(kind)
    if kind is DataConfig and isinstance(value, dict):
        task = value.get("task")
        hints["probe"] = PROBES[task] if isinstance(task, str) and task in PROBES else types.NoneType
    return hints


def _is_optional(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _resolve(kind: Any, value: Any) -> Any:
    """The class meant by an annotation: a union's one besides None, or the one that a section's `kind` tells."""
    if isinstance(kind, types.UnionType):
        kind = functools.reduce(operator.or_, (one for one in typing.get_args(kind) if one is not types.NoneType))
    if kind in KINDS and isinstance(value, dict):
        name = value.get("kind")
        return KINDS[kind][name][0] if isinstance(name, str) and name in KINDS[kind] else None
    return kind


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value` as a `kind` (a dataclass, a union, a tuple, a dict of names, or a plain type), or a ConfigError."""
    if isinstance(kind, types.UnionType) and types.NoneType in typing.get_args(kind) and value is None:
        return None
    options = next((KINDS[one] for one in KINDS if _resolve(kind, None) == one), None)
    if options is not None:
        _demand(isinstance(value, dict), path, "a section", value)
        if value.get("kind") not in options:
            raise ConfigError(f"{path}.kind: must be one of {', '.join(options)}, got {value.get('kind')!r}")
    kind = _resolve(kind, value)
    if dataclasses.is_dataclass(kind):
        # A class that serves several kinds has a field for it.
        own = options is None or "kind" in typing.get_type_hints(kind)
        return _build_section(kind, value if own else {k: v for k, v in value.items() if k != "kind"}, path)
    if typing.get_origin(kind) is dict:
        _demand(isinstance(value, dict), path, "a section", value)
        return {key: _build(typing.get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is tuple:
        _demand(isinstance(value, tuple | list), path, "a tuple", value)
        return tuple(_build(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _demand(number, path, "a number", value)
        return float(value)
    words = {int: "an integer", bool: "true or false", str: "text", types.NoneType: "none, as data.task is no probe"}
    _demand(type(value) is kind, path, words[kind], value)
    return value


def _build_section(kind: type, value: Any, path: str) -> Any:
    _demand(isinstance(value, dict), path, "a section", value)
    hints, fields = _hint(kind, value), {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise _unknown_key(f"{path}.{key}" if path else key, key, list(fields))
    parts = {}
    for key, field in fields.items():
        where = f"{path}.{key}" if path else key
        if key in value:
            parts[key] = _build(hints[key], value[key], where)
        elif not _is_optional(field):
            raise ConfigError(f"{where}: missing")
    try:
        return kind(**parts)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _demand(holds: Any, path: str, expected: str, value: Any) -> None:
    if not holds:
        shown = "a section" if isinstance(value, dict) else repr(value)
        raise ConfigError(f"{path}: expected {expected}, got {shown}")
