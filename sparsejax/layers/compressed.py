"""Attention to a window of tokens and to entries that summarize closed windows (DeepSeek-V4)."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.caching import chunk_positions, extend_keys, write_slots
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.indexer import Scorer
from sparsejax.layers.norm import Norm, NormConfig, standardize
from sparsejax.layers.protocols import SELECTED, Auxiliary, Cache, Mixer, MixerConfig, implementation_names
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, output_scale, parameter
from sparsejax.ops import (
    Index,
    Selection,
    attend,
    attend_cached,
    attend_cached_selection,
    attend_entries,
    attention_flops,
    close_windows,
    compress_windows,
    merge_lse,
    select_indexed,
)
from sparsejax.ops.entries import ClosedWindows, cover_tokens
from sparsejax.ops.softmax import confine_nan, zero_nan
from sparsejax.patterns.exchange import plan_exchange


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryIndexerConfig:
    """A query attends only to the `top_k` entries with the highest scores, which all heads share.

    The score is that of `IndexerConfig`, with entries of its own as keys. Gradients do not flow through the selection,
    and the indexer reads the stream without a gradient: it learns from its loss alone, the divergence of its scores
    from the attention to the entries. Ties go to the lower position.
    """

    heads: int  # number of index query heads
    width: int  # width of an index query or entry, whose last rope_width features are rotated
    top_k: int  # number of selected entries per query
    loss_weight: float = 0.0  # weight of the divergence of the scores from the attention; 0: the indexer does not learn
    dense: bool = False  # attend to all entries, which the loss then covers: the warm-up of the indexer

    def __post_init__(self):
        require_at_least(self, 1, "heads", "width", "top_k")
        require_at_least(self, 0, "loss_weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Entries of closed windows of `ratio` tokens: means weighted per channel by the softmax of learned gates.

    | | `overlap` | `indexer` |
    |---|---|---|
    | heavily compressed attention (HCA) | false | none |
    | compressed sparse attention (CSA) | true | a section |

    With `overlap` an entry covers the window before too, through a second series of features and gates.
    """

    ratio: int  # tokens per window
    overlap: bool = False  # whether an entry covers the window before too
    indexer: EntryIndexerConfig | None = None  # selection of entries per query; none for all entries

    def __post_init__(self):
        require_at_least(self, 1, "ratio")

    @property
    def series(self) -> int:
        """Number of series of features and gates."""
        return 2 if self.overlap else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedConfig(MixerConfig):
    """Attention to a causal window of tokens and, with `compression`, to entries of closed windows, in one softmax.

    All heads share one key, which is the value too. Its last `rope_width` features have rotary positions, and those of
    the output are rotated back by the position of the query, so that values depend on the distance. A learned logit per
    head takes a share of the softmax and has no value.
    """

    heads: int  # number of query heads
    head_width: int  # width of queries, keys and entries
    query_rank: int  # width of the latent of the queries
    window: int  # keys of the window, that of the query included
    rope_width: int  # last features of queries, keys and entries, which have rotary positions
    rope: RopeConfig  # rotary positions; those of an entry are those of its first token
    groups: int  # groups of heads, each with a projection to out_rank features
    out_rank: int  # width of that projection
    norm_eps: float  # eps of the RMSNorms on queries, keys and entries
    impl: str = dataclasses.field(metadata={"resume": "rounding"})  # implementation of `ops.attend` in the window
    compression: CompressionConfig | None = None  # entries of closed windows; none for the window alone

    def __post_init__(self):
        sizes = "heads", "head_width", "query_rank", "window", "rope_width", "groups", "out_rank"
        require_at_least(self, 1, *sizes)
        require_choice(self, "impl", implementation_names())
        self.rope.width(self.rope_width)
        if self.rope_width > self.head_width:
            raise InputError("rope_width", f"{self.rope_width} is above head_width = {self.head_width}")
        if self.heads % self.groups:
            raise InputError("heads", f"{self.heads} is not divisible by groups = {self.groups}")
        if self.indexer is not None and self.indexer.width < self.rope_width:
            raise InputError(
                "compression.indexer.width", f"{self.indexer.width} is below rope_width = {self.rope_width}"
            )

    @property
    def indexer(self) -> EntryIndexerConfig | None:
        """The selection of entries."""
        return None if self.compression is None else self.compression.indexer

    @property
    def pattern(self) -> patterns.Pattern:
        """The window."""
        return patterns.Window(self.window - 1, 0)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        text = f"compressed attention {self.heads} x {self.head_width}, window {self.window}"
        if self.compression is not None:
            text += f", entries of {self.compression.ratio}"
        return text if self.indexer is None else f"{text}, top {self.indexer.top_k}" + ", dense" * self.indexer.dense

    @property
    def connectivity(self) -> patterns.Pattern:
        """The window; with entries, an upper bound: a token between the window and the last closed one is not read."""
        return self.pattern if self.compression is None else patterns.Causal()

    @property
    def selects(self) -> bool:
        """Whether queries select entries."""
        return self.indexer is not None and not self.indexer.dense

    @property
    def is_measured(self) -> bool:
        """Whether there is an indexer."""
        return self.indexer is not None

    def exchange(self, length: int, shards: int) -> str:
        """The keys of the window, and all entries."""
        kind = plan_exchange(self.pattern, length, shards, self.impl == "ring").kind
        if self.compression is None:
            return kind
        return f"{kind}; {SELECTED if self.selects else 'all-gather'} of entries"

    def check(self, length: int) -> None:
        """Raises InputError if a loss has no use over `length` tokens."""
        if self.compression is None or self.indexer is None or not self.indexer.loss_weight:
            return
        if self.indexer.top_k >= (count := length // self.compression.ratio):
            problem = f"top_k = {self.indexer.top_k} leaves out none of {count} entries of {length} tokens, so that the"
            raise InputError("compression.indexer.loss_weight", f"{problem} loss has no use; lower top_k")


class Compressed(Mixer):
    """Window, compressed sparse and heavily compressed attention of DeepSeek-V4."""

    def __init__(self, config: CompressedConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.pattern, self.dtype = config, config.pattern, stream.dtype
        m, h, d, g = stream.width, config.heads, config.head_width, config.groups
        linear = _linear(stream, rngs)
        self.query_latent, self.query_norm = linear(m, config.query_rank), _norm(config, config.query_rank, rngs)
        self.query = linear(config.query_rank, h * d, axes=(None, "heads"))
        self.key, self.key_norm = linear(m, d), _norm(config, d, rngs)
        self.sinks = parameter(rngs, jax.nn.initializers.zeros, (h,), (None,))
        inputs = h // g * d
        init = jax.nn.initializers.normal(inputs**-0.5)
        self.group = parameter(rngs, init, (g, inputs, config.out_rank), (None, None, None), decay=True)
        self.out = linear(g * config.out_rank, m, axes=(None, "width"), scale=output_scale(stream))
        compression = config.compression
        self.compressor = None if compression is None else Compressor(config, compression, d, stream, rngs)
        self.indexer = None if config.indexer is None else EntryIndexer(config, stream, rngs)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self.mix(x, context)[0]

    def mix(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes a whole sequence; returns the loss of the indexer, if there is one."""
        y, served = self._attend(x, context)
        auxiliary = Auxiliary({}) if self.indexer is None or served is None else self.indexer.auxiliary(**served)
        return self._project_out(y, jnp.arange(x.shape[1])), auxiliary

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection of entries, of the attention to them alone; none without an indexer."""
        _, served = self._attend(x, context)
        return {} if self.indexer is None or served is None else self.indexer.measure(**served)

    def select(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Selection | None:
        """Returns the entries that the queries of a whole sequence select; None without an indexer or an entry."""
        _, served = self._attend(x, context)
        return None if served is None else served["selection"]

    def _attend(self, x: Array, context: Context) -> tuple[Float[Array, "b t h d"], dict[str, Any] | None]:
        """The output per head for a whole sequence, and the arguments of `Scorer.measure` if there is an indexer."""
        x, positions, segments = context.tokens.zero_padding(x), jnp.arange(x.shape[1]), context.tokens.attend_segments
        latent, q = self._query(x, positions)
        k = self._key(x, positions)[:, :, None]
        options = {"scale": self._scale, "segment_ids": segments, "impl": self.config.impl, "return_lse": True}
        parts = [cast(tuple, attend(q, k, k, self.pattern, sink_logits=self.sinks[...], **options))]
        windows = self._close_windows(x, context)
        if self.compressor is None or windows is None:
            return merge_lse(parts)[0], None
        entries, ids = self.compressor(x, windows), None if segments is None else segments[0]
        served, seen = None, windows.restrict(q.shape[:2], ids)
        if self.indexer is not None:
            selection, index = self.indexer.choose(x, latent, windows, seen)
            served = {"index": index, "selection": selection, "q": q, "k": entries[:, :, None], "scale": self._scale}
        if served is None or not self.config.selects:
            parts.append(attend_entries(q, entries, windows, scale=self._scale, segments=ids))
        else:
            e, options = served["k"], {"scale": self._scale, "selection": selection, "return_lse": True}
            parts.append(cast(tuple, attend(q, e, e, patterns.Full(), **options)))
        y, lse = merge_lse(parts)
        if served is not None:
            served |= {"pattern": patterns.Causal(), "tokens": context.tokens, "lse": lse} | seen
        return y, served

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the tokens that the selected entries summarize."""
        compression, segments = self.config.compression, context.tokens.attend_segments
        selection, windows = self.select(x, context), self._close_windows(x, context)
        if not self.config.selects or selection is None or windows is None or compression is None:
            return {}
        ids = None if segments is None else segments[1]
        return {"": cover_tokens(selection, windows, ids, overlap=compression.overlap)}

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions: the window, and the caches of compressor and indexer."""
        slots = patterns.plan_cache(self.pattern, length).count
        cache: Cache = {"k": jnp.zeros((batch, 1, slots, self.config.head_width), self.dtype)}
        if self.compressor is not None:
            cache["compressor"] = self.compressor.init_cache(batch, length)
        if self.indexer is not None and self.config.selects:
            cache["indexer"] = self.indexer.compressor.init_cache(batch, length)
        return cache

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        at, tokens = chunk_positions(positions, x.shape[1]), context.tokens
        latent, q = self._query(x, at)
        q, k, _ = confine_nan(q, *[self._key(x, at)[:, None]] * 2)
        plan, after = patterns.plan_cache(self.pattern, length), dict(cache)
        window, keys, keys_at = extend_keys(plan, {"k": cache["k"]}, {"k": k}, positions, tokens, axis=2)
        options: dict[str, Any] = {"scale": self._scale, "return_lse": True}
        arguments = q, keys["k"], zero_nan(keys["k"]), self.pattern, at, keys_at, length
        parts = [cast(tuple, attend_cached(*arguments, sink_logits=self.sinks[...], **options))]
        if self.compressor is not None:
            entries, after["compressor"] = self.compressor.extend(x, cache["compressor"], positions, tokens)
            index = None
            if self.indexer is not None and self.config.selects:
                index, after["indexer"] = self.indexer.compressor.extend(x, cache["indexer"], positions, tokens)
            if entries.shape[1]:
                ends = self.compressor.ends(entries, positions + tokens.count(at.shape))
                parts.append(self._attend_cached(x, latent, q, entries, index, at, ends, length, options))
        return self._project_out(merge_lse(parts)[0], at), after | window

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the window, and the entries and their scores."""
        config, width = self.config, self.config.head_width
        projections = (self.query_latent, self.query, self.key, self.compressor, self.out)
        grouped = 2.0 * np.prod(self.group.shape)
        linear = Cost(0, grouped + sum(part.flops for part in projections if part is not None))
        window = attention_cost(self.pattern, length, heads=config.heads, score_width=width, value_width=width)
        if config.compression is None:
            return linear + window
        seen = (np.arange(length) + 1) // config.compression.ratio
        kept = np.minimum(seen, config.indexer.top_k) if config.indexer is not None and config.selects else seen
        pairs = config.heads * int(kept.sum())
        cost = linear + window + Cost(pairs, attention_flops(pairs, width) / max(length, 1))
        if self.indexer is None:
            return cost
        return cost + self.indexer.cost(length, int(seen.sum()), int(kept.sum()), heads=config.heads, score_width=width)

    def _attend_cached(self, x, latent, q, entries, index, at, ends, length, options):
        """Attends to the entries of a cache, those that an indexer selects if `index` are its entries."""
        causal = patterns.Causal()
        if self.indexer is None or index is None:
            k = entries[:, None]
            return attend_cached(q, k, zero_nan(k), causal, at, ends, length, **options)
        index = self.indexer.index(x, latent, index, at)
        selection = select_indexed(index, self.indexer.config.top_k, causal, positions=(at, ends), length=length)
        k = entries[:, :, None]
        return attend_cached_selection(q, k, zero_nan(k), selection, causal, at, ends, length, **options)

    def _close_windows(self, x: Array, context: Context) -> ClosedWindows | None:
        """The closed windows of a whole sequence, if there is one."""
        compression, segments = self.config.compression, context.tokens.attend_segments
        if compression is None or x.shape[1] < compression.ratio:
            return None
        return close_windows(x.shape[1], compression.ratio, None if segments is None else segments[1])

    @property
    def _scale(self) -> float:
        return self.config.head_width**-0.5

    def _query(self, x: Array, positions: Array) -> tuple[Array, Array]:
        """The latent of the queries [b, t, r], and queries [b, t, h, d]."""
        latent = self.query_norm(self.query_latent(x))
        q = self.query(latent).reshape(*x.shape[:2], self.config.heads, -1)
        wide = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        return latent, _rotate_last(standardize(wide, self.config.norm_eps).astype(q.dtype), positions, self.config)

    def _key(self, x: Array, positions: Array) -> Array:
        """Keys [b, t, d]."""
        return _rotate_last(self.key_norm(self.key(x))[:, :, None], positions, self.config)[:, :, 0]

    def _project_out(self, y: Array, positions: Array) -> Array:
        y = _rotate_last(y, -positions, self.config)
        grouped = y.reshape(*y.shape[:2], self.config.groups, -1)
        y = jnp.einsum("btgi,gir->btgr", grouped, self.group[...].astype(y.dtype))
        return self.out(y.reshape(*y.shape[:2], -1))


class Compressor(nnx.Module):
    """Entries of `width` features for `CompressionConfig`."""

    def __init__(
        self, config: CompressedConfig, compression: CompressionConfig, width: int, stream: Stream, rngs: nnx.Rngs
    ):
        self.config, self.compression, self.width, self.dtype = config, compression, width, stream.dtype
        inner, linear = compression.series * width, _linear(stream, rngs)
        self.values, self.gates = linear(stream.width, inner), linear(stream.width, inner)
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (compression.ratio, inner), (None, None))
        self.norm = _norm(config, width, rngs)

    def __call__(self, x: Float[Array, "b t m"], windows: ClosedWindows) -> Float[Array, "b n d"]:
        """Returns the entries of windows."""
        return self._pool(self.values(x), self.gates(x), windows)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache of the entries, and of the tokens of the last windows that later entries cover."""
        ratio, series = self.compression.ratio, self.compression.series
        entries = {"entries": jnp.zeros((batch, length // ratio, self.width), self.dtype)}
        shape = batch, ratio * series, series * self.width
        return entries | {name: jnp.zeros(shape, self.dtype) for name in ("values", "gates")}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], tokens: Tokens
    ) -> tuple[Float[Array, "b n d"], Cache]:
        """Returns the entries after the next tokens, and the next cache; token i is in slot i modulo the slots."""
        (b, c, _), ratio, back = x.shape, self.compression.ratio, int(self.compression.overlap)
        slots, at = cache["values"].shape[1], chunk_positions(positions, c)
        chunk, end = {"values": self.values(x), "gates": self.gates(x)}, positions + tokens.count((b, c))
        # The windows that the chunk can close, after the one before them if entries overlap.
        numbers = positions[:, None] // ratio + jnp.arange(-back, (c + ratio - 2) // ratio + 1)
        keys = numbers[..., None] * ratio + jnp.arange(ratio)
        first = positions[:, None, None]
        index = jnp.where(keys < first, keys % slots, slots + jnp.minimum(keys - first, c - 1))
        known = {name: jnp.concatenate([cache[name], part], axis=1) for name, part in chunk.items()}
        windows = ClosedWindows(index, keys[..., -1], numbers > 0, jnp.zeros_like(numbers))
        new = self._pool(known["values"], known["gates"], windows, numbers * ratio)
        closed = Tokens(mask=(windows.ends < end[:, None])[:, back:])
        entries = write_slots(cache["entries"], new[:, back:], numbers[:, back:], closed)
        kept = jnp.where(at >= end[:, None] - slots, at % slots, slots)
        after = {name: write_slots(cache[name], part, kept, tokens) for name, part in chunk.items()}
        return entries, after | {"entries": entries}

    def ends(self, entries: Float[Array, "b n d"], end: Int[Array, " b"]) -> Int[Array, "b n"]:
        """Returns the position of the last token of each entry of a cache before position `end`; -1 for no entry."""
        last = (jnp.arange(entries.shape[1]) + 1) * self.compression.ratio - 1
        return jnp.where(last < end[:, None], last, -1)

    @property
    def flops(self) -> float:
        """Forward FLOPs per token of the projections."""
        return self.values.flops + self.gates.flops

    def _pool(self, values: Array, gates: Array, windows: ClosedWindows, positions: Array | None = None) -> Array:
        bias, overlap = self.bias[...], self.compression.overlap
        entries = self.norm(compress_windows(values, gates, bias, windows, overlap=overlap))
        positions = windows.keys[..., 0] if positions is None else positions
        return _rotate_last(entries[:, :, None], positions, self.config)[:, :, 0]


class EntryIndexer(Scorer):
    """Scores of entries for `EntryIndexerConfig`."""

    def __init__(self, config: CompressedConfig, stream: Stream, rngs: nnx.Rngs):
        compression, indexer = config.compression, config.indexer
        assert compression is not None
        assert indexer is not None
        self.config, self.attention = indexer, config
        linear = _linear(stream, rngs)
        self.queries = linear(config.query_rank, indexer.heads * indexer.width, axes=(None, "heads"))
        self.weights = linear(stream.width, indexer.heads)
        self.compressor = Compressor(config, compression, indexer.width, stream, rngs)

    def choose(
        self, x: Float[Array, "b t m"], latent: Float[Array, "b t r"], windows: ClosedWindows, seen: dict[str, Any]
    ) -> tuple[Selection, Index]:
        """Selects entries for a whole sequence; returns the index too.

        Args:
          x: The stream.
          latent: The latent of the queries.
          windows: The windows of the entries.
          seen: The result of `windows.restrict`.
        """
        x, latent = jax.lax.stop_gradient((x, latent))
        index = self.index(x, latent, self.compressor(x, windows), jnp.arange(x.shape[1]))
        return select_indexed(index, self.config.top_k, patterns.Causal(), **seen), index

    def index(
        self,
        x: Float[Array, "b t m"],
        latent: Float[Array, "b t r"],
        entries: Float[Array, "b n d"],
        positions: Int[Array, "*b t"],
    ) -> Index:
        """Returns index queries and their weights, with the entries of the compressor as keys."""
        q = self.queries(latent).reshape(*x.shape[:2], self.config.heads, -1)
        return Index(_rotate_last(q, positions, self.attention), entries, self.weights(x) * self.config.heads**-0.5)

    def cost(self, length: int, seen: int, kept: int, *, heads: int, score_width: int) -> Cost:
        """Cost of the projections and of scoring every entry that a query sees, and of the loss.

        Args:
          length: Number of tokens.
          seen: Number of entries that the queries see.
          kept: Number of those that they attend to.
          heads: Query heads of the attention.
          score_width: Width of a query of the attention and an entry.
        """
        linear = self.queries.flops + self.weights.flops + self.compressor.flops
        return self._cost(length, linear, seen, kept, attention_flops(heads * kept, score_width, 0))


def _linear(stream: Stream, rngs: nnx.Rngs):
    def build(inputs: int, outputs: int, axes: tuple[str | None, str | None] = ("width", None), **options) -> Linear:
        return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs, **options)

    return build


def _norm(config: CompressedConfig, width: int, rngs: nnx.Rngs) -> Norm:
    return Norm(NormConfig(kind="rms", eps=config.norm_eps), width, rngs, axis=None)


def _rotate_last(x: Float[Array, "b t h d"], positions: Int[Array, "*b t"], config: CompressedConfig) -> Array:
    """Rotates the last features of each head."""
    nope, pe = jnp.split(x, [x.shape[-1] - config.rope_width], axis=-1)
    return jnp.concatenate([nope, rotate(pe, positions, config.rope)], axis=-1)
