"""The attention mixer: grouped queries, rotary positions, any pattern."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.rotary import rotate
from sparsejax.layers.stream import NOTHING, Context, Cost, Linear, Stream, output_scale
from sparsejax.ops import IMPLEMENTATIONS, attend, attend_one, count_bonus


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """An attention mixer; every head reads `head_width` numbers of each token."""

    pattern: str  # text form, see sparsejax.patterns
    heads: int
    kv_heads: int
    head_width: int
    rope_base: float | None  # None: no positions
    qk_norm: NormConfig  # over each head's queries and keys, before the rotation
    impl: str  # of attend

    def __post_init__(self):
        if min(self.heads, self.kv_heads, self.head_width) < 1:
            raise ValueError("heads, kv_heads and head_width must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.rope_base is not None and (self.head_width % 2 or self.rope_base <= 1):
            raise ValueError("rotary positions need an even head_width and rope_base > 1")
        impls = ["auto", *(one.name for one in IMPLEMENTATIONS)]
        if self.impl not in impls:
            raise ValueError(f"impl must be one of {', '.join(impls)}, got {self.impl!r}")
        pattern = patterns.parse(self.pattern)
        if pattern.heads not in (None, self.heads):
            raise ValueError(f"pattern is for {pattern.heads} heads, heads = {self.heads}: {self.pattern!r}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"attention {self.heads}/{self.kv_heads} x {self.head_width}"

    @property
    def sees(self) -> patterns.Pattern:
        """What a position takes from the others."""
        return patterns.parse(self.pattern)


class Attention(nnx.Module):
    """Softmax attention (arXiv:1706.03762) under a pattern."""

    def __init__(self, config: AttentionConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.pattern = patterns.parse(config.pattern)
        d, dtype = config.head_width, stream.dtype
        m, h, g = stream.width, config.heads * d, config.kv_heads * d
        self.query = Linear(m, h, ("width", "heads"), dtype=dtype, rngs=rngs)
        self.key = Linear(m, g, ("width", "heads"), dtype=dtype, rngs=rngs)
        self.value = Linear(m, g, ("width", "heads"), dtype=dtype, rngs=rngs)
        self.out = Linear(h, m, ("heads", "width"), dtype=dtype, rngs=rngs, scale=output_scale(stream))
        self.query_norm = Norm(config.qk_norm, d, rngs, axis=None)
        self.key_norm = Norm(config.qk_norm, d, rngs, axis=None)

    def __call__(self, x: Float[Array, "b t m"], context: Context = NOTHING) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        q, k, v = self._project(x, jnp.arange(x.shape[1]))
        y = attend(q, k, v, self.pattern, impl=self.config.impl, segment_ids=context.attend_segments)
        return self.out(y.reshape(*x.shape[:2], -1))

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """An empty cache for `length` positions: as many slots as the pattern needs, see `cache_slots`."""
        _, slots = patterns.cache_slots(self.pattern, length)
        shape = (batch, slots, self.config.kv_heads, self.config.head_width)
        dtype = self.key.dtype
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "at": jnp.full(slots, -1, jnp.int32)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = NOTHING,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token, at `position` of at most `length`."""
        table, _ = patterns.cache_slots(self.pattern, length)
        q, k, v = self._project(x[:, None], position[None])
        slot = jnp.asarray(table)[position]
        cache = {
            "k": cache["k"].at[:, slot].set(k[:, 0]),
            "v": cache["v"].at[:, slot].set(v[:, 0]),
            "at": cache["at"].at[slot].set(position),
        }
        held = cache["at"]
        mask = self.pattern.allows(position[None], held, length, length) & (held >= 0)
        bonus = count_bonus(self.pattern, position[None], held, length, length)
        y = attend_one(q[:, 0], cache["k"], cache["v"], jnp.atleast_2d(mask), bonus=jnp.atleast_2d(bonus))
        return self.out(y.reshape(x.shape[0], -1)), cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, tiles, and forward FLOPs for each token at a length; 4 d FLOPs for each pair of a head."""
        alike = self.config.heads if self.pattern.heads is None else 1
        pairs = alike * self.pattern.pairs(length)
        live, every = self.pattern.tiles(length)
        linear = sum(part.flops for part in (self.query, self.key, self.value, self.out))
        return Cost(pairs, linear + 4.0 * self.config.head_width * pairs / length, (alike * live, alike * every))

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        d, base = self.config.head_width, self.config.rope_base
        q, k, v = (part(x).reshape(*x.shape[:2], -1, d) for part in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if base is not None:
            q, k = rotate(q, positions, base), rotate(k, positions, base)
        return q, k, v
