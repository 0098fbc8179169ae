"""Attention over tile lists on TPUs: Mosaic kernels that visit the live tiles and no others.

The grid has a step for each entry of the lists; they are in scalar memory, a word each, and say which blocks of the
arrays a step reads (`PrefetchScalarGridSpec`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import flash
from sparsejax.ops.kernels.flash import LOG2E, LOWEST, Back, Backend, Inputs, Spec, bound_scores, score_unit
from sparsejax.ops.kernels.lists import FULL, PARTIAL, Part, TileLists, Walk, mark_ends, pack_words
from sparsejax.ops.kernels.mesh import device_kind, run_on_mesh
from sparsejax.ops.softmax import MASKED
from sparsejax.patterns import Pattern

LANES = 128
SIDES = (128, 256, 512)  # of tiles
# A step costs about as much as so many pairs, beside its own: 0.35 us, where a tile of 512 x 512 takes 1.3 us (v5e).
# Modelled, not measured.
STEP_PAIRS = 70_000
MOST_WORDS = 2**17  # of lists in one call, with the indices of masks: half of the 1 MiB of scalar memory
MOST_KEPT = 4  # masks: a MiB each in vector memory, at the largest tile
NN, NT, TN = ((((x,), (y,)), ((), ())) for x, y in ((1, 0), (1, 1), (0, 0)))  # of products; T: transposed


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    kind = None if call.interpret else device_kind()
    reasons = (
        (
            not call.interpret and not _serves(kind),
            f"it needs a TPU v5e or newer, or interpret=True; here is {kind}",
        ),
        (call.dtype != jnp.float32, f"it computes in float32, asked is {call.dtype}"),
    )
    return next((reason for applies, reason in reasons if applies), None) or flash.unsupported_reason(call)


def run(
    call: AttentionCall, tile: tuple[int, int] | None = None, selected: Int[Array, "#b h rows k"] | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32.

    Args:
      call: what is asked.
      tile: queries and keys of a tile, multiples of 128; the best by `choose_tile` if not given.
      selected: as in `flash.attend_lists`; needs `tile`.
    """
    if selected is not None:
        return _run_here(call, tile, selected)
    return run_on_mesh(functools.partial(_run_here, tile=tile, selected=None), call)


def _run_here(call: AttentionCall, tile: tuple[int, int] | None, selected: Array | None) -> tuple[Array, Array]:
    tile = tile or choose_tile(call.pattern, call.q.shape[1], call.k.shape[1])
    if call.q.dtype != jnp.float16:
        return flash.attend_lists(BACKEND, call, tile, selected)
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}  # the machine has no float16
    out, lse = flash.attend_lists(BACKEND, dataclasses.replace(call, **wide), tile, selected)
    return out.astype(jnp.float16), lse


def choose_tile(pattern: Pattern, t: int, s: int) -> tuple[int, int]:
    """The square that a model of the machine finds the fastest for t queries and s keys: few steps, few dead pairs."""
    longest = max(SIDES[0], 2 ** math.ceil(math.log2(max(t, s, 1))))
    cost = {n: pattern.tiles(t, s, (n, n))[0] * (n * n + STEP_PAIRS) for n in SIDES if n <= longest}
    best = min(cost, key=cost.get)
    return best, best


def _serves(kind: str) -> bool:
    return kind.startswith("TPU") and not kind.startswith(("TPU v2", "TPU v3", "TPU v4"))


# The lists in scalar memory.


@dataclasses.dataclass(frozen=True)
class Word:
    """How an entry of a list is packed, from the low bits: kind 2, first 1, last 1, mask, head, column, row."""

    mask: int  # bits
    head: int
    column: int

    @classmethod
    def of(cls, spec: Spec, rows: int, columns: int) -> Word:
        """For so many rows and columns.

        Raises:
          ValueError: they do not fit.
        """
        mask, head, row, column = (max(n - 1, 0).bit_length() for n in (len(spec.kept), spec.share, rows, columns))
        if 4 + mask + head + column + row > 32:
            raise ValueError(
                f"attend: tpu: {rows} x {columns} tiles of {spec.tile} do not fit into a word: larger tiles"
            )
        return cls(mask, head, column)

    def pack(self, lists: TileLists) -> Array:
        first, last = mark_ends(lists.rows)
        word = (lists.rows << self.column | lists.columns) << self.head | lists.heads
        word = word << self.mask | lists.masks if self.mask else word
        return word << 4 | last * 8 | first * 4 | lists.kinds

    def row(self, word):
        return lax.shift_right_logical(word, 4 + self.mask + self.head + self.column)

    def column_of(self, word):
        return lax.shift_right_logical(word, 4 + self.mask + self.head) & (1 << self.column) - 1

    def head_of(self, word):
        return lax.shift_right_logical(word, 4 + self.mask) & (1 << self.head) - 1

    def mask_of(self, word):
        return lax.shift_right_logical(word, 4) & (1 << self.mask) - 1


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one call's grid: sequences x heads of the part x entries of the longest list."""

    spec: Spec
    part: Part
    word: Word
    entries: int
    own_lists: bool  # each sequence has lists of its own
    by_column: bool  # rows of the lists are key tiles: for dk and dv
    tiles: tuple[int, int]  # of queries and of keys, in all

    @classmethod
    def of(cls, spec: Spec, part: Part, walk: Walk, inputs: Inputs, by_column: bool) -> Steps:
        tiles = inputs.q.shape[2] // spec.tile[0], inputs.k.shape[2] // spec.tile[1]
        word = Word.of(spec, part.stop - part.start, tiles[0] if by_column else tiles[1])
        return cls(spec, part, word, walk.lists.rows.shape[1], walk.which.shape[0] > 1, by_column, tiles)

    def scalars(self, walk: Walk, inputs: Inputs) -> tuple[Array, ...]:
        """What the grid reads from scalar memory, int32 [n] each; see `Place`."""
        ranges = np.zeros(1)
        if inputs.segments is not None:
            ends = flash.segment_ranges(inputs.segments, self.spec.tile)
            ranges = jnp.concatenate([x.ravel() for pair in ends for x in pair])
        found = self.word.pack(walk.lists), walk.which, np.array(self.part.heads)
        masks = np.zeros(1) if inputs.bits is None else walk.lists.masks
        return tuple(jnp.asarray(x, jnp.int32).ravel() for x in (*found, masks, ranges))

    def place(self, b: Any, member: Any, entry: Any, *scalars: Any) -> Place:
        words, which, heads, masks, ranges = scalars
        slot = which[b * len(self.part.heads) + member if self.own_lists else member] * self.entries + entry
        word = words[slot]
        row, column = self.part.start + self.word.row(word), self.word.column_of(word)
        head, tiles = heads[member], (column, row) if self.by_column else (row, column)
        head = head * self.spec.share + self.word.head_of(word) if self.by_column else head
        return Place(self, b, member, entry, head, *tiles, word, slot, masks, ranges)

    def block(self, shape: tuple[int | None, ...], index: Callable[[Place], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *ids: index(self.place(*ids)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step is: sequence, member of the part, entry of its list, query head, tile of queries and of keys."""

    steps: Steps
    b: Any
    member: Any
    entry: Any
    head: Any
    q_tile: Any
    k_tile: Any
    word: Any
    slot: Any
    masks: Any
    ranges: Any

    @property
    def kind(self):
        return self.word & 3

    @property
    def first(self):
        return (self.word & 4) != 0

    @property
    def last(self):
        return (self.word & 8) != 0

    def meets(self):
        """Whether the ranges of the tile's segment ids have an id in common."""
        (rows, columns), sequences = self.steps.tiles, self.ranges.shape[0] // 2 // sum(self.steps.tiles)
        q, k = self.b * rows + self.q_tile, 2 * sequences * rows + self.b * columns + self.k_tile
        low, high = self.ranges[q], self.ranges[sequences * rows + q]
        return (low <= self.ranges[sequences * columns + k]) & (self.ranges[k] <= high)


# What every kernel does with a tile. The scores of one are [queries, keys] in the forward pass and [keys, queries] in
# the backward passes (`turned`), so that what there is of each query is a row and of each key never needed.


def _scores(spec: Spec, q: Array, k: Array, turned: bool) -> Array:
    return bound_scores(spec, _dot(k, q, NT) if turned else _dot(q, k, NT))


def _mask(place: Place, refs: dict, scores: Array, partial: bool, turned: bool) -> Array:
    """The scores that count; MASKED for the others."""
    allowed = []
    if partial and "bits" in refs:
        allowed.append(_unpack(refs["bits"][...], scores.shape))
    elif partial and "kept" in refs:
        scores = scores + refs["kept"][place.steps.word.mask_of(place.word)]
    elif partial:
        allowed.append(_evaluate(place.steps.spec, place.q_tile, place.k_tile, turned))
    if "q_ids" in refs:
        q, k = refs["q_ids"][...], refs["k_ids"][...]
        allowed.append(q == k.T if turned else k == q.T)
    return jnp.where(functools.reduce(jnp.logical_and, allowed), scores, MASKED) if allowed else scores


def _keep_masks(place: Place, refs: dict, turned: bool) -> None:
    """What is added to the scores of partial tiles, computed once for all of a head's: 0 or MASKED."""
    if "kept" not in refs:
        return
    spec = place.steps.spec

    @pl.when(place.entry == 0)
    def compute():
        for i, tiles in enumerate(spec.kept):
            refs["kept"][i] = jnp.where(_evaluate(spec, *tiles, turned), 0.0, MASKED)


def _evaluate(spec: Spec, q_tile: Any, k_tile: Any, turned: bool) -> Array:
    """The pattern's formula in a tile."""
    (height, width), (q_axis, k_axis) = spec.tile, (1, 0) if turned else (0, 1)
    q = q_tile * height + lax.broadcasted_iota(jnp.int32, _along(height, q_axis), q_axis)
    k = k_tile * width + lax.broadcasted_iota(jnp.int32, _along(width, k_axis), k_axis)
    allowed = spec.pattern.allows(q, k, spec.t, spec.s)
    return allowed & (k < spec.s) if spec.s % width else allowed


def _along(size: int, axis: int) -> tuple[int, int]:
    return (size, 1) if axis == 0 else (1, size)


def _unpack(words: Array, shape: tuple[int, int]) -> Array:
    """What `pack_words` made of a mask of this shape."""
    spread = jnp.repeat(words, 32, axis=0)
    bit = lax.broadcasted_iota(jnp.int32, shape, 0) & 31
    return lax.shift_right_logical(spread, bit) & 1 != 0


def pack_bits(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks [distinct, queries, keys] as `_unpack` reads them: for the forward and for the backward passes."""
    return pack_words(masks), pack_words(masks.swapaxes(1, 2))


def _dot(x: Array, y: Array, dims) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _spread(x: Array, size: int) -> Array:
    """[rows, 128], each row one number, as [rows, size]."""
    return jnp.tile(x, (1, size // LANES)) if size % LANES == 0 else x[:, :size]


def _visit(place: Place, refs: dict, step: Callable[[bool], None]) -> None:
    """A live tile: with a mask of the pattern, or without."""
    live = place.meets() if "q_ids" in refs else True
    pl.when((place.kind == FULL) & live)(lambda: step(False))
    pl.when((place.kind == PARTIAL) & live)(lambda: step(True))


# The kernels. `refs` are the blocks of the inputs by name.


def _forward_kernel(place: Place, refs: dict, out, lse, top, total, acc):
    spec = place.steps.spec
    unit = score_unit(spec)
    _keep_masks(place, refs, turned=False)

    @pl.when(place.first)
    def start():
        sink = refs["sink"][place.head] / unit if "sink" in refs else None
        low = jnp.full(top.shape, LOWEST, jnp.float32)
        top[...] = low if sink is None else jnp.maximum(low, sink)
        total[...] = jnp.zeros_like(total) if sink is None else jnp.exp2((sink - top[...]) * (unit * LOG2E))
        acc[...] = jnp.zeros_like(acc)

    def step(partial):
        scores = _scores(spec, refs["q"][...], refs["k"][...], turned=False)
        scores = _mask(place, refs, scores, partial, turned=False)
        before = top[...]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        terms = jnp.exp2((scores - _spread(now, scores.shape[1])) * (unit * LOG2E))
        fade = jnp.exp2((before - now) * (unit * LOG2E))
        top[...] = now
        total[...] = fade * total[...] + terms.sum(axis=1, keepdims=True)
        value = refs["v"][...]
        acc[...] = acc[...] * _spread(fade, acc.shape[1]) + _dot(terms.astype(value.dtype), value, NN)

    _visit(place, refs, step)

    @pl.when(place.last)
    def finish():
        live = total[...] > 0
        safe = jnp.where(live, total[...], 1.0)
        out[...] = (acc[...] * _spread(1 / safe, acc.shape[1])).astype(out.dtype)
        found = jnp.where(live, top[...] * unit + jnp.log(safe), -jnp.inf)
        if "sink" in refs:  # alone in its row, to the last bit
            sink = refs["sink"][place.head]
            found = jnp.where((top[...] == sink / unit) & (total[...] == 1), sink, found)
        lse[...] = found[:, :1].T


def _differentiate(place: Place, refs: dict, partial: bool) -> tuple[Array, Array]:
    """Weights of a tile, and the gradient of q·k, [keys, queries] each."""
    spec = place.steps.spec
    scores = _scores(spec, refs["q"][...], refs["k"][...], turned=True)
    bend = None if spec.softcap is None else 1 - scores * scores
    scores = _mask(place, refs, scores, partial, turned=True)
    weights = jnp.exp2((scores - refs["lse"][...] / score_unit(spec)) * (score_unit(spec) * LOG2E))
    d_scores = weights * (_dot(refs["v"][...], refs["d_out"][...], NT) + refs["slope"][...])
    return weights, d_scores if bend is None else d_scores * bend


def _d_queries_kernel(place: Place, refs: dict, d_q, acc):
    _keep_masks(place, refs, turned=True)

    @pl.when(place.first)
    def start():
        acc[...] = jnp.zeros_like(acc)

    def step(partial):
        _, d_scores = _differentiate(place, refs, partial)
        key = refs["k"][...]
        acc[...] += _dot(d_scores.astype(key.dtype), key, TN)

    _visit(place, refs, step)

    @pl.when(place.last)
    def finish():
        d_q[...] = (acc[...] * place.steps.spec.scale).astype(d_q.dtype)


def _d_keys_values_kernel(place: Place, refs: dict, d_k, d_v, acc_k, acc_v):
    _keep_masks(place, refs, turned=True)

    @pl.when(place.first)
    def start():
        acc_k[...], acc_v[...] = jnp.zeros_like(acc_k), jnp.zeros_like(acc_v)

    def step(partial):
        weights, d_scores = _differentiate(place, refs, partial)
        query, d_out = refs["q"][...], refs["d_out"][...]
        acc_v[...] += _dot(weights.astype(d_out.dtype), d_out, NN)
        acc_k[...] += _dot(d_scores.astype(query.dtype), query, NN)

    _visit(place, refs, step)

    @pl.when(place.last)
    def finish():
        d_k[...] = (acc_k[...] * place.steps.spec.scale).astype(d_k.dtype)
        d_v[...] = acc_v[...].astype(d_v.dtype)


# The calls.


def _forward(spec: Spec, part: Part, walk: Walk, inputs: Inputs) -> tuple[Array, Array]:
    steps, (height, _), e = Steps.of(spec, part, walk, inputs, by_column=False), spec.tile, inputs.v.shape[-1]
    b, rows = inputs.q.shape[0], (part.stop - part.start) * height
    outputs = [
        ((b, len(part.heads), rows, e), inputs.q.dtype, steps.block((None, None, height, e), _own_row)),
        ((b, len(part.heads), 1, rows), jnp.float32, steps.block((None, None, 1, height), _own_column)),
    ]
    scratch = [(height, LANES), (height, LANES), (height, e)]
    out, lse = _call(_forward_kernel, "attend_forward", steps, walk, inputs, None, outputs, scratch)
    return out, lse[:, :, 0]


def _d_queries(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> Array:
    steps, (height, _), (b, _, _, d) = Steps.of(spec, part, walk, inputs, by_column=False), spec.tile, inputs.q.shape
    shape = b, len(part.heads), (part.stop - part.start) * height, d
    outputs = [(shape, inputs.q.dtype, steps.block((None, None, height, d), _own_row))]
    (d_q,) = _call(_d_queries_kernel, "attend_d_queries", steps, walk, inputs, back, outputs, [(height, d)])
    return d_q


def _d_keys_values(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> tuple[Array, Array]:
    steps, (_, width), b = Steps.of(spec, part, walk, inputs, by_column=True), spec.tile, inputs.k.shape[0]
    widths, rows = (inputs.k.shape[-1], inputs.v.shape[-1]), (part.stop - part.start) * width
    outputs = [
        ((b, len(part.heads), rows, n), inputs.k.dtype, steps.block((None, None, width, n), _own_row)) for n in widths
    ]
    scratch = [(width, n) for n in widths]
    return _call(_d_keys_values_kernel, "attend_d_keys_values", steps, walk, inputs, back, outputs, scratch)


def _own_row(place: Place) -> tuple:
    """The block of an output of a part, positions before the width."""
    row = place.k_tile if place.steps.by_column else place.q_tile
    return place.b, place.member, row - place.steps.part.start, 0


def _own_column(place: Place) -> tuple:
    return place.b, place.member, 0, place.q_tile - place.steps.part.start


def _call(kernel, name: str, steps: Steps, walk: Walk, inputs: Inputs, back: Back | None, outputs, scratch):
    """One kernel over all steps. Outputs are (shape, dtype, block); scratch is float32 of these shapes."""
    blocks = _blocks(steps, inputs, back)
    scalars = steps.scalars(walk, inputs)
    if kept := len(steps.spec.kept):
        scratch = [(kept, *steps.spec.tile[:: 1 if back is None else -1]), *scratch]

    def body(*refs):
        place = steps.place(*(pl.program_id(i) for i in range(3)), *refs[: len(scalars)])
        named, rest = refs[len(scalars) :][: len(blocks)], refs[len(scalars) + len(blocks) :]
        named = dict(zip(blocks, named, strict=True))
        if kept:
            outs, (masks, *own) = rest[: len(outputs)], rest[len(outputs) :]
            named, rest = named | {"kept": masks}, (*outs, *own)
        kernel(place, named, *rest)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(inputs.q.shape[0], len(steps.part.heads), steps.entries),
            in_specs=[block for _, block in blocks.values()],
            out_specs=[block for *_, block in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[_shape_like(inputs.q, shape, dtype) for shape, dtype, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=steps.spec.interpret,
        name=name,
    )(*scalars, *(array for array, _ in blocks.values()))


def _blocks(steps: Steps, inputs: Inputs, back: Back | None) -> dict[str, tuple[Array, pl.BlockSpec]]:
    """The inputs that a kernel reads, and which block of each in a step."""
    (height, width), share = steps.spec.tile, steps.spec.share

    def queries(x):
        return x, steps.block((None, None, height, x.shape[-1]), lambda at: (at.b, at.head, at.q_tile, 0))

    def keys(x):
        return x, steps.block((None, None, width, x.shape[-1]), lambda at: (at.b, at.head // share, at.k_tile, 0))

    def of_queries(x):
        return x[:, :, None], steps.block((None, None, 1, height), lambda at: (at.b, at.head, 0, at.q_tile))

    found = {"q": queries(inputs.q), "k": keys(inputs.k), "v": keys(inputs.v)}
    if back is None and inputs.sink is not None:
        found["sink"] = inputs.sink, pl.BlockSpec(memory_space=pltpu.SMEM)
    if back is not None:
        found |= {"d_out": queries(back.d_out), "lse": of_queries(back.lse), "slope": of_queries(back.slope)}
    if inputs.segments is not None:
        q_ids, k_ids = (x[:, None] for x in inputs.segments)
        found["q_ids"] = q_ids, steps.block((None, 1, height), lambda at: (at.b, 0, at.q_tile))
        found["k_ids"] = k_ids, steps.block((None, 1, width), lambda at: (at.b, 0, at.k_tile))
    if inputs.bits is not None:
        bits = inputs.bits[0 if back is None else 1]
        found["bits"] = bits, steps.block((None, *bits.shape[1:]), lambda at: (at.masks[at.slot], 0, 0))
    return found


def _shape_like(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Inside `shard_map` an output varies over the axes that the inputs vary over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


BACKEND = Backend(_forward, _d_queries, _d_keys_values, pack_bits, most=MOST_WORDS, most_kept=MOST_KEPT)
