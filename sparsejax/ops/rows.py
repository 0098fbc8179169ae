"""Gathers of rows whose backward pass is a gather too, instead of a scatter."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from sparsejax.ops.derivatives import with_derivatives


def move_rows(x: Float[Array, "n m"], source: Int[Array, " r"], copies: Int[Array, "n k"]) -> Float[Array, "r m"]:
    """Row i of the result is row `source[i]` of `x`, or zeros where `source[i]` is n.

    Args:
      x: Rows.
      source: Row of `x` per row of the result; n for none.
      copies: The at most k rows of the result that copy each row of `x`, padded with r: the inverse of `source`, over
        which the backward pass sums.
    """
    return _move(None, x, source, copies)


def _move_forward(_, x, source, copies):
    return _take(x, source), copies


def _move_backward(_, copies, g):
    return _take(g, copies).sum(axis=1), None, None


def _take(x: Float[Array, "n m"], rows: Int[Array, "*rows"]) -> Float[Array, "*rows m"]:
    return x.at[rows].get(mode="fill", fill_value=0)


_move = with_derivatives(_move_forward, _move_backward, lambda _, x, source, copies: _take(x, source), name=None)
