"""Multi-head latent attention, and the indexer that selects its keys."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale
from sparsejax.ops import IMPLEMENTATIONS, attend, decode_attend, attend_selected, index_scores, select_keys, top_keys


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek-V3.2-Exp: each query attends only to the `top_k` keys that score best.

    All heads of the attention share the choice. It gets no gradient from it; of equal scores the lower position wins.
    """

    heads: int
    width: int  # of an index query or key; the first `rope_width` numbers turn, as halves
    top_k: int
    norm_eps: float = 1e-6  # of the LayerNorm on keys

    def __post_init__(self):
        if min(self.heads, self.width, self.top_k) < 1:
            raise ValueError("heads, width and top_k must be at least 1")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Attention with keys and values that are expanded from one latent for each token, which is all that is cached.

    A head's query and key are `nope_width` numbers of its own without position, and `rope_width` with; the latter part
    of the key is the same for all heads.
    """

    pattern: str  # text form, see sparsejax.patterns
    heads: int
    query_rank: int | None  # queries come from a latent of their own; None: from the stream
    kv_rank: int  # width of the latent
    nope_width: int
    rope_width: int
    value_width: int
    rope: RopeConfig | None  # None: no part of the key turns
    norm_eps: float  # of the RMSNorms on the latents
    impl: str  # of attend
    scale: float | None = None  # of the scores; (nope_width + rope_width) ** -0.5 if None
    bias: bool = False  # on the maps to latents, and the last one
    indexer: IndexerConfig | None = None

    def __post_init__(self):
        sizes = self.heads, self.kv_rank, self.nope_width, self.rope_width, self.value_width
        if min(sizes) < 1 or (self.query_rank is not None and self.query_rank < 1):
            raise ValueError("heads, ranks and widths must be at least 1")
        if self.rope is not None:
            self.rope.width(self.rope_width)
        impls = ["auto", *(one.name for one in IMPLEMENTATIONS)]
        if self.impl not in impls:
            raise ValueError(f"impl must be one of {', '.join(impls)}, got {self.impl!r}")
        pattern = patterns.parse(self.pattern)
        if pattern.heads not in (None, self.heads):
            raise ValueError(f"pattern is for {pattern.heads} heads, heads = {self.heads}: {self.pattern!r}")
        if self.indexer is not None:
            if pattern != patterns.Causal():
                raise ValueError(f"an indexer selects from all keys so far, pattern is {self.pattern!r}")
            if self.query_rank is None:
                raise ValueError("an indexer reads the queries' latent, query_rank is None")
            if self.indexer.width < self.rope_width:
                raise ValueError(f"indexer.width = {self.indexer.width} is below rope_width = {self.rope_width}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        chosen = "" if self.indexer is None else f", top {self.indexer.top_k}"
        return f"latent attention {self.heads} x {self.nope_width + self.rope_width}, rank {self.kv_rank}{chosen}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others; with an indexer, at most."""
        return patterns.parse(self.pattern)


class Latent(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    def __init__(self, config: LatentConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        self.pattern = patterns.parse(config.pattern)
        m, h, q, r = stream.width, config.heads, config.query_rank, config.kv_rank
        d, p, e = config.nope_width, config.rope_width, config.value_width

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None], **options) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs, **options)

        def norm(width: int) -> Norm:
            return Norm(NormConfig("rms", config.norm_eps), width, rngs, axis=None)

        self.query_latent = None if q is None else linear(m, q, ("width", None), bias=config.bias)
        self.query_norm = None if q is None else norm(q)
        self.query = linear(q or m, h * (d + p), ("width" if q is None else None, "heads"))
        self.latent, self.latent_norm = linear(m, r + p, ("width", None), bias=config.bias), norm(r)
        self.expand = linear(r, h * (d + e), (None, "heads"))
        self.out = linear(h * e, m, ("heads", "width"), bias=config.bias, scale=output_scale(stream))
        self.indexer = None if config.indexer is None else Indexer(config, stream, rngs)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence.

        Raises:
          ValueError: `context.globals`, which this attention does not have.
        """
        if context.globals is not None:
            raise ValueError("latent attention has no global tokens at run time")
        (b, t, _), config, places = x.shape, self.config, jnp.arange(x.shape[1])
        shown, q = self._query(x, places)
        latent, turned = self._compress(x, places)
        own, v = jnp.split(self.expand(latent).reshape(b, t, config.heads, -1), [config.nope_width], axis=-1)
        k = jnp.concatenate([own, jnp.broadcast_to(turned[:, :, None], (*own.shape[:3], turned.shape[-1]))], axis=-1)
        if self.indexer is None:
            segments = context.attend_segments
            y = attend(q, k, v, self.pattern, impl=config.impl, scale=self._scale, segment_ids=segments)
        else:
            index = *self.indexer.query_and_weights(x, shown, places), self.indexer.key(x, places)
            keys = select_keys(*index, config.indexer.top_k, self.pattern, context.attend_segments)
            y = attend_selected(q, k, v, keys, self._scale)
        return self.out(y.reshape(b, t, -1))

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """An empty cache for `length` positions: latents, the keys' turned part, index keys, and where each is from."""
        _, slots = patterns.cache_slots(self.pattern, length)
        widths = {"latent": self.config.kv_rank, "turned": self.config.rope_width}
        widths |= {} if self.indexer is None else {"index": self.config.indexer.width}
        held = {name: jnp.zeros((batch, slots, width), self.out.dtype) for name, width in widths.items()}
        return held | {"at": jnp.full(slots, -1, jnp.int32)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token, at `position` of at most `length`.

        Nothing is expanded: a head's query is mapped to the latent space, and what it gathers there to its value.
        """
        config, here, x = self.config, position[None], x[:, None]
        table, _ = patterns.cache_slots(self.pattern, length)
        slot = jnp.asarray(table)[position]
        shown, q = self._query(x, here)
        more = dict(zip(("latent", "turned"), self._compress(x, here), strict=True))
        more |= {} if self.indexer is None else {"index": self.indexer.key(x, here)}
        cache = {name: cache[name].at[:, slot].set(new[:, 0]) for name, new in more.items()} | {
            "at": cache["at"].at[slot].set(position)
        }
        mask = jnp.atleast_2d(self.pattern.allows(here, cache["at"], length, length) & (cache["at"] >= 0))
        held = jnp.concatenate([cache["latent"], cache["turned"]], axis=-1)
        if self.indexer is not None:
            scores = index_scores(*self.indexer.query_and_weights(x, shown, here), cache["index"])
            keys = top_keys(scores[:, 0], mask, config.indexer.top_k)
            # All rows are at the same position, so they have equally many keys.
            held, mask = jnp.take_along_axis(held, keys[..., None], axis=1), keys[:1] >= 0
        maps = self.expand.weight[...].astype(x.dtype).reshape(config.kv_rank, config.heads, -1)
        to_keys, to_values = jnp.split(maps, [config.nope_width], axis=-1)
        own, turned = jnp.split(q[:, 0], [config.nope_width], axis=-1)
        q = jnp.concatenate([jnp.einsum("bhd,rhd->bhr", own, to_keys), turned], axis=-1)
        held = held[:, :, None]
        y = decode_attend(q, held, held[..., : config.kv_rank], mask, scale=self._scale)
        return self.out(jnp.einsum("bhr,rhe->bhe", y, to_values).reshape(len(x), -1)), cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, those of the indexer too, tiles, and forward FLOPs for each token when nothing is absorbed."""
        config, indexer = self.config, self.config.indexer
        alike = config.heads if self.pattern.heads is None else 1
        every, (live, tiles) = self.pattern.pairs(length), self.pattern.tiles(length)
        pairs, index = alike * every, 0
        parts = [self.query_latent, self.query, self.latent, self.expand, self.out]
        if indexer is not None:
            kept = min(indexer.top_k, length)  # the first queries have fewer keys
            pairs, index = config.heads * (kept * length - kept * (kept - 1) // 2), indexer.heads * every
            parts += [self.indexer.queries, self.indexer.keys, self.indexer.weights]
        flops = 2.0 * pairs * (config.nope_width + config.rope_width + config.value_width)
        flops += 2.0 * index * indexer.width if indexer is not None else 0.0
        linear = sum(part.flops for part in parts if part is not None)
        return Cost(pairs + index, linear + flops / length, (alike * live, alike * tiles))

    @property
    def _scale(self) -> float:
        width = self.config.nope_width + self.config.rope_width
        return width**-0.5 if self.config.scale is None else self.config.scale

    def _query(self, x: Array, at: Array) -> tuple[Array, Array]:
        """What the indexer is shown [b, t, q], and queries [b, t, h, d]."""
        shown = x if self.query_latent is None else self.query_norm(self.query_latent(x))
        q = self.query(shown).reshape(*x.shape[:2], self.config.heads, -1)
        own, turned = jnp.split(q, [self.config.nope_width], axis=-1)
        return shown, jnp.concatenate([own, _turn(turned, at, self.config.rope)], axis=-1)

    def _compress(self, x: Array, at: Array) -> tuple[Array, Array]:
        """The latent [b, t, r] and the part of the key that turns [b, t, p]."""
        latent, turned = jnp.split(self.latent(x), [self.config.kv_rank], axis=-1)
        return self.latent_norm(latent), _turn(turned[:, :, None], at, self.config.rope)[:, :, 0]


class Indexer(nnx.Module):
    """What keys are selected by; see `IndexerConfig`."""

    def __init__(self, config: LatentConfig, stream: Stream, rngs: nnx.Rngs):
        indexer, m = config.indexer, stream.width
        self.heads, self.turning = indexer.heads, config.rope_width
        self.rope = None if config.rope is None else dataclasses.replace(config.rope, interleaved=False)

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs)

        self.queries = linear(config.query_rank, indexer.heads * indexer.width, (None, "heads"))
        self.keys = linear(m, indexer.width, ("width", None))
        self.key_norm = Norm(NormConfig("layer", indexer.norm_eps), indexer.width, rngs, axis=None)
        self.weights = linear(m, indexer.heads, ("width", None))

    def query_and_weights(
        self, x: Float[Array, "b t m"], latent: Float[Array, "b t q"], at: Int[Array, " t"]
    ) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
        """Index queries of the queries' latent, and the weights of heads."""
        q = self.queries(latent).reshape(*x.shape[:2], self.heads, -1)
        return self._place(q, at), self.weights(x) * self.heads**-0.5

    def key(self, x: Float[Array, "b t m"], at: Int[Array, " t"]) -> Float[Array, "b t d"]:
        """Index keys."""
        return self._place(self.key_norm(self.keys(x))[:, :, None], at)[:, :, 0]

    def _place(self, x: Array, at: Array) -> Array:
        turned, rest = jnp.split(x, [self.turning], axis=-1)
        return jnp.concatenate([_turn(turned, at, self.rope), rest], axis=-1)


def _turn(x: Array, at: Array, rope: RopeConfig | None) -> Array:
    return x if rope is None else rotate(x, at, rope)
