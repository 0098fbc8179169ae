"""The attention mixer: grouped queries, any pattern, and the positions and options of the field."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import IMPLEMENTATIONS, attend, decode_attend, log_multiplicity, add_alibi, merge_lse

ELSEWHERE = -3  # a segment that no query is in


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """An attention mixer; every head reads `head_width` numbers of each token."""

    pattern: str  # text form, see sparsejax.patterns; code may give a Pattern, whose text can be too long
    heads: int
    kv_heads: int
    head_width: int
    rope: RopeConfig | None  # None: no rotary positions
    qk_norm: NormConfig  # over each head's queries and keys, before the rotation
    impl: str  # of attend
    alibi: bool = False  # scores fall with the distance, by a slope for each head (arXiv:2108.12409)
    relative: int | None = None  # sinusoids of Transformer-XL's relative positions (arXiv:1901.02860)
    scale: float | None = None  # of the scores; head_width ** -0.5 if None
    softcap: float | None = None  # bounds scores to softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118)
    sinks: bool = False  # a learned logit for each head that takes a share of the softmax and gives nothing (gpt-oss)
    gate: bool = False  # the output times sigmoid(gate(x)), before the last projection (arXiv:2505.06708)
    bias: bool = False  # on queries, keys, values and gate
    out_bias: bool = False
    global_projections: bool = False  # rows of `Context.globals` have projections of their own (Longformer)

    def __post_init__(self):
        if min(self.heads, self.kv_heads, self.head_width) < 1:
            raise ValueError("heads, kv_heads and head_width must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.rope is not None:
            self.rope.width(self.head_width)
        if self.relative is not None and (self.relative < 2 or self.relative % 2):
            raise ValueError(f"relative: sinusoids come in pairs, got {self.relative}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be above 0, got {self.softcap}")
        impls = ["auto", *(one.name for one in IMPLEMENTATIONS)]
        if self.impl not in impls:
            raise ValueError(f"impl must be one of {', '.join(impls)}, got {self.impl!r}")
        pattern = patterns.parse(self.pattern)
        if pattern.heads not in (None, self.heads):
            raise ValueError(f"pattern is for {pattern.heads} heads, heads = {self.heads}: {self.pattern!r}")
        if self.global_projections and "global" in self.pattern:
            raise ValueError(f"global_projections are for Context.globals alone, not for those of {self.pattern!r}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"attention {self.heads}/{self.kv_heads} x {self.head_width}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others."""
        return patterns.parse(self.pattern)


class Attention(nnx.Module):
    """Softmax attention (arXiv:1706.03762) under a pattern.

    It reads `inputs` numbers of each token, the stream's width if not given, and writes to the stream.
    """

    def __init__(self, config: AttentionConfig, stream: Stream, rngs: nnx.Rngs, inputs: int | None = None):
        self.config = config
        self.pattern = patterns.parse(config.pattern)
        d, dtype = config.head_width, stream.dtype
        m, h, g = inputs or stream.width, config.heads * d, config.kv_heads * d

        def project(outputs: int) -> Linear:
            return Linear(m, outputs, ("width", "heads"), dtype=dtype, rngs=rngs, bias=config.bias)

        self.query, self.key, self.value = project(h), project(g), project(g)
        self.gate = project(h) if config.gate else None
        wide = config.global_projections
        self.query_global = project(h) if wide else None
        self.key_global, self.value_global = (project(g), project(g)) if wide else (None, None)
        axes, start = ("heads", "width"), output_scale(stream)
        self.out = Linear(h, stream.width, axes, dtype=dtype, rngs=rngs, bias=config.out_bias, scale=start)
        self.query_norm = Norm(config.qk_norm, d, rngs, axis=None)
        self.key_norm = Norm(config.qk_norm, d, rngs, axis=None)
        zeros = jax.nn.initializers.zeros
        self.sinks = parameter(rngs, zeros, (config.heads,), (None,)) if config.sinks else None
        self.relative = Relative(config, rngs) if config.relative else None

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence.

        Raises:
          ValueError: `context.globals` under a causal pattern, where a token cannot see all others.
        """
        positions = jnp.arange(x.shape[1])
        q, k, v = self._project(x, positions)
        if context.globals is None:
            y = self._attend(q, k, v, self.pattern, context.attend_segments, positions)
        else:
            y = self._attend_with_globals(x, q, k, v, context)
        return self._finish(x, y)

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
        context: Context = EMPTY,
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
        bonus = jnp.atleast_2d(log_multiplicity(self.pattern, position[None], held, length, length))
        q, k = self._extend(q, cache["k"], position[None], held)
        y = decode_attend(
            q[:, 0],
            k,
            cache["v"],
            jnp.atleast_2d(mask),
            scale=self._scale,
            bonus=add_alibi(bonus, None if self._slopes is None else self._slopes[:, None], position - held),
            softcap=self.config.softcap,
            sink_logits=None if self.sinks is None else self.sinks[...],
        )
        return self._finish(x, y), cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, tiles, and forward FLOPs for each token at a length.

        A pair of a head takes two for each number that is scored, and two for each that is summed.
        """
        alike = self.config.heads if self.pattern.heads is None else 1
        pairs = alike * self.pattern.pairs(length)
        live, every = self.pattern.tiles(length)
        linear = sum(part.flops for part in (self.query, self.key, self.value, self.gate, self.out) if part is not None)
        each = 4.0 * self.config.head_width + 2.0 * (self.config.relative or 0)
        return Cost(pairs, linear + each * pairs / length, (alike * live, alike * every))

    @property
    def _scale(self) -> float:
        return self.config.head_width**-0.5 if self.config.scale is None else self.config.scale

    @property
    def _slopes(self) -> np.ndarray | None:
        return alibi_slopes(self.config.heads) if self.config.alibi else None

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        q, k, v = (self._split_heads(part(x)) for part in (self.query, self.key, self.value))
        return (*self._place(q, k, positions, positions), v)

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_width)

    def _place(self, q: Array, k: Array, q_positions: Array, k_positions: Array) -> tuple[Array, Array]:
        q, k, rope = self.query_norm(q), self.key_norm(k), self.config.rope
        return (q, k) if rope is None else (rotate(q, q_positions, rope), rotate(k, k_positions, rope))

    def _extend(self, q: Array, k: Array, q_positions: Array, k_positions: Array) -> tuple[Array, Array]:
        """Queries and keys with more numbers, whose products are what relative positions add to the scores."""
        if self.relative is None:
            return q, k
        q_more, k_more = self.relative(q, k, q_positions, k_positions)
        q = q + self.relative.content[...].astype(q.dtype)
        return jnp.concatenate([q, q_more], axis=-1), jnp.concatenate([k, k_more], axis=-1)

    def _attend(self, q, k, v, pattern, segments, q_positions, k_positions=None, return_lse=False):
        k_positions = q_positions if k_positions is None else k_positions
        q, k = self._extend(q, k, q_positions, k_positions)
        impl = self.config.impl if pattern is self.pattern else "auto"
        sinks = None if self.sinks is None else self.sinks[...]
        return attend(
            q, k, v, pattern, impl=impl, scale=self._scale, softcap=self.config.softcap, sink_logits=sinks,
            alibi_slopes=self._slopes, segment_ids=segments, return_lse=return_lse,
        )  # fmt: skip

    def _attend_with_globals(self, x: Array, q: Array, k: Array, v: Array, context: Context) -> Array:
        """Every row sees the global keys, once, and the pattern's other keys; global rows see everything.

        Time and memory are those of the pattern and of as many more keys and rows as there are globals.
        """
        if self.pattern.lookahead() == 0 or self.sinks is not None or self.config.alibi or self.relative is not None:
            raise ValueError(
                "global tokens at run time need a pattern that sees ahead, and no sinks, alibi or relative"
            )
        (b, t), places = x.shape[:2], jnp.arange(x.shape[1])
        queries, keys = context.attend_segments or (jnp.zeros((b, t), jnp.int32),) * 2
        real = context.globals >= 0
        at = jnp.where(real, context.globals, t)  # t is outside: written nowhere

        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, jnp.minimum(at, t - 1).reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)

        marked = jnp.zeros((b, t), bool).at[jnp.arange(b)[:, None], at].set(True, mode="drop")
        near = self._attend(
            q, k, v, self.pattern, (queries, jnp.where(marked, ELSEWHERE, keys)), places, return_lse=True
        )
        far_keys = jnp.where(real, pick(keys), ELSEWHERE)
        far = self._attend(q, pick(k), pick(v), patterns.Full(), (queries, far_keys), places, at, return_lse=True)
        y, _ = merge_lse([near, far])
        maps = (self.query_global, self.key_global, self.value_global)
        maps = maps if self.config.global_projections else (self.query, self.key, self.value)
        q, k, v = (self._split_heads(part(rows)) for part, rows in zip(maps, (pick(x), x, x), strict=True))
        q, k = self._place(q, k, jnp.minimum(at, t - 1), places)
        rows = self._attend(q, k, v, patterns.Full(), (pick(queries), keys), at, places)
        return y.at[jnp.arange(b)[:, None], at].set(rows, mode="drop")

    def _finish(self, x: Array, y: Array) -> Array:
        y = y.reshape(*x.shape[:-1], -1)
        return self.out(y if self.gate is None else y * jax.nn.sigmoid(self.gate(x)))


class Relative(nnx.Module):
    """Relative sinusoidal positions (Transformer-XL, arXiv:1901.02860), for any pattern.

    The score of query i and key j is (q + content) · k + (q + position) · W s(i - j). By the addition theorem the
    sinusoids of a difference are products of those of i and j, so the second term is a product of a longer query and a
    longer key.
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        h, d, r = config.heads, config.head_width, config.relative
        zeros = jax.nn.initializers.zeros
        self.content = parameter(rngs, zeros, (h, d), (None, None))
        self.position = parameter(rngs, zeros, (h, d), (None, None))
        self.weight = parameter(rngs, jax.nn.initializers.normal(r**-0.5), (h, r, d), (None, None, None))

    def __call__(
        self, q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], at: Int[Array, " t"], keys_at: Int[Array, " s"]
    ) -> tuple[Float[Array, "b t h r"], Float[Array, "b s g r"]]:
        """What queries and keys are longer by."""
        seen = jnp.einsum("bthd,hrd->bthr", q + self.position[...].astype(q.dtype), self.weight[...].astype(q.dtype))
        a, b = jnp.split(seen, 2, axis=-1)  # weights of sin and of cos of the difference
        sin, cos = (x[:, None].astype(q.dtype) for x in _sinusoids(at, a.shape[-1]))
        turned = jnp.concatenate([b * sin - a * cos, a * sin + b * cos], axis=-1)
        features = jnp.concatenate(_sinusoids(keys_at, a.shape[-1]), axis=-1).astype(k.dtype)
        return turned, jnp.broadcast_to(features[None, :, None], (*k.shape[:3], features.shape[-1]))


def _sinusoids(positions: Array, pairs: int) -> tuple[Array, Array]:
    """Sine and cosine of a position at each frequency, from 1 down to nearly 1 / 10,000 (arXiv:1706.03762)."""
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(pairs) / pairs)
    return jnp.sin(angles), jnp.cos(angles)


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 (h + 1) / H) for H a power of two; else those of the power below, then every other of the power above."""

    def slopes(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    power = 1 << (heads.bit_length() - 1)
    return np.concatenate([slopes(power), slopes(2 * power)[::2][: heads - power]]).astype(np.float32)
