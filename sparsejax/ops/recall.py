"""How well a selection serves an attention, as metrics of training."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sparsejax.ops.selection import Selection, Visible, find_largest, over_queries
from sparsejax.ops.softmax import masked_softmax
from sparsejax.patterns import Pattern


class SelectionMetrics(NamedTuple):
    """Metrics of a selection, means over the queries.

    Attributes:
      mass: Share of the attention to all allowed keys that falls on the chosen ones, over heads and over the queries
        that leave out a key. 1 if no query leaves out any.
      recall: `mass` relative to that of the best choice of as many groups, by the mean over the heads that choose
        together: recall@k.
      forced: Share of the chosen groups that are chosen whatever their score.
      entropy: Entropy of how often each group is chosen, relative to that of equally often, in [0, 1]; a low value
        means that all queries choose the same groups.
    """

    mass: Float[Array, ""]
    recall: Float[Array, ""]
    forced: Float[Array, ""]
    entropy: Float[Array, ""]


def measure_selection(
    selection: Selection,
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    pattern: Pattern,
    *,
    scale: float,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
) -> SelectionMetrics:
    """Compares a selection with dense attention, whose scores are computed for a chunk of queries at a time.

    Args:
      selection: The selection.
      q: Queries.
      k: Keys.
      pattern: The allowed keys.
      scale: Factor on q·k.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`.
    """
    (b, t, h, d), g = q.shape, k.shape[2]
    q, dtype = q.reshape(b, t, g, h // g, d), jnp.promote_types(q.dtype, jnp.float32)

    def compare(k: Array, chunk: PyTree, visible: Visible) -> Float[Array, "b 3 c"]:
        q, groups = chunk
        logits = scale * jnp.einsum("bcgrd,bsgd->bgrcs", q.astype(dtype), k.astype(dtype))
        p, _ = masked_softmax(logits, visible.keys[:, None, None], None)
        scopes, count = groups.shape[2:]
        p = p.reshape(b, scopes, h // scopes, *p.shape[3:]).mean(axis=2)  # of the heads that choose together
        chosen = Selection(jnp.moveaxis(groups, 1, 2), selection.blocks).mask & visible.keys[:, None]
        weights = (visible.keys[:, None] & ~chosen).any(axis=-1).astype(dtype)
        by_group = p if selection.blocks.size == 1 else visible.blocks.split(p, 0.0).sum(axis=-1)
        best, _ = find_largest(by_group, min(count, by_group.shape[-1]))
        mass = jnp.where(chosen, p, 0.0).sum(axis=-1)
        return jnp.stack([(weights * x).sum(axis=1) for x in (mass, best.sum(axis=-1), jnp.ones_like(mass))], axis=1)

    arrays, options = (q, jnp.moveaxis(selection.groups, 1, 2)), {"segments": segments, "positions": positions}
    mass, best, count = over_queries(compare, arrays, k, pattern, selection.blocks, **options).sum(axis=(0, 1))
    groups, size = selection.groups.reshape(-1, *selection.groups.shape[2:]), selection.blocks.count
    chosen = jax.vmap(lambda groups: jnp.zeros(size + 1).at[jnp.where(groups < 0, size, groups)].add(1)[:size])(groups)
    shares = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1)
    entropy = -jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0).sum(axis=-1)
    exists = selection.blocks.starts < k.shape[1] if positions is None else positions[1] >= 0
    forced = 0.0 if selection.forced is None else selection.forced.sum() / jnp.maximum((selection.groups >= 0).sum(), 1)
    return SelectionMetrics(
        mass=jnp.where(count > 0, mass / jnp.maximum(count, 1), 1.0),
        recall=jnp.where(count > 0, mass / jnp.where(best > 0, best, 1.0), 1.0),
        forced=jnp.asarray(forced, dtype),
        entropy=entropy.mean() / jnp.log(jnp.maximum(exists.sum(axis=-1).mean(), 2)),
    )
