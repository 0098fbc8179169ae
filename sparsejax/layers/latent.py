"""Multi-head latent attention, and the indexer that selects its keys."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.caching import chunk_positions, extend_keys
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig, implementation_names, parse_pattern
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, output_scale
from sparsejax.ops import AttentionCall, Selection, attend, attend_cached, attention_flops, select_indexed
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.softmax import confine_nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek-V3.2-Exp: a query attends only to the `top_k` keys with the highest scores.

    All heads of the attention share the selection. Gradients do not flow through it; ties go to the lower position.
    """

    heads: int  # number of index query heads
    width: int  # width of an index query or key, whose first rope_width features are rotated as halves
    top_k: int  # number of selected keys per query
    norm_eps: float = 1e-6  # eps of the LayerNorm on keys

    def __post_init__(self):
        require_at_least(self, 1, "heads", "width", "top_k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(MixerConfig):
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

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        selected = "" if self.indexer is None else f", top {self.indexer.top_k}"
        return f"latent attention {self.heads} x {self.nope_width + self.rope_width}, rank {self.kv_rank}{selected}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """The pattern, from which an indexer selects."""
        return patterns.parse(self.pattern)

    @property
    def selects(self) -> bool:
        """Whether there is an indexer."""
        return self.indexer is not None

    def check(self, length: int) -> None:
        """Raises InputError if the pattern does not fit `length` tokens."""
        parse_pattern(self.pattern, self.heads, length)


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
        self.indexer = None if config.indexer is None else Indexer(config, config.indexer, stream, rngs)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence.

        Raises:
          InputError: There are run-time globals, which latent attention does not support.
        """
        if context.extras.globals is not None:
            raise InputError("globals", "latent attention does not support run-time globals")
        (b, t, _), config, positions = x.shape, self.config, jnp.arange(x.shape[1])
        q_latent, q = self._query(x, positions)
        (k, v), segments = self._expand(x, positions), context.tokens.attend_segments
        options = {"impl": config.impl, "scale": self._scale, "segment_ids": segments}
        y = cast(Array, attend(q, k, v, self.pattern, selection=self._select(x, q_latent, context), **options))
        return self.out(y.reshape(b, t, -1))

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions: latents with rotary keys, and index keys."""
        slots = patterns.plan_cache(self.pattern, length).count
        widths = {"latent": self.config.kv_rank + self.config.rope_width}
        widths |= {} if self.indexer is None else {"index": self.indexer.width}
        return {name: jnp.zeros((batch, slots, width), self.out.dtype) for name, width in widths.items()}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens.

        Nothing is expanded: the query of a head is mapped to the latent space, and the attended latent to its value.
        """
        config, at = self.config, chunk_positions(positions, x.shape[1])
        q_latent, q = self._query(x, at)
        latent, k_pe = self._compress(x, at)
        _, k_pe, latent = confine_nan(k_pe, k_pe, latent)
        entries = {"latent": jnp.concatenate([latent, k_pe], axis=-1)}
        entries |= {} if self.indexer is None else {"index": self.indexer.key(x, at)}
        plan = patterns.plan_cache(self.pattern, length)
        cache, keys, keys_at = extend_keys(plan, cache, entries, positions, context.tokens, axis=1)
        maps = self.expand.weight[...].astype(x.dtype).reshape(config.kv_rank, config.heads, -1)
        to_keys, to_values = jnp.split(maps, [config.nope_width], axis=-1)
        q_nope, q_pe = jnp.split(q, [config.nope_width], axis=-1)
        q, k = jnp.concatenate([jnp.einsum("bchd,rhd->bchr", q_nope, to_keys), q_pe], axis=-1), keys["latent"]
        if self.indexer is None:
            k = k[:, None]  # the rotary part of the values is not used
            y = attend_cached(q, k, k, self.pattern, at, keys_at, length, scale=self._scale)
        else:
            index = *self.indexer.query_and_weights(x, q_latent, at), keys["index"]
            options = {"positions": (at, keys_at), "length": length}
            selection = select_indexed(*index, self.indexer.top_k, self.pattern, **options)
            k = k[:, :, None]
            options = {"selection": selection, "scale": self._scale, "impl": "segment"}
            y = cast(Array, attend(q, k, k[..., : config.kv_rank], patterns.Full(), **options))
        y = jnp.einsum("bchr,rhe->bche", y[..., : config.kv_rank], to_values)
        return self.out(y.reshape(*x.shape[:2], -1)), cache

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention over expanded keys, with the keys that the indexer selects."""
        positions, segments = jnp.arange(x.shape[1]), context.tokens.attend_segments
        q_latent, q = self._query(x, positions)
        arrays = q, *self._expand(x, positions)
        call = AttentionCall(*arrays, self.pattern, self._scale, None, None, segments, None)
        selection = self._select(x, q_latent, context)
        return {"": call if selection is None else selected_call(call, selection)}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the indexer, and attention over expanded keys and values."""
        config, score_width = self.config, self.config.nope_width + self.config.rope_width
        projections = (self.query_latent, self.query, self.latent, self.expand, self.out)
        linear = Cost(0, sum(projection.flops for projection in projections if projection is not None))
        attention = attention_cost(
            self.pattern, length, heads=config.heads, score_width=score_width, value_width=config.value_width
        )
        if self.indexer is None:
            return linear + attention
        kept = min(self.indexer.top_k, length)  # the first queries have fewer keys
        pairs = config.heads * (kept * length - kept * (kept - 1) // 2)
        flops = attention_flops(pairs, score_width, config.value_width) / length
        return linear + self.indexer.cost(self.pattern, length) + Cost(pairs, flops, attention.tiles)

    def _select(self, x: Array, q_latent: Array, context: Context) -> Selection | None:
        """The keys that the indexer chooses, if there is one."""
        if self.indexer is None:
            return None
        positions = jnp.arange(x.shape[1])
        index = *self.indexer.query_and_weights(x, q_latent, positions), self.indexer.key(x, positions)
        return select_indexed(*index, self.indexer.top_k, self.pattern, segments=context.tokens.attend_segments)

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


class Indexer(nnx.Module):
    """Scores of keys for `IndexerConfig`."""

    def __init__(self, config: LatentConfig, indexer: IndexerConfig, stream: Stream, rngs: nnx.Rngs):
        self.heads, self.width, self.top_k = indexer.heads, indexer.width, indexer.top_k
        self.rope_width = config.rope_width
        self.rope = None if config.rope is None else dataclasses.replace(config.rope, interleaved=False)

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs)

        self.queries = linear(config.query_rank or stream.width, indexer.heads * indexer.width, (None, "heads"))
        self.keys = linear(stream.width, indexer.width, ("width", None))
        norm = NormConfig(kind="layer", eps=indexer.norm_eps)
        self.key_norm = Norm(norm, indexer.width, rngs, axis=None)
        self.weights = linear(stream.width, indexer.heads, ("width", None))

    def query_and_weights(
        self, x: Float[Array, "b t m"], q_latent: Float[Array, "b t r"], positions: Int[Array, "*b t"]
    ) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
        """Returns index queries, and the weights of heads."""
        q = self.queries(q_latent).reshape(*x.shape[:2], self.heads, -1)
        return self._rotate(q, positions), self.weights(x) * self.heads**-0.5

    def key(self, x: Float[Array, "b t m"], positions: Int[Array, "*b t"]) -> Float[Array, "b t d"]:
        """Returns index keys."""
        return self._rotate(self.key_norm(self.keys(x))[:, :, None], positions)[:, :, 0]

    def cost(self, pattern: patterns.Pattern, length: int) -> Cost:
        """Cost of the projections and of scoring every key of the pattern."""
        linear = sum(projection.flops for projection in (self.queries, self.keys, self.weights))
        scores = attention_cost(pattern, length, heads=self.heads, score_width=self.width, value_width=0)
        return Cost(scores.pairs, linear + scores.flops)

    def _rotate(self, x: Array, positions: Array) -> Array:
        pe, nope = jnp.split(x, [self.rope_width], axis=-1)
        return jnp.concatenate([_rotate(pe, positions, self.rope), nope], axis=-1)


def _rotate(x: Array, positions: Array, rope: RopeConfig | None) -> Array:
    return x if rope is None else rotate(x, positions, rope)
