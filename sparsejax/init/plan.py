"""The origin of each parameter of a run: loaded from a trained model, derived by a rule, or drawn at random."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from sparsejax import sharding
from sparsejax.config import InitConfig, ModelConfig, ModelSource
from sparsejax.errors import InputError, suggest
from sparsejax.init import rules
from sparsejax.init.rules import Derivation
from sparsejax.init.weights import Weights, open_weights
from sparsejax.layers import MixerConfig, ParallelConfig
from sparsejax.model import Functional, Location, locate_parameters
from sparsejax.runs.groups import split_patterns

# Sizes that the shapes of parameters do not fix.
SIZES = ("heads", "head_width", "key_heads", "key_width", "value_width", "groups", "state", "top_k")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the parameters of a run come from.

    Attributes:
      model: The model of the run.
      weights: The trained model.
      derivations: Derivation by path in the unrolled model, for each parameter that is loaded or derived.
      fresh: Paths of the parameters that are drawn at random.
    """

    model: Functional
    weights: Weights
    derivations: dict[str, Derivation]
    fresh: tuple[str, ...]

    @property
    def unused(self) -> list[str]:
        """Paths of the parameters of the trained model that no parameter of the run comes from."""
        used = {path for derivation in self.derivations.values() for path in derivation.sources}
        return [path for path in self.weights.shapes if path not in used]

    def describe(self) -> list[str]:
        """Describes the plan: a line with the counts, and one per rule, for fresh and for unused parameters."""
        by_rule: dict[str, list[str]] = collections.defaultdict(list)
        for path, derivation in self.derivations.items():
            by_rule[" + ".join(derivation.rules)].append(path)
        loaded = by_rule.pop("", [])
        groups = {f"by {rule}": paths for rule, paths in by_rule.items()}
        groups |= {"fresh": list(self.fresh), "unused": self.unused}
        derived = sum(map(len, by_rule.values()))
        counts = f"{len(loaded)} parameters loaded, {derived} derived, {len(self.fresh)} fresh"
        lines = [f"  {name}: {_summarize(paths)}" for name, paths in groups.items() if paths]
        return [f"init: {self.weights.source}: {counts}", *lines]

    @property
    def record(self) -> dict[str, Any]:
        """The plan with the types of JSON."""
        derived = {path: item for path, item in self.derivations.items() if item.rules}
        return {
            "source": str(self.weights.source),
            "loaded": sorted(path for path in self.derivations if path not in derived),
            "derived": {
                path: {"rules": list(item.rules), "from": list(item.sources)} for path, item in sorted(derived.items())
            },
            "fresh": sorted(self.fresh),
            "unused": sorted(self.unused),
        }

    def load(self, mesh: Mesh, seed: int) -> dict[str, Any]:
        """Returns the parameters in float32 on the mesh; reads and places one after another.

        Those drawn at random are the ones of a run of the same seed without a source.

        Raises:
          InputError: A tensor has a wrong shape or dtype, or the trained model is gone or damaged.
        """
        shardings = _by_path(sharding.parameter_shardings(mesh, self.model.shapes, self.model.axes))
        located = locate_parameters(self.model)
        names: dict[tuple[Any, ...], list[str]] = collections.defaultdict(list)  # of all repetitions
        for name, location in located.items():
            names[location.path].append(name)
        drawn = self._draw([path for path in names if not set(names[path]).isdisjoint(self.fresh)], shardings, seed)
        parameters: dict[tuple[Any, ...], Array] = {}
        for path, stack in names.items():
            values = [self._read(name, located[name]) for name in stack]
            parameters[path] = _put(values, located[stack[0]], shardings[path], drawn.get(path))
        return jax.tree.map_with_path(lambda path, _: parameters[_keys(path)], self.model.shapes)

    def _read(self, name: str, location: Location) -> np.ndarray | None:
        """The value of a parameter; None if it is drawn at random."""
        if name not in self.derivations:
            return None
        derivation = self.derivations[name]
        value = derivation.convert(*map(self.weights.read, derivation.sources))
        if value.shape != location.shape:
            rule = ", ".join(derivation.rules)
            problem = f"{rule} gives the shape {list(value.shape)}, not {list(location.shape)}"
            raise InputError("init.source", f"{name}: {problem}")
        return value

    def _draw(
        self, paths: Sequence[tuple[Any, ...]], shardings: dict[tuple[Any, ...], Any], seed: int
    ) -> dict[tuple[Any, ...], Array]:
        """The initial values of parameters as `runs.init_state` draws them, by path."""

        def init(key: Array) -> list[Array]:
            leaves = _by_path(self.model.init(jax.random.split(key)[0]))
            return [leaves[path] for path in paths]

        placed = [shardings[path] for path in paths]
        return dict(zip(paths, jax.jit(init, out_shardings=placed)(jax.random.key(seed)), strict=True))


def plan(config: InitConfig, model: Functional) -> Plan:
    """Plans where each parameter of a model comes from; reads no parameter.

    Layer i of the model corresponds to layer i of the source. A pattern of `config.fresh` matches the path in the
    unrolled model, such as `layers.3.mixer.gate.weight`, or in the nested dicts, such as `period.0.mixer.gate.weight`.

    Raises:
      InputError: There is no such source; a parameter is neither loaded, nor derived, nor listed in `fresh`; or a
        pattern or a rule matches nothing.
    """
    assert config.source is not None
    allowed = _read_rules(config.rules)
    weights = open_weights(ModelSource.parse(config.source))
    located = locate_parameters(model)
    fresh = _match(config.fresh, located)
    derivations: dict[str, Derivation] = {}
    problems: dict[str, str] = {}
    for path, location in located.items():
        if path in fresh:
            continue
        try:
            derivation = _derive(path, location.shape, model.config, weights)
            forbidden = [rule for rule in derivation.rules if rule not in allowed]
            if forbidden:
                raise InputError("rules", f"{config.rules!r} does not have the rule {forbidden[0]}, which derives it")
            derivations[path] = derivation
        except InputError as error:
            problems[path] = str(error)
    if problems:
        raise _missing(problems, located, weights)
    applied = {rule for derivation in derivations.values() for rule in derivation.rules}
    if unmatched := [rule for rule in allowed if config.rules != "auto" and rule not in applied]:
        raise InputError("init.rules", f"{unmatched[0]!r} derives no parameter; remove it")
    return Plan(model, weights, derivations, tuple(path for path in located if path in fresh))


def _read_rules(text: str) -> list[str]:
    if text in ("auto", "none"):
        return list(rules.RULES) if text == "auto" else []
    names = split_patterns(text)
    for name in names:
        if name not in rules.RULES:
            raise InputError("init.rules", f"{name!r} is not a rule; {suggest(name, rules.RULES, 'rules')}")
    return names


def _match(patterns: str, located: dict[str, Location]) -> set[str]:
    """The parameters that match patterns."""
    matched: set[str] = set()
    for pattern in split_patterns(patterns):
        paths = {
            name
            for name, location in located.items()
            if any(fnmatch.fnmatchcase(path, pattern) for path in (name, ".".join(map(str, location.path))))
        }
        if not paths:
            raise InputError("init.fresh", f"{pattern!r} matches no parameter, such as {next(iter(located))}")
        matched |= paths
    return matched


def _derive(path: str, shape: tuple[int, ...], target: ModelConfig, weights: Weights) -> Derivation:
    """The derivation of a parameter; raises InputError with the reason if there is none."""
    source, layer = weights.config, _LAYER.fullmatch(path)
    if layer is not None:
        index, name = int(layer[1]), layer[2]
        if index >= len(source.names):
            raise InputError(None, f"the source has {len(source.names)} layers")
        new, old = target.layers[target.names[index]], source.layers[source.names[index]]
        if name.startswith("mixer."):
            return _derive_mixer(f"layers.{index}.mixer", path, shape, new.mixer, old.mixer, weights)
        if name.startswith("mlp.") and old.mlp is not None:
            _require_same_sizes(new.mlp, old.mlp)
            kinds = getattr(new.mlp, "kind", "experts"), getattr(old.mlp, "kind", "experts")
            if kinds[0] != kinds[1]:
                raise InputError("mlp.kind", f"{kinds[0]!r}: that of the source is {kinds[1]!r}")
        return _load(path, shape, weights)
    if path == "embedding.positions" and path in weights.shapes and shape != weights.shapes[path]:
        padding = target.embedding.padding
        if padding != source.embedding.padding:
            raise InputError("embedding.padding", f"{padding}: that of the source is {source.embedding.padding}")
        convert = lambda table: rules.repeat_positions(table, shape[0], padding)  # noqa: E731
        return Derivation(("repeat_positions",), (path,), convert)
    if path in ("embedding.tokens", "head.weight", "head.bias"):
        return _derive_vocabulary(path, shape, target, weights)
    return _load(path, shape, weights)


def _derive_vocabulary(path: str, shape: tuple[int, ...], target: ModelConfig, weights: Weights) -> Derivation:
    """The derivation of a parameter with an axis of token ids."""
    axis = -1 if path == "head.weight" else 0
    untied = path == "head.weight" and weights.config.tied
    origin, applied = ("embedding.tokens", ("untie_head",)) if untied else (path, ())
    if target.vocab < weights.config.vocab:
        raise InputError("vocab", f"{target.vocab} is below {weights.config.vocab}, the vocabulary of the source")
    if target.vocab == weights.config.vocab and not untied:
        return _load(path, shape, weights)
    if origin not in weights.shapes:
        return _load(path, shape, weights)
    if target.vocab > weights.config.vocab:
        applied = (*applied, "grow_vocabulary")

    def convert(array: np.ndarray) -> np.ndarray:
        array = rules.untie_head(array) if untied else array
        return rules.grow_vocabulary(array, target.vocab, axis) if target.vocab > weights.config.vocab else array

    return Derivation(applied, (origin,), convert)


def _derive_mixer(
    prefix: str, path: str, shape: tuple[int, ...], new: MixerConfig | None, old: MixerConfig | None, weights: Weights
) -> Derivation:
    """The derivation of a parameter of the mixer at `prefix`."""
    name = path.removeprefix(f"{prefix}.")
    if isinstance(new, ParallelConfig) and isinstance(old, ParallelConfig):
        branch = name.split(".")[1]
        if branch not in old.branches:
            raise InputError(None, f"the source has no branch {branch!r}")
        inner = new.branches[branch].mixer, old.branches[branch].mixer
        return _derive_mixer(f"{prefix}.branches.{branch}", path, shape, *inner, weights)
    rule = rules.MIXER_RULES.get((type(old), type(new)))
    derivation = None if rule is None else rule(old, new).get(name)
    sources = () if derivation is None else tuple(f"{prefix}.{source}" for source in derivation.sources)
    if derivation is not None and all(source in weights.shapes for source in sources):
        return dataclasses.replace(derivation, sources=sources)
    if type(old) is not type(new):
        kinds = (config.summary.split()[0] if config is not None else "none" for config in (old, new))
        problem = "no rule converts {} to {}".format(*kinds) if rule is None else f"{rule.__name__} does not supply it"
        raise InputError(None, problem)
    if rule is None:
        _require_same_sizes(new, old)
    return _load(path, shape, weights)


def _require_same_sizes(new: Any, old: Any) -> None:
    for name in SIZES:
        if getattr(new, name, None) != getattr(old, name, None):
            raise InputError(name, f"{getattr(new, name, None)}: that of the source is {getattr(old, name, None)}")


def _load(path: str, shape: tuple[int, ...], weights: Weights) -> Derivation:
    if path not in weights.shapes:
        raise InputError(None, "the source has no such parameter")
    if weights.shapes[path] != shape:
        raise InputError(None, f"has the shape {list(shape)}, but that of the source is {list(weights.shapes[path])}")
    return Derivation((), (path,), lambda array: array)


def _missing(problems: dict[str, str], located: dict[str, Location], weights: Weights) -> InputError:
    """The error about the first parameter without an origin, with the patterns that would list all of them."""
    first = min(problems, key=lambda path: [int(part) if part.isdigit() else -1 for part in path.split(".")])
    patterns = []
    for path in problems:
        wide = re.sub(r"^layers\.\d+\.", "layers.*.", path)
        covers = [other for other in located if fnmatch.fnmatchcase(other, wide)]
        patterns.append(wide if all(other in problems for other in covers) else path)
    pattern = ", ".join(dict.fromkeys(patterns))
    return InputError(
        "init.source",
        f"{first} has no origin in {weights.source}: {problems[first]}; change the model, or draw what is missing at"
        f" random with init.fresh = {pattern!r}",
    )


def _put(values: list[np.ndarray | None], location: Location, placement: Any, drawn: Array | None) -> Array:
    """Places a parameter on the mesh, with all repetitions of the period; None stands for those of `drawn`."""
    if all(value is None for value in values):
        assert drawn is not None
        return drawn
    if location.repetition is None:
        return jax.device_put(np.ascontiguousarray(values[0], np.float32), placement)
    empty = np.zeros(location.shape, np.float32)
    stack = np.stack([empty if value is None else value.astype(np.float32, copy=False) for value in values])
    placed = jax.device_put(stack, placement)
    if drawn is None:
        return placed
    known = np.array([value is not None for value in values]).reshape(-1, *[1] * len(location.shape))
    return jax.jit(jnp.where, out_shardings=placement)(known, placed, drawn)


def _summarize(paths: Sequence[str]) -> str:
    others = len(paths) - 1
    return f"{paths[0]} and {others} other{'s' * (others > 1)}" if others else paths[0]


def _keys(path: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(entry.key for entry in path)


def _by_path(tree: Any) -> dict[tuple[Any, ...], Any]:
    return {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
