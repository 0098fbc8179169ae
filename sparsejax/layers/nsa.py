"""Native sparse attention: compressed keys, the blocks that they point to, and a window."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.caching import chunk_positions, extend_keys, write_slots
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import AttendingConfig, Cache, Mixer, implementation_names
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, output_scale, parameter
from sparsejax.ops import (
    AttentionCall,
    Selection,
    attend,
    attend_cached,
    attend_cached_selection,
    attention_flops,
    measure_selection,
    nsa,
    nsa_pairs,
)
from sparsejax.ops.blocks import Windows, make_blocks, make_windows
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.selectors import Segments
from sparsejax.ops.softmax import confine_nan

BRANCHES = ("compress", "select", "window")
COMPRESSIONS = ("mlp", "mean")
CAUSAL = patterns.Causal()
Pair = tuple[Array, Array]  # keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaConfig(AttendingConfig):
    """Causal attention in three branches, each with keys and values of its own.

    | branch | a query attends to |
    |---|---|
    | compress | a key and a value per window of `compress_length` tokens, for the windows that end at or before it |
    | select | the tokens of `count` blocks, whose windows have the largest probabilities in the compress branch |
    | window | the last `window` tokens |

    The output is their sum, each times a sigmoid of a linear map of the input per query head. The query heads of a
    key/value head select together. Gradients flow through all branches, and not through the choice of blocks.

    Windows and blocks are counted from the start of each document. A window is compressed before the rotation, and
    its key rotated at its first token. The defaults are the sizes of the paper.
    """

    heads: int  # number of query heads
    kv_heads: int  # number of key/value heads, which divides heads
    head_width: int  # width of queries and keys per head
    value_width: int | None = None  # width of values per head; none for head_width
    rope: RopeConfig | None  # rotary positions; none for no rotation
    qk_norm: NormConfig | None  # norm of the queries and of the keys of a head, before the rotation; none for no norm
    impl: str = dataclasses.field(metadata={"resume": "rounding"})  # implementation of `ops.attend`
    compress: str = "mlp"  # mlp, with a learned embedding per position in a window, or mean
    compress_length: int = 32  # tokens per window, a multiple of compress_stride
    compress_stride: int = 16  # tokens from one window to the next
    compress_width: int | None = None  # width of the hidden layer of the mlp; none for the width of a key or value
    select_block: int = 64  # tokens per block, a multiple of compress_stride
    count: int = 16  # blocks per query, with those that are always selected
    initial: int = 1  # first blocks of the document, which are always selected
    local: int = 2  # last blocks, with that of the query, which are always selected
    window: int = 512  # tokens of the window, with the query
    shared_kv: bool = False  # use the same keys and values in all branches

    def __post_init__(self):
        require_at_least(self, 1, "heads", "kv_heads", "head_width", "value_width", "compress_stride", "compress_width")
        require_at_least(self, 1, "select_block", "count", "local", "window")
        require_at_least(self, 2, "compress_length")
        require_at_least(self, 0, "initial")
        require_choice(self, "impl", implementation_names())
        require_choice(self, "compress", COMPRESSIONS)
        if self.heads % self.kv_heads:
            raise InputError("heads", f"{self.heads} is not divisible by kv_heads = {self.kv_heads}")
        for name in ("compress_length", "select_block"):
            if (size := getattr(self, name)) % self.compress_stride:
                raise InputError(name, f"{size} is not a multiple of compress_stride = {self.compress_stride}")
        if self.count < self.initial + self.local:
            raise InputError("count", f"{self.count} is below initial + local = {self.initial + self.local}")
        if self.compress == "mean" and self.compress_width is not None:
            raise InputError("compress_width", f"{self.compress_width} applies to compress = 'mlp' only")
        if self.rope is not None:
            self.rope.width(self.head_width)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return (
            f"nsa {self.heads}/{self.kv_heads} x {self.head_width}, {self.compress} of {self.compress_length} / "
            f"{self.compress_stride}, top {self.count} blocks of {self.select_block}, window of {self.window}"
        )

    @property
    def selects(self) -> bool:
        """Queries choose their blocks."""
        return True

    def check(self, length: int) -> None:
        """Raises InputError if a window to compress or a block is longer than `length` tokens."""
        for name in ("compress_length", "select_block"):
            if getattr(self, name) > length:
                raise InputError(name, f"{getattr(self, name)} is above the {length} tokens of a sequence")


class Compressor(nnx.Module):
    """Maps the keys or values of a window to a single vector: an MLP over all of their numbers.

    A learned embedding per position in the window is added to them. Key/value heads share the parameters.
    """

    def __init__(self, length: int, width: int, hidden: int, stream: Stream, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, (None, None), dtype=stream.dtype, rngs=rngs)

        self.positions = parameter(rngs, jax.nn.initializers.normal(0.02), (length, width), (None, None))
        self.up, self.down = linear(length * width, hidden), linear(hidden, width)

    def __call__(self, windows: Float[Array, "b n length g d"]) -> Float[Array, "b n g d"]:
        """Compresses each window."""
        x = windows + self.positions[...][:, None].astype(windows.dtype)
        x = jnp.moveaxis(x, 3, 2)
        return self.down(jax.nn.gelu(self.up(x.reshape(*x.shape[:3], -1))))


class Nsa(Mixer):
    """Native sparse attention (NSA, arXiv:2502.11089)."""

    def __init__(self, config: NsaConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        h, g, key, value = config.heads, config.kv_heads, config.head_width, config.value_width or config.head_width

        def project(outputs: int) -> Linear:
            return Linear(stream.width, outputs, ("width", "heads"), dtype=stream.dtype, rngs=rngs)

        def compressor(width: int) -> Compressor | None:
            if config.compress == "mean":
                return None
            return Compressor(config.compress_length, width, config.compress_width or width, stream, rngs)

        names = ("shared",) if config.shared_kv else BRANCHES
        self.query, self.gate = project(h * key), project(h * len(BRANCHES))
        self.keys = nnx.Dict({name: project(g * key) for name in names})
        self.values = nnx.Dict({name: project(g * value) for name in names})
        self.query_norm = make_norm(config.qk_norm, key, rngs, axis=None)
        self.key_norms = nnx.Dict({name: make_norm(config.qk_norm, key, rngs, axis=None) for name in names})
        self.compress_key, self.compress_value = compressor(key), compressor(value)
        axes, scale = ("heads", "width"), output_scale(stream)
        self.out = Linear(h * value, stream.width, axes, dtype=stream.dtype, rngs=rngs, scale=scale)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence.

        Raises:
          InputError: There are run-time globals, which NSA does not support.
        """
        if context.extras.globals is not None:
            raise InputError("globals", "native sparse attention does not support run-time globals")
        x, segments = context.tokens.zero_padding(x), context.tokens.attend_segments
        q, pairs = self._project(x, jnp.arange(x.shape[1]))
        distant, selection = self._attend_sequence(q, pairs["compress"], segments)
        options = {"impl": self.config.impl, "scale": self._scale, "segment_ids": segments}
        selected = attend(q, *pairs["select"], CAUSAL, selection=selection, **options)
        near = attend(q, *pairs["window"], self._window, **options)
        return self._project_out(x, distant, cast(Array, selected), cast(Array, near))

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the blocks of the branch "select"."""
        x = context.tokens.zero_padding(x)
        q, pairs = self._project(x, jnp.arange(x.shape[1]))
        return {"": self._attend_sequence(q, pairs["compress"], context.tokens.attend_segments)[1]}

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selected blocks."""
        x, segments = context.tokens.zero_padding(x), context.tokens.attend_segments
        q, pairs = self._project(x, jnp.arange(x.shape[1]))
        _, selection = self._attend_sequence(q, pairs["compress"], segments)
        k, options = pairs["select"][0], {"scale": self._scale, "segments": segments}
        return measure_selection(selection, q, k, CAUSAL, **options)._asdict()

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions.

        It holds compressed keys and values, and the last tokens of windows that have not ended; the keys and values of
        all tokens, which any query may select; and those of the window, in a ring.
        """
        config = self.config
        windows = make_windows(length, config.compress_length, config.compress_stride).count
        ring = patterns.plan_cache(self._window, length).count

        def empty(*shape: int) -> Cache:
            widths = {"k": config.head_width, "v": config.value_width or config.head_width}
            return {name: jnp.zeros((batch, *shape, width), self.out.dtype) for name, width in widths.items()}

        g = config.kv_heads
        latest = empty(config.compress_length - 1, g)
        return {"compress": empty(windows, g), "latest": latest, "select": empty(length, g), "window": empty(g, ring)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens; compresses only windows that end in the chunk."""
        at, tokens, scale = chunk_positions(positions, x.shape[1]), context.tokens, self._scale
        q, pairs = self._project(x, at)
        after = self._extend_windows(pairs["compress"], cache, positions, tokens)
        plan, ring = (patterns.plan_cache(pattern, length) for pattern in (CAUSAL, self._window))
        q, k, v = confine_nan(q, *pairs["select"])
        new = {"k": k, "v": v}
        after["select"], keys, keys_at = extend_keys(plan, cache["select"], new, positions, tokens, axis=1)
        windows, compressed = self._make_windows(length), (after["compress"][name] for name in "kv")
        distant, selection = self._attend_windows(q, *compressed, windows, positions=(at, keys_at), length=length)
        selected = attend_cached_selection(q, keys["k"], keys["v"], selection, CAUSAL, at, keys_at, length, scale=scale)
        _, k, v = confine_nan(q, *pairs["window"])
        new = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
        after["window"], keys, keys_at = extend_keys(ring, cache["window"], new, positions, tokens, axis=2)
        near = attend_cached(q, keys["k"], keys["v"], self._window, at, keys_at, length, scale=scale)
        return self._project_out(x, distant, selected, near), after

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention in the branch of selected blocks."""
        x, segments = context.tokens.zero_padding(x), context.tokens.attend_segments
        q, pairs = self._project(x, jnp.arange(x.shape[1]))
        _, selection = self._attend_sequence(q, pairs["compress"], segments)
        call = AttentionCall(q, *pairs["select"], CAUSAL, self._scale, None, None, segments, None)
        return {"": selected_call(call, selection)}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, of the compression, and of attention in the three branches."""
        config, size = self.config, self.config.compress_length
        sizes = size, config.compress_stride, config.select_block, config.count, config.window
        pairs, windows = config.heads * nsa_pairs(length, *sizes), max((length - size) // config.compress_stride + 1, 0)
        widths = {"score_width": config.head_width, "value_width": config.value_width or config.head_width}
        tiles = attention_cost(CAUSAL, length, heads=config.heads, **widths).tiles
        linear = self.query, self.gate, self.out, *self.keys.values(), *self.values.values()
        compressors = [part for part in (self.compress_key, self.compress_value) if part is not None]
        per_window = config.kv_heads * sum(part.up.flops + part.down.flops for part in compressors)
        flops = attention_flops(pairs, *widths.values()) + windows * per_window
        return Cost(pairs, sum(part.flops for part in linear) + flops / max(length, 1), tiles)

    @property
    def _scale(self) -> float:
        return self.config.head_width**-0.5

    @property
    def _window(self) -> patterns.Pattern:
        return CAUSAL & patterns.Window(self.config.window - 1)

    def _make_windows(self, length: int, segments: Segments = None) -> Windows:
        config, ids = self.config, None if segments is None else segments[1]
        return make_windows(length, config.compress_length, config.compress_stride, ids)

    def _project(self, x: Array, positions: Array) -> tuple[Array, dict[str, Pair]]:
        """Queries, and keys and values by branch; keys that are to be compressed are not rotated."""

        def split(x: Array, heads: int) -> Array:
            return x.reshape(*x.shape[:2], heads, -1)

        g = self.config.kv_heads
        q = normalize(self.query_norm, split(self.query(x), self.config.heads))
        keys = {name: normalize(self.key_norms[name], split(linear(x), g)) for name, linear in self.keys.items()}
        values = {name: split(linear(x), g) for name, linear in self.values.items()}
        rotated = {name: self._rotate(k, positions) for name, k in keys.items()}
        pairs = {}
        for branch in BRANCHES:
            name = "shared" if self.config.shared_kv else branch
            pairs[branch] = (keys if branch == "compress" else rotated)[name], values[name]
        return self._rotate(q, positions), pairs

    def _rotate(self, x: Array, positions: Array) -> Array:
        return x if self.config.rope is None else rotate(x, positions, self.config.rope)

    def _compress(self, k: Array, v: Array, starts: Array) -> Pair:
        """A key and a value per window [b, n, length, g, d]."""
        if self.compress_key is None or self.compress_value is None:
            k, v = k.mean(axis=2), v.mean(axis=2)
        else:
            k, v = self.compress_key(k), self.compress_value(v)
        return self._rotate(k, starts), v

    def _attend_sequence(self, q: Array, pair: Pair, segments: Segments) -> tuple[Array, Selection]:
        """The output of the compress branch, and the blocks that it chooses."""
        windows = self._make_windows(q.shape[1], segments)
        k, v = self._compress(*map(windows.split, pair), windows.starts)
        return self._attend_windows(q, k, v, windows, segments=segments, length=q.shape[1])

    def _attend_windows(
        self, q: Array, k: Array, v: Array, windows: Windows, *, length: int, segments: Segments = None, **options: Any
    ) -> tuple[Array, Selection]:
        config = self.config
        blocks = make_blocks(length, config.select_block, None if segments is None else segments[1])
        forced = {"initial": config.initial, "local": config.local}
        options |= {"scale": self._scale, "segments": segments, "length": length}
        return nsa(q, k, v, windows, blocks, config.count, CAUSAL, **forced, **options)

    def _extend_windows(self, pair: Pair, cache: Cache, positions: Array, tokens: Tokens) -> Cache:
        """Compresses the windows that end in a chunk, and keeps the tokens that later windows need."""
        config, size, past = self.config, pair[0].shape[1], self.config.compress_length - 1
        count = tokens.count(pair[0].shape[:2])[:, None]
        first = -(-jnp.maximum(positions - past, 0) // config.compress_stride)
        numbers = first[:, None] + jnp.arange(-(-size // config.compress_stride))
        starts, at = numbers * config.compress_stride, positions[:, None]
        complete = Tokens(mask=starts + config.compress_length <= at + count)
        indices = (starts - at + past)[..., None] + jnp.arange(config.compress_length)
        take = jax.vmap(lambda x, indices: x.at[indices].get(mode="clip"))
        joined = [
            jnp.concatenate([cache["latest"][name], x.astype(cache["latest"][name].dtype)], axis=1)
            for name, x in zip("kv", pair, strict=True)
        ]
        compressed, new = cache["compress"], self._compress(*(take(x, indices) for x in joined), starts)
        return {
            "compress": {
                name: write_slots(compressed[name], x, numbers, complete) for name, x in zip("kv", new, strict=True)
            },
            "latest": {name: take(x, count + jnp.arange(past)) for name, x in zip("kv", joined, strict=True)},
        }

    def _project_out(self, x: Array, *branches: Array) -> Array:
        """The gated sum of the branches [b, t, h, d]."""
        gates = jax.nn.sigmoid(self.gate(x)).reshape(*x.shape[:2], -1, len(BRANCHES))
        y = sum((gates[..., i, None] * y.astype(x.dtype) for i, y in enumerate(branches)), jnp.zeros((), x.dtype))
        return self.out(y.reshape(*x.shape[:2], -1))
