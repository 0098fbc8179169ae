"""The mixers by name, and several mixers in parallel."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, argument_path
from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.conv import Conv, ConvConfig
from sparsejax.layers.delta import Delta, DeltaConfig
from sparsejax.layers.latent import Latent, LatentConfig
from sparsejax.layers.lightning import Lightning, LightningConfig
from sparsejax.layers.lsh import Lsh, LshConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mamba2 import Mamba2, Mamba2Config
from sparsejax.layers.protocols import Cache, Mixer
from sparsejax.layers.rglru import RgLru, RgLruConfig
from sparsejax.layers.stream import Cost, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One of several parallel mixers."""

    mixer: MixerConfig
    scale_in: float = 1.0  # factor on the input
    scale_out: float = 1.0  # factor on the output


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Mixers that read the same input and whose outputs are added (Falcon-H1, arXiv:2507.22448)."""

    branches: dict[str, BranchConfig]

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

    def check(self, length: int) -> None:
        """Raises InputError if a branch cannot run on `length` tokens."""
        for name, branch in self.branches.items():
            with argument_path(f"branches.{name}.mixer"):
                branch.mixer.check(length)


class Parallel(nnx.Module):
    """The weighted sum of its branches."""

    def __init__(self, config: ParallelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict(
            {name: make_mixer(branch.mixer, stream, rngs) for name, branch in config.branches.items()}
        )

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        outputs = (
            branch.scale_out * self.branches[name](branch.scale_in * x, context)
            for name, branch in self.config.branches.items()
        )
        return functools.reduce(operator.add, outputs)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache of each branch."""
        return {name: mixer.init_cache(batch, length) for name, mixer in self.branches.items()}

    def step(
        self, x: Float[Array, "b m"], cache: Cache, position: Int[Array, ""], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b m"], Cache]:
        """Mixes one more token, at `position` of at most `length`."""
        outputs, after = [], {}
        for name, branch in self.config.branches.items():
            y, after[name] = self.branches[name].step(branch.scale_in * x, cache[name], position, length, context)
            outputs.append(branch.scale_out * y)
        return functools.reduce(operator.add, outputs), after

    def cost(self, length: int) -> Cost:
        """The sum of the costs of the branches."""
        return functools.reduce(operator.add, (mixer.cost(length) for mixer in self.branches.values()))


MixerConfig = (
    AttentionConfig
    | ConvConfig
    | DeltaConfig
    | LatentConfig
    | LightningConfig
    | LshConfig
    | MambaConfig
    | Mamba2Config
    | ParallelConfig
    | RgLruConfig
)
# The config and the module of each value of `kind`.
MIXERS: dict[str, tuple[type[Any], type[Any]]] = {
    "attention": (AttentionConfig, Attention),
    "conv": (ConvConfig, Conv),
    "delta": (DeltaConfig, Delta),
    "latent": (LatentConfig, Latent),
    "lightning": (LightningConfig, Lightning),
    "lsh": (LshConfig, Lsh),
    "mamba": (MambaConfig, Mamba),
    "mamba2": (Mamba2Config, Mamba2),
    "parallel": (ParallelConfig, Parallel),
    "rglru": (RgLruConfig, RgLru),
}


def make_mixer(config: MixerConfig, stream: Stream, rngs: nnx.Rngs) -> Mixer:
    """Builds the mixer that `config` describes."""
    module = next(module for kind, module in MIXERS.values() if isinstance(config, kind))
    return module(config, stream, rngs)
