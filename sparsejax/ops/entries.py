"""Entries that summarize closed windows of tokens, and attention to them (CSA and HCA of DeepSeek-V4).

A window is `size` consecutive tokens, counted from the start of its document. It is closed at its last token, from
which on queries of the document see its entry. An incomplete last window has none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops.blocks import document_starts, make_blocks, put
from sparsejax.ops.selection import Selection, Visible, over_queries, sort_groups
from sparsejax.ops.softmax import MASKED, confine_nan, masked_softmax
from sparsejax.patterns import Causal


class ClosedWindows(NamedTuple):
    """The closed windows of a sequence, in order. The leading axis is 1 if all sequences have the same windows.

    Attributes:
      keys: Positions of the tokens; arbitrary for an index without a window.
      ends: Position of the last token; -1 for an index without a window.
      follows: Whether the window before it belongs to the same document.
      ids: Segment ids; None if the windows cover the sequence from its start, without gaps.
    """

    keys: Int[Array, "#b n size"]
    ends: Int[Array, "#b n"]
    follows: Bool[Array, "#b n"]
    ids: Int[Array, "#b n"] | None

    def split(self, x: Float[Array, "b s w"]) -> Float[Array, "b n size w"]:
        """Returns the features of the tokens of each window."""
        (b, _, w), (n, size) = x.shape, self.keys.shape[1:]
        if self.ids is None:
            return x[:, : n * size].reshape(b, n, size, w)
        return jnp.take_along_axis(x, self.keys.reshape(b, n * size, 1), axis=1).reshape(b, n, size, w)

    def restrict(self, shape: tuple[int, int], segments: Int[Array, "b t"] | None) -> dict[str, Any]:
        """Returns the options of `selection.select` by which queries of a causal pattern see the closed windows only.

        Args:
          shape: Numbers of sequences and of queries, which are at the positions 0, 1, ...
          segments: Segment ids of the queries; required with those of the windows.
        """
        ends = jnp.broadcast_to(self.ends, (shape[0], self.ends.shape[1]))
        ids = None if segments is None or self.ids is None else (segments, self.ids)
        return {"positions": (jnp.broadcast_to(jnp.arange(shape[1]), shape), ends), "segments": ids}


def close_windows(length: int, size: int, segments: Int[Array, "b s"] | None = None) -> ClosedWindows:
    """Returns the closed windows of a sequence.

    Args:
      length: Number of tokens.
      size: Tokens per window.
      segments: Segment ids of the tokens; each run of equal ids is a document.

    Raises:
      InputError: The size is below 1.
    """
    if size < 1:
        raise InputError("size", f"{size} is below 1")
    count = length // size
    if segments is None:
        keys = jnp.arange(count * size).reshape(1, count, size)
        return ClosedWindows(keys, keys[..., -1], jnp.arange(count)[None] > 0, None)
    offsets = jnp.arange(length) - document_starts(segments)
    closes = offsets % size == size - 1
    index = jnp.where(closes, jnp.cumsum(closes, axis=1) - 1, count)
    ends = put(jnp.arange(length)[None], index, count, -1)
    last = jnp.maximum(ends, size - 1)
    offsets, ids = (jnp.take_along_axis(x, last, axis=1) for x in (offsets, segments))
    return ClosedWindows(last[..., None] + jnp.arange(1 - size, 1), ends, offsets >= size, ids)


def cover_tokens(
    selection: Selection, windows: ClosedWindows, segments: Int[Array, "b t"] | None = None, *, overlap: bool = False
) -> Selection:
    """The tokens that the entries of a selection summarize, in blocks of the size of a window.

    Args:
      selection: Selected entries, whose blocks are single entries.
      windows: The windows of the entries.
      segments: Segment ids of the tokens.
      overlap: Whether an entry covers the window before too.
    """
    groups, size = selection.groups, windows.keys.shape[-1]
    blocks = make_blocks(groups.shape[2], size, segments)
    shape = len(groups), *groups.shape[1:]

    def take(x: Array) -> Array:
        x = jnp.broadcast_to(x, (len(groups), *x.shape[1:]))
        return jnp.take_along_axis(x, jnp.maximum(groups, 0).reshape(len(groups), -1), axis=1).reshape(shape)

    ends = jnp.maximum(windows.ends, 0)
    of_entry = jnp.take_along_axis(jnp.broadcast_to(blocks.of_key, (len(ends), blocks.of_key.shape[1])), ends, axis=1)
    covered = jnp.where(groups < 0, -1, take(of_entry))
    if overlap:
        before = jnp.where((groups >= 0) & take(windows.follows), covered - 1, -1)
        is_new = before != jnp.pad(covered[..., :-1], ((0, 0),) * 3 + ((1, 0),), constant_values=-1)
        covered = jnp.concatenate([covered, jnp.where(is_new, before, -1)], axis=-1)
    return Selection(sort_groups(covered, blocks.count), blocks)


def compress_windows(
    values: Float[Array, "b s w"],
    gates: Float[Array, "b s w"],
    bias: Float[Array, "size w"],
    windows: ClosedWindows,
    *,
    overlap: bool = False,
) -> Float[Array, "b n d"]:
    """The mean over the tokens of each window, weighted per channel by the softmax of gates and biases, in float32.

    With `overlap` there are two series, the halves of the last axis. An entry is the mean over 2 · size tokens: the
    first series of the window before, unless that is of another document, and the second of the window itself.

    Args:
      values: Features of the tokens.
      gates: Scores of the tokens.
      bias: Added to the gates, by place in the window.
      windows: The windows.
      overlap: Whether an entry covers the window before too; d is then w / 2.
    """
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    v, g = windows.split(values).astype(dtype), windows.split(gates).astype(dtype) + bias
    if overlap:
        (v_before, v), (g_before, g) = (jnp.split(x, 2, axis=-1) for x in (v, g))
        v_before, g_before = (
            jnp.where(windows.follows[..., None, None], jnp.roll(x, 1, axis=1), fill)
            for x, fill in ((v_before, 0.0), (g_before, MASKED))
        )
        v, g = (jnp.concatenate(parts, axis=2) for parts in ((v_before, v), (g_before, g)))
    return (jax.nn.softmax(g, axis=2) * v).sum(axis=2).astype(values.dtype)


def attend_entries(
    q: Float[Array, "b t h d"],
    entries: Float[Array, "b n d"],
    windows: ClosedWindows,
    *,
    scale: float,
    segments: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Softmax attention of every query to all entries that it sees, which are keys and values of all heads.

    Memory grows with the number of queries plus that of entries.

    Args:
      q: Queries.
      entries: An entry per window; at least one.
      windows: The windows.
      scale: Factor on the scores.
      segments: Segment ids of the queries, required with those of the windows.

    Returns:
      The output, zeros for a query that sees no entry, and the log-sum-exp, minus infinity for it.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, keys, values = (x.astype(dtype) for x in confine_nan(q, entries, entries))

    def attend(entries: tuple[Array, Array], q: Array, visible: Visible) -> tuple[Array, Array]:
        keys, values = entries
        scores = jnp.einsum("bchd,bnd->bhcn", q, keys) * scale
        p, lse = masked_softmax(scores, visible.keys[:, None], None)
        return jnp.einsum("bhcn,bnd->bhcd", p, values), lse

    blocks, options = make_blocks(entries.shape[1], 1), windows.restrict(q.shape[:2], segments)
    out, lse = over_queries(attend, q, (keys, values), Causal(), blocks, **options)
    return out.astype(entries.dtype), lse
