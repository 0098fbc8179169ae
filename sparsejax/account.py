"""What a pattern or a model costs over a sequence, before it runs: derived from the patterns, never measured."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from flax import nnx

from sparsejax.config import ModelConfig
from sparsejax.layers import Experts, Layer
from sparsejax.model import Model
from sparsejax.patterns import Pattern, cache_slots

TRAINING = 3  # a backward pass multiplies twice where the forward pass multiplies once (arXiv:2001.08361)
FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Account:
    """The cost of a part of a model over one sequence of `length` tokens; parts add up."""

    length: int
    parameters: int = 0
    active_parameters: int = 0  # those that serve one token: all but the experts that it did not choose
    pairs: int = 0  # (query, key) pairs scored, all heads
    flops: float = 0.0  # forward, for each token, averaged over the sequence
    cache_bytes: int = 0  # to decode the sequence: what each sequence of a batch takes
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
    """The account of each layer of the schedule, and that of the rest: embedding, last norm and head.

    Built as shapes only, one layer of each name, so that a model of any size takes seconds. Embedding and head are
    active; some reports count without them, or without the embedding, of which a token reads one row.
    """
    kinds = tuple(dict.fromkeys(config.names))
    one_of_each = dataclasses.replace(config, schedule=" ".join(kinds), scan=False)
    model = nnx.eval_shape(lambda: Model(one_of_each, nnx.Rngs(0)))
    accounts = {name: _account_layer(layer, length) for name, layer in zip(kinds, model.before, strict=True)}
    outside = _count_parameters(model) - sum(account.parameters for account in accounts.values())
    rest = Account(length, parameters=outside, active_parameters=outside, flops=2.0 * config.width * config.vocab)
    return [accounts[name] for name in config.names], rest


def _account_layer(layer: Layer, length: int) -> Account:
    cost, parameters = layer.cost(length), _count_parameters(layer)
    idle = layer.mlp.parameters - layer.mlp.active_parameters if isinstance(layer.mlp, Experts) else 0
    # What grows with the batch; where a cache's slots came from is the same for all sequences, and not counted.
    one, two = (_count_bytes(jax.eval_shape(functools.partial(layer.init_cache, batch, length))) for batch in (1, 2))
    return Account(length, parameters, parameters - idle, cost.pairs, cost.flops, two - one, *cost.tiles)


def _count_bytes(cache: dict) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _count_parameters(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
