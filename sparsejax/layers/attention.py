"""The attention mixer: grouped queries under any pattern, with the position encodings and options of the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, argument_path, require_at_least, require_choice
from sparsejax.layers.caching import add_to_blocks, chunk_positions, extend_keys
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.indexer import IndexerConfig, indexed_cost, make_indexer, reuse_selection
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import AttendingConfig, Auxiliary, Cache, Mixer, implementation_names, parse_pattern
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.select import SelectConfig
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, output_scale, parameter
from sparsejax.ops import (
    AttentionCall,
    Selection,
    attend,
    attend_cached,
    attend_cached_selection,
    measure_selection,
    merge_lse,
)
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.softmax import confine_nan

MASKED_SEGMENT = -3  # a segment id that no query has


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttendingConfig):
    """Softmax attention with grouped queries under a pattern."""

    pattern: str | patterns.Pattern  # text form of the pattern, see `sparsejax.patterns`
    heads: int  # number of query heads
    kv_heads: int  # number of key/value heads, which divides heads
    head_width: int  # width of queries, keys and values per head
    rope: RopeConfig | None  # rotary positions; none for no rotation
    qk_norm: NormConfig | None  # norm of the queries and of the keys of a head, before the rotation; none for no norm
    impl: str = dataclasses.field(metadata={"resume": "rounding"})  # implementation of `ops.attend`
    qk_norm_joint: bool = False  # normalize all heads together instead of each (OLMo 2, arXiv:2501.00656)
    alibi: bool = False  # lower scores linearly with the distance, by a slope per head (arXiv:2108.12409)
    # number of sinusoids of the relative positions of Transformer-XL (arXiv:1901.02860); none for none
    relative: int | None = None
    scale: float | None = None  # factor on the scores; none for head_width ** -0.5
    # bound of the scores: softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118); none for no bound
    softcap: float | None = None
    # growth g of the scores with the position t of the query, 1 + g log(1 + floor((t + 1) / growth_period)) (Llama 4)
    growth: float = 0.0
    growth_period: int = 8192  # tokens until the scores grow
    sinks: bool = False  # use a learned logit per head that takes a share of the softmax and has no value (gpt-oss)
    gate: bool = False  # multiply the output by sigmoid(gate(x)) before the last projection (arXiv:2505.06708)
    bias: bool = False  # whether the projections to queries, keys, values and gate have a bias
    out_bias: bool = False  # whether the last projection has a bias
    global_projections: bool = False  # use separate projections for the tokens of `Extras.globals` (Longformer)
    select: SelectConfig | None = None  # keys that each query chooses by content; none for all keys of the pattern
    indexer: IndexerConfig | None = None  # keys that a trained indexer selects; none for all keys of the pattern

    def __post_init__(self):
        require_at_least(self, 1, "heads", "kv_heads", "head_width", "growth_period")
        if self.heads % self.kv_heads:
            raise InputError("heads", f"{self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.rope is not None:
            self.rope.width(self.head_width)
        if self.relative is not None and (self.relative < 2 or self.relative % 2):
            raise InputError("relative", f"{self.relative} is not a positive even number of sines and cosines")
        if self.softcap is not None and self.softcap <= 0:
            raise InputError("softcap", f"{self.softcap} is not positive")
        require_choice(self, "impl", implementation_names())
        pattern = parse_pattern(self.pattern, self.heads)
        if self.select is not None and pattern.heads is not None:
            raise InputError("pattern", f"{str(self.pattern)!r} differs between heads, which select does not support")
        if self.select is not None and self.select.kind in ("moba", "infllm") and pattern.lookahead() != 0:
            kind = self.select.kind
            raise InputError("pattern", f"{str(self.pattern)!r} is not causal, as select.kind = {kind!r} must be")
        if self.indexer is not None:
            self._check_indexer(self.indexer, pattern)
        if self.global_projections and "global" in str(pattern):
            raise InputError(
                "global_projections", f"they apply to run-time globals only, but the pattern is {self.pattern!r}"
            )

    def _check_indexer(self, indexer: IndexerConfig, pattern: patterns.Pattern) -> None:
        if self.select is not None:
            raise InputError("indexer", "select chooses the keys already; set one of them to none")
        if pattern != patterns.Causal():
            raise InputError("pattern", f"{str(self.pattern)!r} is not 'causal', which the indexer selects from")
        if self.alibi or self.relative:
            raise InputError("indexer", "cannot be combined with alibi or relative")
        if indexer.width < self.rotated:
            raise InputError("indexer.width", f"{indexer.width} is below the {self.rotated} rotated features of a head")

    @property
    def rotated(self) -> int:
        """Number of rotated features of a head."""
        return 0 if self.rope is None else self.rope.width(self.head_width)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        choice = self.select or self.indexer
        selected = "" if choice is None else f", {choice.summary}"
        return f"attention {self.heads}/{self.kv_heads} x {self.head_width}{selected}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """The pattern."""
        return patterns.parse(self.pattern)

    @property
    def selects(self) -> bool:
        """Whether queries choose their keys, or an indexer does."""
        return self.select is not None or (self.indexer is not None and not self.indexer.dense)

    @property
    def indexers(self) -> tuple[IndexerConfig, ...]:
        """The indexer, if there is one."""
        return () if self.indexer is None else (self.indexer,)

    def check(self, length: int) -> None:
        """Raises InputError if the pattern or a block does not fit `length` tokens."""
        parse_pattern(self.pattern, self.heads, length)
        if self.select is not None and self.select.block > length:
            raise InputError("select.block", f"{self.select.block} is above the {length} tokens of a sequence")
        if self.indexer is not None:
            with argument_path("indexer"):
                self.indexer.check(length, self.kv_heads)


class Attention(Mixer):
    """Softmax attention (arXiv:1706.03762) under a pattern, from `inputs` features, by default those of the stream."""

    def __init__(self, config: AttentionConfig, stream: Stream, rngs: nnx.Rngs, inputs: int | None = None):
        self.config = config
        self.pattern = patterns.parse(config.pattern)
        d, dtype = config.head_width, stream.dtype
        m, h, g = inputs or stream.width, config.heads * d, config.kv_heads * d

        def project(outputs: int) -> Linear:
            return Linear(m, outputs, ("width", "heads"), dtype=dtype, rngs=rngs, bias=config.bias)

        self.query, self.key, self.value = project(h), project(g), project(g)
        self.gate = project(h) if config.gate else None
        self.query_global = project(h) if config.global_projections else None
        self.key_global = project(g) if config.global_projections else None
        self.value_global = project(g) if config.global_projections else None
        axes, scale = ("heads", "width"), output_scale(stream)
        self.out = Linear(h, stream.width, axes, dtype=dtype, rngs=rngs, bias=config.out_bias, scale=scale)
        self.query_norm = make_norm(config.qk_norm, h if config.qk_norm_joint else d, rngs, axis=None)
        self.key_norm = make_norm(config.qk_norm, g if config.qk_norm_joint else d, rngs, axis=None)
        zeros = jax.nn.initializers.zeros
        self.sinks = parameter(rngs, zeros, (config.heads,), (None,)) if config.sinks else None
        width = inputs or stream.width
        self.indexer = make_indexer(config.indexer, config.rope, config.rotated, stream, rngs, width)
        self.relative = Relative(config.heads, d, config.relative, rngs) if config.relative else None

    def __call__(self, x: Float[Array, "b t inputs"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self.mix(x, context)[0]

    def mix(self, x: Float[Array, "b t inputs"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes a whole sequence; returns the loss and the selection of the indexer, if there is one.

        Raises:
          InputError: There are globals, but the pattern is causal or an option does not support them.
        """
        positions, auxiliary, segments = self._positions(x, context), Auxiliary({}), context.tokens.attend_segments
        q, k, v = self._project(x, positions)
        if context.extras.globals is None:
            selection, auxiliary = self._choose(x, q, k, context)
            y = self._attend(q, k, v, self.pattern, segments, positions, selection=selection)
        else:
            y = self._attend_with_globals(x, q, k, v, context.extras.globals, segments)
        return self._project_out(x, y), auxiliary

    def measure(self, x: Float[Array, "b t inputs"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection."""
        q, k, _ = self._project(x, self._positions(x, context))
        if self.indexer is not None:
            selection, index = self.indexer.choose(x, x, self.pattern, context.tokens)
            return self.indexer.measure(index, selection, q, k, self.pattern, context.tokens, scale=self._scale)
        if self.config.select is None:
            return {}
        chosen, _ = self._choose(x, q, k, context)
        assert chosen is not None
        segments = context.tokens.attend_segments
        return measure_selection(chosen, q, k, self.pattern, scale=self._scale, segments=segments)._asdict()

    def selections(self, x: Float[Array, "b t inputs"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the selected keys."""
        q, k, _ = self._project(x, self._positions(x, context))
        selection, _ = self._choose(x, q, k, context)
        return {} if selection is None else {"": selection}

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions, with the slots of `patterns.plan_cache`.

        A query that chooses its keys may choose any of them: they are all kept, in the order of their positions.
        """
        slots = patterns.plan_cache(self._kept, length).count
        shape = (batch, self.config.kv_heads, slots, self.config.head_width)
        if self.config.selects:
            shape = (batch, slots, self.config.kv_heads, self.config.head_width)
        cache: Cache = {name: jnp.zeros(shape, self.key.dtype) for name in ("k", "v")}
        if self._keeps_sums:
            shape = (batch, -(-slots // self.config.select.block), *shape[2:])
            cache["sums"] = jnp.zeros(shape, jnp.promote_types(self.key.dtype, jnp.float32))
        if self.indexer is not None and self.config.selects:
            cache["index"] = self.indexer.init_cache(batch, slots)
        return cache

    def extend(
        self,
        x: Float[Array, "b c inputs"],
        cache: Cache,
        positions: Int[Array, " b"],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens, whose queries attend to the slots of the cache and to the chunk."""
        return self.advance(x, cache, positions, length, context)[:2]

    def advance(
        self,
        x: Float[Array, "b c inputs"],
        cache: Cache,
        positions: Int[Array, " b"],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b c m"], Cache, Selection | None]:
        """Mixes the next tokens; returns the selection of the indexer, if there is one."""
        if self.config.selects:
            return self._advance_selected(x, cache, positions, length, context)
        at = chunk_positions(positions, x.shape[1])
        q, k, v = self._project(x, at)
        plan = patterns.plan_cache(self.pattern, length)
        q, k, v = confine_nan(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
        cache, keys, keys_at = extend_keys(plan, cache, {"k": k, "v": v}, positions, context.tokens, axis=2)
        q, k = self._append_relative(q, keys["k"], at, keys_at, heads=-3)
        sinks = None if self.sinks is None else self.sinks[...]
        y = attend_cached(
            q, k, keys["v"], self.pattern, at, keys_at, length, scale=self._scale, softcap=self.config.softcap,
            sink_logits=sinks, alibi_slopes=self._slopes,
        )  # fmt: skip
        return self._project_out(x, y), cache, None

    def _advance_selected(
        self, x: Array, cache: Cache, positions: Array, length: int, context: Context
    ) -> tuple[Array, Cache, Selection | None]:
        """As `advance`; the keys of the cache are in the order of their positions."""
        at = chunk_positions(positions, x.shape[1])
        q, added, v = confine_nan(*self._project(x, at))
        plan = patterns.plan_cache(self._kept, length)
        after, keys, keys_at = extend_keys(plan, cache, {"k": added, "v": v}, positions, context.tokens, axis=1)
        q, k = self._append_relative(q, keys["k"], at, keys_at)
        selected = None
        if self.config.select is not None:
            options: dict[str, Any] = {"positions": (at, keys_at), "length": length}
            if self._keeps_sums:
                after["sums"] = add_to_blocks(cache["sums"], added, at, self.config.select.block, context.tokens)
                options["means"] = after["sums"] / self.config.select.block
            selection = self.config.select.choose(q, k, self.pattern, self._scale, **options)
        elif self.indexer is not None:
            arguments = (at, keys_at), length, self.pattern, context.tokens
            selected, after["index"] = self.indexer.extend(x, x, cache["index"], *arguments)
            selection = selected
        else:
            selection = reuse_selection(context)
        sinks = None if self.sinks is None else self.sinks[...]
        y = attend_cached_selection(
            q, k, keys["v"], selection, self.pattern, at, keys_at, length, scale=self._scale,
            softcap=self.config.softcap, sink_logits=sinks, alibi_slopes=self._slopes,
        )  # fmt: skip
        return self._project_out(x, y), after, selected

    def attention_calls(
        self, x: Float[Array, "b t inputs"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention, without globals of the batch."""
        positions = self._positions(x, context)
        q, k, v = self._project(x, positions)
        selection, _ = self._choose(x, q, k, context)
        q, k = self._append_relative(q, k, positions, positions)
        sinks, segments = None if self.sinks is None else self.sinks[...], context.tokens.attend_segments
        options = {"scale": self._scale, "softcap": self.config.softcap, "alibi_slopes": self._slopes}
        call = AttentionCall(q, k, v, self.pattern, sink_logits=sinks, segments=segments, interpret=None, **options)
        return {"": call if selection is None else selected_call(call, selection)}

    def cost(self, length: int) -> Cost:
        """Cost of the projections and of attention under the pattern."""
        config, projections = self.config, (self.query, self.key, self.value, self.gate, self.out)
        linear = sum(projection.flops for projection in projections if projection is not None)
        width = config.head_width
        if config.select is not None:
            return Cost(0, linear) + config.select.cost(self.pattern, length, heads=config.heads, width=width)
        sizes = {"heads": config.heads, "score_width": width + (config.relative or 0), "value_width": width}
        attention = attention_cost(self.pattern, length, **sizes)
        if config.indexer is not None:
            attention = indexed_cost(config.indexer, self.indexer, attention, length, **sizes)
        return Cost(0, linear) + attention

    @property
    def _keeps_sums(self) -> bool:
        """Whether a cache has the sum of the keys of each block: of MoBA, unless features of positions are appended."""
        return self.config.select is not None and self.config.select.kind == "moba" and self.relative is None

    @property
    def _kept(self) -> patterns.Pattern:
        """The pattern whose keys a cache keeps."""
        return self.pattern if self.config.select is None else patterns.Causal()

    def _choose(self, x: Array, q: Array, k: Array, context: Context) -> tuple[Selection | None, Auxiliary]:
        """The keys that the queries of a whole sequence attend to, if they are chosen; and the loss of the indexer."""
        if self.indexer is not None:
            selection, index = self.indexer.choose(x, x, self.pattern, context.tokens)
            auxiliary = self.indexer.auxiliary(index, selection, q, k, self.pattern, context.tokens, scale=self._scale)
            return auxiliary.selection, auxiliary
        if self.config.select is None:
            return reuse_selection(context) if self.config.selects else None, Auxiliary({})
        positions, segments = self._positions(x, context), context.tokens.attend_segments
        q, k = self._append_relative(q, k, positions, positions)
        return self.config.select.choose(q, k, self.pattern, self._scale, segments=segments), Auxiliary({})

    @property
    def _scale(self) -> float:
        return self.config.head_width**-0.5 if self.config.scale is None else self.config.scale

    @property
    def _slopes(self) -> Float[Array, " h"] | None:
        return jnp.asarray(alibi_slopes(self.config.heads)) if self.config.alibi else None

    def _positions(self, x: Array, context: Context) -> Array:
        """Positions in the row, from which distances follow; for growing scores those in the document."""
        positions = context.tokens.positions
        return jnp.arange(x.shape[1]) if positions is None or not self.config.growth else positions

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        q, k, v = (self._split_heads(linear(x)) for linear in (self.query, self.key, self.value))
        return (*self._encode_positions(q, k, positions, positions), v)

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_width)

    def _encode_positions(self, q: Array, k: Array, q_positions: Array, k_positions: Array) -> tuple[Array, Array]:
        config, rope = self.config, self.config.rope
        if config.qk_norm_joint:
            q, k = (
                normalize(norm, x.reshape(*x.shape[:2], -1)).reshape(x.shape)
                for norm, x in ((self.query_norm, q), (self.key_norm, k))
            )
        else:
            q, k = normalize(self.query_norm, q), normalize(self.key_norm, k)
        q, k = (q, k) if rope is None else (rotate(q, q_positions, rope), rotate(k, k_positions, rope))
        if config.growth:
            factor = 1 + config.growth * jnp.log1p((q_positions + 1) // config.growth_period)
            q = (q * factor[..., None, None]).astype(q.dtype)
        return q, k

    def _append_relative(
        self, q: Array, k: Array, q_positions: Array, k_positions: Array, heads: int = -2
    ) -> tuple[Array, Array]:
        """Appends the features of relative positions, whose products are added to the scores; `heads`: an axis of k."""
        if self.relative is None:
            return q, k
        features = jnp.expand_dims(self.relative.key_features(k_positions).astype(k.dtype), heads)
        k = jnp.concatenate([k, jnp.broadcast_to(features, (*k.shape[:-1], features.shape[-1]))], axis=-1)
        content = q + self.relative.content[...].astype(q.dtype)
        return jnp.concatenate([content, self.relative.query_features(q, q_positions)], axis=-1), k

    def _attend(self, q, k, v, pattern, segments, q_positions, k_positions=None, return_lse=False, selection=None):
        k_positions = q_positions if k_positions is None else k_positions
        q, k = self._append_relative(q, k, q_positions, k_positions)
        impl = self.config.impl if pattern is self.pattern else "auto"
        sinks = None if self.sinks is None else self.sinks[...]
        return attend(
            q, k, v, pattern, impl=impl, scale=self._scale, softcap=self.config.softcap, sink_logits=sinks,
            alibi_slopes=self._slopes, segment_ids=segments, return_lse=return_lse, selection=selection,
        )  # fmt: skip

    def _attend_with_globals(
        self, x: Array, q: Array, k: Array, v: Array, positions: Array, segments: tuple[Array, Array] | None
    ) -> Array:
        """Every query attends to the global keys, once, and to the other keys of the pattern; globals attend to all.

        Time and memory are those of the pattern, plus one key and one query per global.
        """
        others = self.sinks, self.relative, self.config.select
        if self.pattern.lookahead() == 0 or self.config.alibi or any(other is not None for other in others):
            raise InputError("globals", "they need a bidirectional pattern without sinks, alibi, relative or select")
        (b, t), everywhere, full = x.shape[:2], jnp.arange(x.shape[1]), patterns.Full()
        queries, keys = segments or (jnp.zeros((b, t), jnp.int32),) * 2
        real = positions >= 0
        at = jnp.where(real, positions, t)  # t is out of range: writes to it are dropped

        def pick(x: Array) -> Array:
            index = jnp.minimum(at, t - 1).reshape(*at.shape, *[1] * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1)

        marked = jnp.zeros((b, t), bool).at[jnp.arange(b)[:, None], at].set(True, mode="drop")
        local_keys = jnp.where(marked, MASKED_SEGMENT, keys)
        local = self._attend(q, k, v, self.pattern, (queries, local_keys), everywhere, return_lse=True)
        global_keys = jnp.where(real, pick(keys), MASKED_SEGMENT)
        distant = self._attend(q, pick(k), pick(v), full, (queries, global_keys), everywhere, at, return_lse=True)
        y, _ = merge_lse([local, distant])
        maps = (self.query_global, self.key_global, self.value_global)
        inputs = zip(maps, (self.query, self.key, self.value), (pick(x), x, x), strict=True)
        q, k, v = (self._split_heads((linear or shared)(features)) for linear, shared, features in inputs)
        q, k = self._encode_positions(q, k, jnp.minimum(at, t - 1), everywhere)
        outputs = self._attend(q, k, v, full, (pick(queries), keys), at, everywhere)
        return y.at[jnp.arange(b)[:, None], at].set(outputs, mode="drop")

    def _project_out(self, x: Array, y: Array) -> Array:
        y = y.reshape(*x.shape[:-1], -1)
        return self.out(y if self.gate is None else y * jax.nn.sigmoid(self.gate(x)))


class Relative(nnx.Module):
    """Relative sinusoidal positions (Transformer-XL, arXiv:1901.02860), for any pattern.

    The score of query i and key j is (q + content) · k + (q + position) · W s(i - j). By the addition theorem the
    sinusoids of a difference are products of those of i and j, so that the second term is a product of additional
    features of the query and the key.
    """

    def __init__(self, heads: int, width: int, sinusoids: int, rngs: nnx.Rngs):
        h, d, r = heads, width, sinusoids
        zeros = jax.nn.initializers.zeros
        self.content = parameter(rngs, zeros, (h, d), (None, None))
        self.position = parameter(rngs, zeros, (h, d), (None, None))
        init = jax.nn.initializers.normal(r**-0.5)
        self.weight = parameter(rngs, init, (h, r, d), (None, None, None), decay=True)

    def query_features(self, q: Float[Array, "b t h d"], positions: Int[Array, "*b t"]) -> Float[Array, "b t h r"]:
        """Returns the features that are appended to queries."""
        q = q + self.position[...].astype(q.dtype)
        a, b = jnp.split(jnp.einsum("bthd,hrd->bthr", q, self.weight[...].astype(q.dtype)), 2, axis=-1)
        sin, cos = (x[..., None, :].astype(q.dtype) for x in self._sinusoids(positions))
        return jnp.concatenate([b * sin - a * cos, a * sin + b * cos], axis=-1)

    def key_features(self, positions: Int[Array, "*b s"]) -> Float[Array, "*b s r"]:
        """Returns the features that are appended to keys."""
        return jnp.concatenate(self._sinusoids(positions), axis=-1)

    def _sinusoids(self, positions: Array) -> tuple[Array, Array]:
        """Sine and cosine of a position at frequencies from 1 down to nearly 1 / 10,000 (arXiv:1706.03762)."""
        pairs = self.weight.shape[1] // 2
        angles = positions[..., None] * 10_000.0 ** (-jnp.arange(pairs) / pairs)
        return jnp.sin(angles), jnp.cos(angles)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi, float32 [heads] (arXiv:2108.12409).

    2^(-8 (h + 1) / H) for H a power of two; else those of the power below, then every other of the power above.
    """

    def slopes(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    power = 1 << (heads.bit_length() - 1)
    return np.concatenate([slopes(power), slopes(2 * power)[::2][: heads - power]]).astype(np.float32)
