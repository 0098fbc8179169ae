"""LSH attention (Reformer, arXiv:2001.04451): tokens attend among those that hash alike."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale
from sparsejax.ops import attend_hashed, decode_attend_hashed, hash_buckets


@dataclasses.dataclass(frozen=True)
class LshConfig:
    """Attention in `hashes` rounds, each among chunks of tokens that are sorted by bucket.

    A causal one is not strictly causal: no value of a later token is seen, but it can move the borders of the chunks
    in which earlier tokens find their keys.
    """

    heads: int
    head_width: int
    chunk: int  # tokens
    buckets: tuple[int, ...]  # how many; several factors are hashed one by one
    hashes: int
    causal: bool
    seed: int  # of the rotations; layers of one seed and shape have the same
    before: int = 1  # chunks before its own that a token looks at
    after: int = 0

    def __post_init__(self):
        if min(self.heads, self.head_width, self.chunk, self.hashes) < 1 or min(self.before, self.after) < 0:
            raise ValueError("heads, head_width, chunk and hashes must be at least 1, before and after at least 0")
        if not self.buckets or min(self.buckets) < 2 or any(count % 2 for count in self.buckets):
            raise ValueError(f"buckets must be even numbers, got {self.buckets}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"LSH attention {self.heads} x {self.head_width}, {self.hashes} rounds of chunks of {self.chunk}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position can take from the others, whatever the hashes."""
        return patterns.Causal() if self.causal else patterns.Full()


class Lsh(nnx.Module):
    """Attention with locality-sensitive hashing; queries are keys too."""

    def __init__(self, config: LshConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, inner = stream.width, config.heads * config.head_width
        axes = ("width", "heads")
        self.query_key = Linear(m, inner, axes, dtype=stream.dtype, rngs=rngs)
        self.value = Linear(m, inner, axes, dtype=stream.dtype, rngs=rngs)
        self.out = Linear(inner, m, axes[::-1], dtype=stream.dtype, rngs=rngs, scale=output_scale(stream))

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence.

        Raises:
          ValueError: `context.globals`, which this attention does not have, or rotations of another shape.
        """
        if context.globals is not None:
            raise ValueError("LSH attention has no global tokens at run time")
        qk, v = self._project(x)
        y = attend_hashed(
            qk,
            v,
            self._hash(qk, context),
            chunk=self.config.chunk,
            before=self.config.before,
            after=self.config.after,
            causal=self.config.causal,
            segments=context.segments,
            mask=context.mask,
        )
        return self.out(y.reshape(*x.shape[:-1], -1))

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """An empty cache for `length` positions: none can be forgotten, since any bucket may come again."""
        config, dtype = self.config, self.out.dtype
        shape = (batch, length, config.heads, config.head_width)
        buckets = jnp.zeros((batch, config.heads, config.hashes, length), jnp.int32)
        return {"qk": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "buckets": buckets}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token: what a call over the tokens so far gives the last one.

        A call over more tokens can give it something else, see `LshConfig`. All positions are sorted in every step.
        """
        qk, v = self._project(x[:, None])
        cache = {
            "qk": cache["qk"].at[:, position].set(qk[:, 0]),
            "v": cache["v"].at[:, position].set(v[:, 0]),
            "buckets": cache["buckets"].at[..., position].set(self._hash(qk, context)[..., 0]),
        }
        sizes = {"chunk": self.config.chunk, "before": self.config.before, "after": self.config.after}
        y = decode_attend_hashed(cache["qk"], cache["v"], cache["buckets"], position, **sizes)
        return self.out(y.reshape(len(x), -1)), cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, masked ones too, and forward FLOPs for each token, without the sort."""
        config = self.config
        rows = config.hashes * -(-length // config.chunk) * config.chunk
        pairs = config.heads * rows * config.chunk * (config.before + 1 + config.after)
        linear = self.query_key.flops + self.value.flops + self.out.flops
        hashing = 2.0 * config.heads * config.hashes * config.head_width * (sum(config.buckets) // 2)
        return Cost(pairs, linear + hashing + 4.0 * config.head_width * pairs / length)

    def _project(self, x: Array) -> tuple[Array, Array]:
        return tuple(part(x).reshape(*x.shape[:2], self.config.heads, -1) for part in (self.query_key, self.value))

    def _hash(self, qk: Array, context: Context) -> Array:
        config, rotations = self.config, context.rotations
        shape = config.heads, config.head_width, config.hashes, sum(config.buckets) // 2
        if rotations is None:
            rotations = jax.random.normal(jax.random.key(config.seed), shape)
        elif rotations.shape != shape:
            raise ValueError(f"rotations must be {list(shape)}, got {list(rotations.shape)}")
        return hash_buckets(qk, rotations, config.buckets)
