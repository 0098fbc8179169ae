"""LSH attention (Reformer, arXiv:2001.04451): tokens attend to tokens of similar hashes."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, require_at_least
from sparsejax.layers.caching import chunk_positions, write_slots
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale
from sparsejax.ops import (
    AttentionCall,
    Selection,
    attend,
    attend_cached_selection,
    attend_hashed,
    attention_flops,
    decode_attend_hashed,
    hash_buckets,
    hashed_pairs,
)
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.lsh import SELF, count_hashed, decode_select_hashed, normalize_keys, select_hashed
from sparsejax.ops.selection import selection_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LshConfig(MixerConfig):
    """Attention in several rounds, each among chunks of tokens that are sorted by bucket.

    Causal LSH attention is not strictly causal: no query reads the value of a later token, but a later token can move
    the chunk borders that determine which earlier keys a query attends to. With `strict` there are no chunks: a query
    attends to the last tokens of its bucket, as many as it would meet in chunks.
    """

    heads: int  # number of heads of shared queries and keys, and of values
    head_width: int  # width of keys and values per head
    chunk: int  # tokens per chunk
    buckets: tuple[int, ...]  # number of buckets as factors, which are hashed separately; each is even
    hashes: int  # number of rounds of hashing
    causal: bool  # attend to no later key
    seed: int  # seed of the rotations; layers with the same seed and shape share them
    before: int = 1  # chunks before its own chunk that a token attends to
    after: int = 0  # chunks after its own chunk that a token attends to
    strict: bool = False  # attend to the last chunk · (before + 1) tokens of the bucket in each round: strictly causal

    def __post_init__(self):
        require_at_least(self, 1, "heads", "head_width", "chunk", "hashes")
        require_at_least(self, 0, "before", "after")
        if not self.buckets or min(self.buckets) < 2 or any(count % 2 for count in self.buckets):
            raise InputError("buckets", f"{list(self.buckets)} is not a list of positive even numbers")
        if self.strict and (not self.causal or self.after):
            raise InputError("strict", "requires causal = true and after = 0: it reads no later token")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        groups = f"the last {self.members}" if self.strict else f"chunks of {self.chunk}"
        rounds = f"{self.hashes} round{'s' * (self.hashes > 1)}"
        return f"LSH attention {self.heads} x {self.head_width}, {rounds} of {groups}"

    @property
    def members(self) -> int:
        """Tokens that a query attends to in a round of the strictly causal form."""
        return self.chunk * (self.before + 1)

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from under some hashes."""
        return patterns.Causal() if self.causal else patterns.Full()

    @property
    def selects(self) -> bool:
        """Hashes choose the keys."""
        return True

    @property
    def leaks(self) -> str:
        """A later token can move the chunk borders, see the class."""
        if self.strict or not self.causal:
            return ""
        return "later tokens move the chunk borders, which select the keys of earlier tokens"


class Lsh(Mixer):
    """Attention with locality-sensitive hashing; queries are also the keys."""

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
          InputError: There are run-time globals, which LSH attention does not support, or rotations of another shape.
        """
        if context.extras.globals is not None:
            raise InputError("globals", "LSH attention does not support run-time globals")
        qk, v = self._project(x)
        if self.config.strict:
            options = {"scale": 1.0, "segment_ids": context.tokens.attend_segments}
            selection = self._select(qk, context)
            y = cast(Array, attend(qk, normalize_keys(qk), v, patterns.Causal(), selection=selection, **options))
            return self.out(y.reshape(*x.shape[:-1], -1))
        y = attend_hashed(
            qk,
            v,
            self._hash(qk, context),
            **self._sizes,
            causal=self.config.causal,
            segments=context.tokens.segments,
            mask=context.tokens.mask,
        )
        return self.out(y.reshape(*x.shape[:-1], -1))

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache of `length` positions, all of which are kept: any bucket may recur."""
        config, dtype = self.config, self.out.dtype
        shape = (batch, length, config.heads, config.head_width)
        buckets = jnp.zeros((batch, config.heads, config.hashes, length), jnp.int32)
        return {"qk": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "buckets": buckets}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens as a call over the tokens up to the end of the chunk does; sorts all positions.

        A call over more tokens can give a token another output, see `LshConfig`.
        """
        (qk, v), config, at = self._project(x), self.config, chunk_positions(positions, x.shape[1])
        entries = {"qk": (qk, 1), "v": (v, 1), "buckets": (self._hash(qk, context), 3)}
        cache = {
            name: write_slots(cache[name], entry, at, context.tokens, axis) for name, (entry, axis) in entries.items()
        }
        if config.strict:
            keys_at = jnp.broadcast_to(jnp.arange(length), (len(x), length))
            buckets = entries["buckets"][0], cache["buckets"]
            selection = decode_select_hashed(*buckets, config.members, (at, keys_at), length)
            arrays = qk, normalize_keys(cache["qk"]), cache["v"], selection
            y = attend_cached_selection(*arrays, patterns.Causal(), at, keys_at, length, scale=1.0)
            return self.out(y.reshape(*x.shape[:2], -1)), cache
        ends = positions + context.tokens.count(at.shape)
        y = decode_attend_hashed(**cache, positions=jnp.minimum(at, length - 1), ends=ends, **self._sizes)
        return self.out(y.reshape(*x.shape[:2], -1)), cache

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention among the keys that a query meets in its chunks."""
        (qk, v), config, tokens = self._project(x), self.config, context.tokens
        if config.strict:
            segments = tokens.attend_segments
            call = AttentionCall(qk, normalize_keys(qk), v, patterns.Causal(), 1.0, None, None, segments, None)
            return {"": selected_call(call, self._select(qk, context))}
        ids = self._ids(x, tokens)
        buckets, sizes = self._hash(qk, context)[0], self._sizes
        call = AttentionCall(qk, normalize_keys(qk), v, config.connectivity, 1.0, None, None, (ids, ids), None)
        return {"": SelectedCall(call, lambda queries: count_hashed(queries, buckets, ids[0], **sizes), SELF)}

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the keys that a query meets in a round; itself only if it meets no other."""
        qk, _ = self._project(x)
        if self.config.strict:
            return {"": self._select(qk, context)}
        ids, at = self._ids(x, context.tokens), jnp.arange(x.shape[1])
        count = jax.vmap(lambda buckets, ids: count_hashed(at, buckets, ids, **self._sizes))
        same = (ids[:, :, None] == ids[:, None]) & self.config.connectivity.allows(at[:, None], at, len(at), len(at))
        others = (count(self._hash(qk, context), ids) > 0) & (same & (at[:, None] != at))[:, None]
        return {"": selection_of(others | (~others.any(axis=-1, keepdims=True) & (at[:, None] == at)))}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the hashes and the scored pairs, including masked ones; without the sort."""
        config = self.config
        pairs = config.heads * hashed_pairs(length, config.hashes, config.chunk, config.before, config.after)
        if config.strict:  # an upper bound: rounds share keys
            pairs = config.heads * int(np.minimum(np.arange(length) + 1, config.hashes * config.members).sum())
        linear = self.query_key.flops + self.value.flops + self.out.flops
        hashing = 2.0 * config.heads * config.hashes * config.head_width * (sum(config.buckets) // 2)
        flops = linear + hashing + attention_flops(pairs, config.head_width) / length
        return Cost(pairs, flops, index_flops=hashing)

    def _select(self, qk: Array, context: Context) -> Selection:
        """The keys of a whole sequence in the strictly causal form."""
        return select_hashed(self._hash(qk, context), self.config.members, segments=context.tokens.attend_segments)

    def _ids(self, x: Array, tokens: Tokens) -> Int[Array, "b t"]:
        """Segment ids; -1 at padding."""
        ids = jnp.zeros(x.shape[:2], jnp.int32) if tokens.segments is None else tokens.segments
        return ids if tokens.mask is None else jnp.where(tokens.mask, ids, -1)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"chunk": self.config.chunk, "before": self.config.before, "after": self.config.after}

    def _project(self, x: Array) -> tuple[Array, ...]:
        """Queries, which are also the keys, and values."""
        shape = *x.shape[:2], self.config.heads, self.config.head_width
        return tuple(linear(x).reshape(shape) for linear in (self.query_key, self.value))

    def _hash(self, qk: Array, context: Context) -> Array:
        config, rotations = self.config, context.extras.rotations
        shape = config.heads, config.head_width, config.hashes, sum(config.buckets) // 2
        if rotations is None:
            rotations = jax.random.normal(jax.random.key(config.seed), shape)
        elif rotations.shape != shape:
            raise InputError("rotations", f"shape {list(rotations.shape)} is not {list(shape)}")
        return hash_buckets(qk, rotations, config.buckets)
