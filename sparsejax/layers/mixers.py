"""The mixers by name, and several of them side by side.

A new mixer is one file and one line here. Each has __call__, init_cache, step and cost; its config has `sees`, the
pattern of what a position takes from the others.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.conv import Conv, ConvConfig
from sparsejax.layers.delta import Delta, DeltaConfig
from sparsejax.layers.latent import Latent, LatentConfig
from sparsejax.layers.lightning import Lightning, LightningConfig
from sparsejax.layers.lsh import Lsh, LshConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mamba2 import Mamba2, Mamba2Config
from sparsejax.layers.rglru import RgLru, RgLruConfig
from sparsejax.layers.stream import EMPTY, Context, Cost, Stream


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """One of several parallel mixers, with factors on what it reads and what it gives."""

    mixer: MixerConfig
    scale_in: float = 1.0
    scale_out: float = 1.0


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Mixers that read the same input and whose outputs are added, as in Falcon-H1 (arXiv:2507.22448)."""

    branches: dict[str, BranchConfig]

    def __post_init__(self):
        if not self.branches:
            raise ValueError("branches: needs at least one")

    @property
    def summary(self) -> str:
        """Kinds and sizes, in a few words."""
        return " + ".join(branch.mixer.summary for branch in self.branches.values())

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others, by any branch."""
        return functools.reduce(operator.or_, (branch.mixer.connectivity for branch in self.branches.values()))


class Parallel(nnx.Module):
    """The sum of its branches."""

    def __init__(self, config: ParallelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict(
            {name: make_mixer(branch.mixer, stream, rngs) for name, branch in config.branches.items()}
        )

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return sum(
            branch.scale_out * self.branches[name](branch.scale_in * x, context)
            for name, branch in self.config.branches.items()
        )

    def init_cache(self, batch: int, length: int) -> dict[str, dict[str, Array]]:
        """The cache of each branch."""
        return {name: mixer.init_cache(batch, length) for name, mixer in self.branches.items()}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, dict[str, Array]],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, dict[str, Array]]]:
        """Mixes one more token, at `position` of at most `length`."""
        total, after = 0.0, {}
        for name, branch in self.config.branches.items():
            y, after[name] = self.branches[name].step(branch.scale_in * x, cache[name], position, length, context)
            total = total + branch.scale_out * y
        return total, after

    def cost(self, length: int) -> Cost:
        """The sum of the branches' costs."""
        return functools.reduce(operator.add, (mixer.cost(length) for mixer in self.branches.values()))


MIXERS = {
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
MixerConfig = functools.reduce(operator.or_, (config for config, _ in MIXERS.values()))


def make_mixer(config: MixerConfig, stream: Stream, rngs: nnx.Rngs) -> nnx.Module:
    """The module that `config` describes."""
    module = next(module for kind, module in MIXERS.values() if isinstance(config, kind))
    return module(config, stream, rngs)
