"""What a pattern or a model costs over a sequence, before it runs: derived from the patterns, never measured."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from sparsejax.config import ModelConfig
from sparsejax.layers import Layer
from sparsejax.model import Model
from sparsejax.patterns import Pattern, cache_slots

TRAINING = 3  # a backward pass multiplies twice where the forward pass multiplies once (arXiv:2001.08361)
FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Account:
    """The cost of a part of a model over one sequence of `length` tokens; parts add up."""

    length: int
    parameters: int = 0
    pairs: int = 0  # (query, key) pairs scored, all heads
    flops: float = 0.0  # forward, for each token, averaged over the sequence
    cache_bytes: int = 0  # to decode the sequence
    live_tiles: int = 0  # tiles of 128 x 128 that hold a pair, all heads
    tiles: int = 0  # all tiles, all heads

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward pass for each token; nothing computed twice (no rematerialisation)."""
        return TRAINING * self.flops

    @property
    def sequence_flops(self) -> float:
        """FLOPs of the forward pass over the sequence."""
        return self.length * self.flops

    @property
    def score_bytes(self) -> int:
        """Bytes of the scores if an implementation keeps all of them, in float32."""
        return FLOAT32 * self.pairs

    def __add__(self, other: Account) -> Account:
        if other.length != self.length:
            raise ValueError(f"accounts of {self.length} and {other.length} tokens do not add up")
        names = [field.name for field in dataclasses.fields(self) if field.name != "length"]
        return Account(self.length, **{name: getattr(self, name) + getattr(other, name) for name in names})


def account_pattern(
    pattern: Pattern, length: int, *, heads: int = 1, kv_heads: int = 1, head_width: int = 64
) -> Account:
    """Attention alone, without projections, under a pattern; keys and values cached in float32.

    Args:
      pattern: any pattern; one with heads is for `heads` of them.
      length: tokens of the sequence.
      heads: query heads.
      kv_heads: heads of keys and values.
      head_width: numbers that each head reads of each token.
    """
    alike = heads if pattern.heads is None else 1
    pairs, (live, tiles) = alike * pattern.pairs(length), pattern.tiles(length)
    _, slots = cache_slots(pattern, length)
    return Account(
        length,
        pairs=pairs,
        flops=4.0 * head_width * pairs / max(length, 1),
        cache_bytes=2 * FLOAT32 * slots * kv_heads * head_width,
        live_tiles=alike * live,
        tiles=alike * tiles,
    )


def account_model(config: ModelConfig, length: int) -> tuple[list[Account], Account]:
    """The account of each layer of the schedule, and that of the rest: embedding, last norm and head."""
    # Unrolled, so that every layer of the schedule is a module of its own; built as shapes only.
    model = nnx.eval_shape(lambda: Model(dataclasses.replace(config, scan=False), nnx.Rngs(0)))
    modules = dict(zip(config.names, model.before, strict=True))  # one of each name: its others cost the same
    accounts = {name: _account_layer(layer, length) for name, layer in modules.items()}
    layers = [accounts[name] for name in config.names]
    outside = _count_parameters(model) - sum(layer.parameters for layer in layers)
    return layers, Account(length, parameters=outside, flops=2.0 * config.width * config.vocab)


def _account_layer(layer: Layer, length: int) -> Account:
    cost = layer.cost(length)
    cache = jax.eval_shape(lambda: layer.init_cache(1, length))
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return Account(length, _count_parameters(layer), cost.pairs, cost.flops, held, *cost.tiles)


def _count_parameters(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
