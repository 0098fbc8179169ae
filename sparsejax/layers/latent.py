"""Multi-head latent attention, whose keys an indexer may select."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, argument_path, require_at_least, require_choice
from sparsejax.layers.caching import chunk_positions, extend_keys
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.indexer import IndexerConfig, indexed_cost, make_indexer, reuse_selection
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.protocols import AttendingConfig, Auxiliary, Cache, Mixer, implementation_names, parse_pattern
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, output_scale
from sparsejax.ops import (
    AttentionCall,
    Selection,
    attend,
    attend_cached,
    attend_cached_selection,
)
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.softmax import confine_nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(AttendingConfig):
    """Multi-head latent attention: keys and values are expanded from one latent per token, and only it is cached.

    The query and the key of a head have `nope_width` features without position and `rope_width` with rotary
    positions. All heads share the latter part of the key.
    """

    pattern: str  # text form of the pattern, see `sparsejax.patterns`
    heads: int  # number of heads of queries, keys and values
    query_rank: int | None  # width of the latent of the queries; none: queries come from the stream
    kv_rank: int  # width of the latent of keys and values
    nope_width: int  # features of a head without position
    rope_width: int  # features of a head with rotary positions
    value_width: int  # width of a value
    rope: RopeConfig | None  # rotary positions; none for no rotation
    norm_eps: float  # eps of the RMSNorms on the latents
    impl: str = dataclasses.field(metadata={"resume": "rounding"})  # implementation of `ops.attend`
    scale: float | None = None  # factor on the scores; none for (nope_width + rope_width) ** -0.5
    bias: bool = False  # whether the projections to the latents and the output projection have a bias
    indexer: IndexerConfig | None = None  # selection of keys per query; none for all keys of the pattern

    def __post_init__(self):
        require_at_least(self, 1, "heads", "query_rank", "kv_rank", "nope_width", "rope_width", "value_width")
        if self.rope is not None:
            self.rope.width(self.rope_width)
        require_choice(self, "impl", implementation_names())
        pattern = parse_pattern(self.pattern, self.heads)
        if self.indexer is not None:
            if pattern != patterns.Causal():
                raise InputError("pattern", f"{self.pattern!r} is not 'causal', which the indexer selects from")
            if self.query_rank is None:
                raise InputError("query_rank", "the indexer reads the latent of the queries; set a width")
            if self.indexer.width < self.rope_width:
                raise InputError("indexer.width", f"{self.indexer.width} is below rope_width = {self.rope_width}")
            if self.indexer.scope != "all":
                raise InputError("indexer.scope", f"{self.indexer.scope!r}: all heads share the latent; use 'all'")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        selected = "" if self.indexer is None else f", {self.indexer.summary}"
        return f"latent attention {self.heads} x {self.nope_width + self.rope_width}, rank {self.kv_rank}{selected}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """The pattern, from which an indexer selects."""
        return patterns.parse(self.pattern)

    @property
    def selects(self) -> bool:
        """Whether an indexer selects the keys."""
        return self.indexer is not None and not self.indexer.dense

    @property
    def indexers(self) -> tuple[IndexerConfig, ...]:
        """The indexer, if there is one."""
        return () if self.indexer is None else (self.indexer,)

    def check(self, length: int) -> None:
        """Raises InputError if the pattern or the indexer does not fit `length` tokens."""
        parse_pattern(self.pattern, self.heads, length)
        if self.indexer is not None:
            with argument_path("indexer"):
                self.indexer.check(length, kv_heads=1)


class Latent(Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    def __init__(self, config: LatentConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.pattern = patterns.parse(config.pattern)
        m, h, q, r = stream.width, config.heads, config.query_rank, config.kv_rank
        nope, pe, value = config.nope_width, config.rope_width, config.value_width

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None], **options) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs, **options)

        def norm(width: int) -> Norm:
            return Norm(NormConfig(kind="rms", eps=config.norm_eps), width, rngs, axis=None)

        self.query_latent = None if q is None else linear(m, q, ("width", None), bias=config.bias)
        self.query_norm = None if q is None else norm(q)
        self.query = linear(q or m, h * (nope + pe), ("width" if q is None else None, "heads"))
        self.latent, self.latent_norm = linear(m, r + pe, ("width", None), bias=config.bias), norm(r)
        self.expand = linear(r, h * (nope + value), (None, "heads"))
        self.out = linear(h * value, m, ("heads", "width"), bias=config.bias, scale=output_scale(stream))
        self.indexer = make_indexer(config.indexer, config.rope, config.rope_width, stream, rngs, inputs=q)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self.mix(x, context)[0]

    def mix(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes a whole sequence; returns the loss and the selection of the indexer, if there is one.

        Raises:
          InputError: There are run-time globals, which latent attention does not support.
        """
        if context.extras.globals is not None:
            raise InputError("globals", "latent attention does not support run-time globals")
        (b, t, _), config, tokens, positions = x.shape, self.config, context.tokens, jnp.arange(x.shape[1])
        q_latent, q = self._query(x, positions)
        k, v = self._expand(x, positions)
        auxiliary = Auxiliary({})
        if self.indexer is not None:
            selection, index = self.indexer.choose(x, q_latent, self.pattern, tokens)
            auxiliary = self.indexer.auxiliary(index, selection, q, k, self.pattern, tokens, scale=self._scale)
            selection = auxiliary.selection
        else:
            selection = reuse_selection(context) if config.selects else None
        options = {"impl": config.impl, "scale": self._scale, "segment_ids": tokens.attend_segments}
        y = cast(Array, attend(q, k, v, self.pattern, selection=selection, **options))
        return self.out(y.reshape(b, t, -1)), auxiliary

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection of the indexer."""
        if self.indexer is None:
            return {}
        positions = jnp.arange(x.shape[1])
        q_latent, q = self._query(x, positions)
        k, _ = self._expand(x, positions)
        selection, index = self.indexer.choose(x, q_latent, self.pattern, context.tokens)
        return self.indexer.measure(index, selection, q, k, self.pattern, context.tokens, scale=self._scale)

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the keys that an indexer selected, that of this layer or one before it."""
        if not self.config.selects:
            return {}
        if self.indexer is None:
            return {"": reuse_selection(context)}
        q_latent, _ = self._query(x, jnp.arange(x.shape[1]))
        return {"": self.indexer.choose(x, q_latent, self.pattern, context.tokens)[0]}

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions: latents with rotary keys, and index keys."""
        slots = patterns.plan_cache(self.pattern, length).count
        cache: Cache = {
            "latent": jnp.zeros((batch, slots, self.config.kv_rank + self.config.rope_width), self.out.dtype)
        }
        if self.indexer is not None and self.config.selects:
            cache["index"] = self.indexer.init_cache(batch, slots)
        return cache

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        return self.advance(x, cache, positions, length, context)[:2]

    def advance(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache, Selection | None]:
        """Mixes the next tokens; returns the selection of the indexer, if there is one.

        Nothing is expanded: the query of a head is mapped to the latent space, and the attended latent to its value.
        """
        config, at = self.config, chunk_positions(positions, x.shape[1])
        q_latent, q = self._query(x, at)
        latent, k_pe = self._compress(x, at)
        _, k_pe, latent = confine_nan(k_pe, k_pe, latent)
        entries, plan = {"latent": jnp.concatenate([latent, k_pe], axis=-1)}, patterns.plan_cache(self.pattern, length)
        after, keys, keys_at = extend_keys(plan, cache, entries, positions, context.tokens, axis=1)
        maps = self.expand.weight[...].astype(x.dtype).reshape(config.kv_rank, config.heads, -1)
        to_keys, to_values = jnp.split(maps, [config.nope_width], axis=-1)
        q_nope, q_pe = jnp.split(q, [config.nope_width], axis=-1)
        q, k = jnp.concatenate([jnp.einsum("bchd,rhd->bchr", q_nope, to_keys), q_pe], axis=-1), keys["latent"]
        selected = None
        if self.indexer is not None and config.selects:
            arguments = (at, keys_at), length, self.pattern, context.tokens
            selected, after["index"] = self.indexer.extend(x, q_latent, cache["index"], *arguments)
        if not config.selects:
            k = k[:, None]  # the rotary part of the values is not used
            y = attend_cached(q, k, k, self.pattern, at, keys_at, length, scale=self._scale)
        else:
            k = k[:, :, None]
            selection = reuse_selection(context) if selected is None else selected
            v, queries = k[..., : config.kv_rank], (self.pattern, at, keys_at, length)
            y = attend_cached_selection(q, k, v, selection, *queries, scale=self._scale)
        y = jnp.einsum("bchr,rhe->bche", y[..., : config.kv_rank], to_values)
        return self.out(y.reshape(*x.shape[:2], -1)), after, selected

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention over expanded keys, with the keys that the indexer selects."""
        positions, segments = jnp.arange(x.shape[1]), context.tokens.attend_segments
        arrays = self._query(x, positions)[1], *self._expand(x, positions)
        call = AttentionCall(*arrays, self.pattern, self._scale, None, None, segments, None)
        return {"": call} | {path: selected_call(call, keys) for path, keys in self.selections(x, context).items()}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the indexer, and attention over expanded keys and values."""
        config, score_width = self.config, self.config.nope_width + self.config.rope_width
        projections = (self.query_latent, self.query, self.latent, self.expand, self.out)
        linear = Cost(0, sum(projection.flops for projection in projections if projection is not None))
        sizes = {"heads": config.heads, "score_width": score_width, "value_width": config.value_width}
        attention = attention_cost(self.pattern, length, **sizes)
        if config.indexer is not None:
            attention = indexed_cost(config.indexer, self.indexer, attention, length, **sizes)
        return linear + attention

    @property
    def _scale(self) -> float:
        width = self.config.nope_width + self.config.rope_width
        return width**-0.5 if self.config.scale is None else self.config.scale

    def _query(self, x: Array, positions: Array) -> tuple[Array, Array]:
        """The latent of the queries [b, t, r], and queries [b, t, h, d]."""
        latent = x
        if self.query_latent is not None and self.query_norm is not None:
            latent = self.query_norm(self.query_latent(x))
        q = self.query(latent).reshape(*x.shape[:2], self.config.heads, -1)
        q_nope, q_pe = jnp.split(q, [self.config.nope_width], axis=-1)
        return latent, jnp.concatenate([q_nope, _rotate(q_pe, positions, self.config.rope)], axis=-1)

    def _expand(self, x: Array, positions: Array) -> tuple[Array, Array]:
        """Keys and values of each head [b, t, h, d]."""
        latent, k_pe = self._compress(x, positions)
        expanded = self.expand(latent).reshape(*x.shape[:2], self.config.heads, -1)
        k_nope, v = jnp.split(expanded, [self.config.nope_width], axis=-1)
        k_pe = jnp.broadcast_to(k_pe[:, :, None], (*k_nope.shape[:3], k_pe.shape[-1]))
        return jnp.concatenate([k_nope, k_pe], axis=-1), v

    def _compress(self, x: Array, positions: Array) -> tuple[Array, Array]:
        """The latent of keys and values [b, t, r], and the rotary part of the key [b, t, d]."""
        latent, k_pe = jnp.split(self.latent(x), [self.config.kv_rank], axis=-1)
        return self.latent_norm(latent), _rotate(k_pe[:, :, None], positions, self.config.rope)[:, :, 0]


def _rotate(x: Array, positions: Array, rope: RopeConfig | None) -> Array:
    return x if rope is None else rotate(x, positions, rope)
