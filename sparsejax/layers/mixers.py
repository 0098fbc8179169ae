"""The mixers by name, and several mixers in parallel."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, argument_path
from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.compressed import Compressed, CompressedConfig
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.conv import Conv, ConvConfig
from sparsejax.layers.delta import Delta, DeltaConfig
from sparsejax.layers.indexer import IndexerConfig
from sparsejax.layers.latent import Latent, LatentConfig
from sparsejax.layers.lightning import Lightning, LightningConfig
from sparsejax.layers.lsh import Lsh, LshConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mamba2 import Mamba2, Mamba2Config
from sparsejax.layers.nsa import Nsa, NsaConfig
from sparsejax.layers.protocols import Auxiliary, Cache, Mixer, MixerConfig
from sparsejax.layers.rglru import RgLru, RgLruConfig
from sparsejax.layers.routing import Routing, RoutingConfig
from sparsejax.layers.stream import Cost, Stream
from sparsejax.ops import AttentionCall, Selection
from sparsejax.ops.call import SelectedCall
from sparsejax.registry import Registry, is_frozen_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One of several parallel mixers."""

    mixer: MixerConfig  # mixer of the branch
    scale_in: float = 1.0  # factor on the input
    scale_out: float = 1.0  # factor on the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig):
    """Mixers that read the same input and whose outputs are added (Falcon-H1, arXiv:2507.22448)."""

    branches: dict[str, BranchConfig]  # branches by name

    def __post_init__(self):
        if not self.branches:
            raise InputError("branches", "there are none; a parallel mixer needs at least one")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return " + ".join(branch.mixer.summary for branch in self.branches.values())

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from in any branch."""
        return functools.reduce(operator.or_, (branch.mixer.connectivity for branch in self.branches.values()))

    @property
    def leaks(self) -> str:
        """Leak of the first branch that has one."""
        return next((branch.mixer.leaks for branch in self.branches.values() if branch.mixer.leaks), "")

    @property
    def selects(self) -> bool:
        """Whether a branch selects."""
        return any(branch.mixer.selects for branch in self.branches.values())

    @property
    def indexers(self) -> tuple[IndexerConfig, ...]:
        """The indexers of the branches."""
        return tuple(indexer for branch in self.branches.values() for indexer in branch.mixer.indexers)

    def exchange(self, length: int, shards: int) -> str:
        """What the branches exchange; empty if one of them cannot be sharded."""
        kinds = [branch.mixer.exchange(length, shards) for branch in self.branches.values()]
        return "; ".join(dict.fromkeys(kinds)) if all(kinds) else ""

    @property
    def is_measured(self) -> bool:
        """Whether a branch is measured."""
        return any(branch.mixer.is_measured for branch in self.branches.values())

    def update_state(self, parameters: dict[str, Any], statistics: dict[str, Array]) -> dict[str, Any]:
        """Updates the state of the branches."""
        branches = dict(parameters["branches"])
        for name, branch in self.branches.items():
            sums = {key.partition("/")[2]: value for key, value in statistics.items() if key.startswith(f"{name}/")}
            branches[name] = branch.mixer.update_state(branches[name], sums) if sums else branches[name]
        return parameters | {"branches": branches}

    def check(self, length: int) -> None:
        """Raises InputError if a branch cannot run on `length` tokens."""
        for name, branch in self.branches.items():
            with argument_path(f"branches.{name}.mixer"):
                branch.mixer.check(length)


class Parallel(Mixer):
    """The weighted sum of its branches."""

    def __init__(self, config: ParallelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict(
            {name: make_mixer(branch.mixer, stream, rngs) for name, branch in config.branches.items()}
        )

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self.mix(x, context)[0]

    def mix(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes a whole sequence; returns the losses of the branches."""
        outputs, auxiliary = [], Auxiliary({})
        for name, branch in self.config.branches.items():
            y, added = self.branches[name].mix(branch.scale_in * x, context)
            outputs.append(branch.scale_out * y)
            sums = {f"{name}/{key}": value for key, value in (added.statistics or {}).items()} or None
            auxiliary = auxiliary.add(added._replace(statistics=sums))
        return functools.reduce(operator.add, outputs), auxiliary

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection of each branch, by the name of the branch."""
        return {
            f"{name}/{metric}": value
            for name, branch in self.config.branches.items()
            for metric, value in self.branches[name].measure(branch.scale_in * x, context).items()
        }

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the selected keys of each branch."""
        return self._gather_branches("selections", x, context)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache of each branch."""
        return {name: mixer.init_cache(batch, length) for name, mixer in self.branches.items()}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens in each branch."""
        return self.advance(x, cache, positions, length, context)[:2]

    def advance(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache, Selection | None]:
        """Mixes the next tokens in each branch; returns the selection of the last branch that has an indexer."""
        outputs, after, selection = [], {}, None
        for name, branch in self.config.branches.items():
            arguments = branch.scale_in * x, cache[name], positions, length, context
            y, after[name], selected = self.branches[name].advance(*arguments)
            selection = selection if selected is None else selected
            outputs.append(branch.scale_out * y)
        return functools.reduce(operator.add, outputs), after, selection

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention in each branch."""
        return self._gather_branches("attention_calls", x, context)

    def cost(self, length: int) -> Cost:
        """The sum of the costs of the branches."""
        return functools.reduce(operator.add, (mixer.cost(length) for mixer in self.branches.values()))

    def _gather_branches(self, method: str, x: Array, context: Context) -> dict[str, Any]:
        """What a method of the branches returns by path of a section, by path from that of this mixer."""
        return {
            f".branches.{name}.mixer{path}": value
            for name, branch in self.config.branches.items()
            for path, value in getattr(self.branches[name], method)(branch.scale_in * x, context).items()
        }


# The config and the module of each value of `kind`.
MIXERS: Registry[tuple[type[MixerConfig], type[Mixer]]] = Registry(
    "mixer",
    "sparsejax.mixers",
    {
        "attention": (AttentionConfig, Attention),
        "compressed": (CompressedConfig, Compressed),
        "conv": (ConvConfig, Conv),
        "delta": (DeltaConfig, Delta),
        "latent": (LatentConfig, Latent),
        "lightning": (LightningConfig, Lightning),
        "lsh": (LshConfig, Lsh),
        "mamba": (MambaConfig, Mamba),
        "mamba2": (Mamba2Config, Mamba2),
        "nsa": (NsaConfig, Nsa),
        "parallel": (ParallelConfig, Parallel),
        "rglru": (RgLruConfig, RgLru),
        "routing": (RoutingConfig, Routing),
    },
)
# The module of each config class, including those that a later registration of the same kind replaced.
MODULES: dict[type[MixerConfig], type[Mixer]] = dict(MIXERS.members[kind][0] for kind in MIXERS.members)
M = TypeVar("M", bound=type)


def register(kind: str, config: type) -> Callable[[M], M]:
    """Returns a decorator that adds a mixer to the values of `mixer.kind`.

        @layers.register("ema", EmaConfig)
        class Ema(layers.Mixer):
            ...

    Args:
      kind: The value of `kind` in the config section of the mixer.
      config: A frozen dataclass derived from `MixerConfig`; its fields are the other keys of the section.

    Returns:
      A decorator of a class derived from `Mixer`. It returns the class; the one registered first if the same file is
      run again.

    Raises:
      InputError: The kind belongs to another mixer, or a class is not as described.
    """

    def add(module: M) -> M:
        for name, value, base in (("config", config, MixerConfig), ("module", module, Mixer)):
            if not (isinstance(value, type) and issubclass(value, base)):
                shown = getattr(value, "__qualname__", repr(value))
                raise InputError(f"register.{name}", f"{shown} does not derive from layers.{base.__name__}")
        if not is_frozen_dataclass(config):
            decorator = "@dataclasses.dataclass(frozen=True, kw_only=True)"
            raise InputError("register.config", f"{config.__qualname__} is not a frozen dataclass; add {decorator}")
        for other, ((known, _), _) in MIXERS.members.items():
            if known is config and other != kind:
                raise InputError("register.config", f"{config.__qualname__} is the config of {other!r}; derive a class")
        _, registered = MIXERS.add(kind, (config, module), module)
        MODULES[config] = registered
        return registered

    return add


def make_mixer(config: MixerConfig, stream: Stream, rngs: nnx.Rngs) -> Mixer:
    """Builds the mixer that `config` describes."""
    if type(config) not in MODULES:
        raise InputError("mixer", f"{type(config).__qualname__} belongs to no mixer; add it by layers.register")
    return MODULES[type(config)](config, stream, rngs)
