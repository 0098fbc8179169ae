"""Rows moved to other places, in both directions by gathering: no scatter adds them up in the backward pass."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def move_rows(x: Float[Array, "n m"], source: Int[Array, " r"], copies: Int[Array, "n k"]) -> Float[Array, "r m"]:
    """Row i of the result is row `source[i]` of `x`, zeros where there is none.

    Args:
      x: rows.
      source: for each row of the result a row of `x`; n for none.
      copies: for each row of `x` the at most k rows of the result that are copies of it; r fills the list. It says
        the same as `source`, and the backward pass sums over it.
    """
    return _take(x, source)


def _move_forward(x, source, copies):
    return _take(x, source), copies


def _move_backward(copies, g):
    return _take(g, copies).sum(axis=1), None, None


def _take(x: Array, at: Array) -> Array:
    return x.at[at].get(mode="fill", fill_value=0)


move_rows.defvjp(_move_forward, _move_backward)
