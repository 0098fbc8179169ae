"""Mixtures of experts: routing, and matrix products over the tokens of each expert.

Experts have no capacity, so no token is dropped (as in MegaBlocks, arXiv:2211.15841): the tokens' choices are sorted by
expert, and the rows of each expert are padded to whole tiles, so that a tile is multiplied by one expert's matrix. Time
grows with the number of choices, not of experts. On CPU a loop multiplies the tiles, because XLA turns
`jax.lax.ragged_dot` into a masked product with every expert's matrix there (jax 0.10.2 and 0.12; with 64 experts 64
times the FLOPs and about 20 times the time of the loop). Elsewhere `ragged_dot` multiplies the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.device import on_cpu
from sparsejax.ops.residuals import PRODUCT, name_arrays
from sparsejax.ops.rows import move_rows

MAX_TILE = 128  # rows
TINY = 1e-20  # keeps the sum of chosen scores positive


SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), TINY)),  # a derivative at -inf too
}


def route(
    logits: Float[Array, "n e"],
    top_k: int,
    *,
    kind: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: Float[Array, " e"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    experts: Int[Array, "n k"] | None = None,
) -> tuple[Float[Array, "n k"], Int[Array, "n k"], Float[Array, "n e"]]:
    """The experts of each token and their weights. Ties go to the first expert.

    A softmax over the chosen logits equals a renormalised softmax over all logits.

    Args:
      logits: The router's output.
      top_k: Experts per token.
      kind: Score function: "softmax" (arXiv:1701.06538), "sigmoid" (DeepSeek-V3, arXiv:2412.19437), or
        "sqrtsoftplus", the square root of the softplus (DeepSeek-V4).
      renormalize: Whether to divide the chosen scores by their sum.
      scale: Factor on the weights.
      selection_bias: Added to the scores for the choice, not for the weights; has no gradient (arXiv:2408.15664).
      groups: Number of groups of adjacent experts.
      top_groups: Groups from which a token's experts are chosen: those with the highest sum of two best scores.
      experts: The experts, if they are known; only their weights follow from the scores then.

    Returns:
      Weights, experts, and the scores of all experts.
    """
    scores = SCORES[kind](logits)
    if experts is None:
        choice = jax.lax.stop_gradient(scores if selection_bias is None else scores + selection_bias)
        if top_groups < groups:
            choice = _keep_top_groups(choice, groups, top_groups)
        _, experts = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + TINY) if renormalize else weights
    return weights if scale == 1 else weights * scale, experts, scores


def _keep_top_groups(choice: Float[Array, "n e"], groups: int, top_groups: int) -> Float[Array, "n e"]:
    grouped = choice.reshape(len(choice), groups, -1)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(axis=-1), top_groups)
    is_kept = (kept[:, :, None] == jnp.arange(groups)).any(axis=1)
    return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


class ExpertRows(NamedTuple):
    """The choices of n tokens, k each, as r rows sorted by expert and padded to tiles.

    Attributes:
      choices: Choice per row, token * k + index; n * k in padding.
      rows: Row per choice.
      tile_experts: Expert per tile; arbitrary for tiles after the last used one.
      sizes: Rows per expert, a multiple of the tile.
    """

    choices: Int[Array, " r"]
    rows: Int[Array, "n k"]
    tile_experts: Int[Array, " tiles"]
    sizes: Int[Array, " e"]

    @property
    def tile(self) -> int:
        """Rows per tile."""
        return len(self.choices) // len(self.tile_experts)


def choose_tile(choices: int, experts: int) -> int:
    """Rows per tile: a power of two, at most the mean number of choices per expert; 1 where rows need no tiles."""
    if not on_cpu():
        return 1
    return min(MAX_TILE, 1 << max(0, (choices // experts).bit_length() - 1))


def sort_by_expert(experts: Int[Array, "n k"], count: int, tile: int) -> ExpertRows:
    """Sorts the tokens' choices by expert.

    Args:
      experts: The choices, in [0, count).
      count: Number of experts.
      tile: Rows per tile.
    """
    n, k = experts.shape
    total, used = n * k, min(count, n * k)
    tiles = (total - used) // tile + used  # enough for any distribution of the choices
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ordered = flat[order]
    ends = jnp.searchsorted(ordered, jnp.arange(count), side="right")
    counts = jnp.diff(ends, prepend=0)
    sizes = -(-counts // tile) * tile
    padded_ends = jnp.cumsum(sizes)
    shift = (padded_ends - sizes) - (ends - counts)  # of an expert's first row, by the padding before it
    rows = jnp.arange(total) + shift[ordered]
    tile_experts = jnp.searchsorted(padded_ends, jnp.arange(tiles) * tile, side="right")
    return ExpertRows(
        choices=jnp.full(tiles * tile, total).at[rows].set(order),
        rows=jnp.zeros(total, rows.dtype).at[order].set(rows).reshape(n, k),
        tile_experts=jnp.minimum(tile_experts, count - 1),
        sizes=sizes,
    )


def dispatch(x: Float[Array, "n m"], layout: ExpertRows) -> Float[Array, "r m"]:
    """Copies the token of each choice to its row; padding is zeros."""
    return move_rows(x, layout.choices // layout.rows.shape[1], layout.rows)


def dispatch_weights(weights: Float[Array, "n k"], layout: ExpertRows) -> Float[Array, "r 1"]:
    """Copies the weight of each choice to its row; padding is zeros."""
    return move_rows(weights.reshape(-1, 1), layout.choices, layout.rows.reshape(-1, 1))


def combine(y: Float[Array, "r m"], weights: Float[Array, "n k"], layout: ExpertRows) -> Float[Array, "n m"]:
    """The weighted sum of each token's choices, in the dtype of `y`."""
    chosen = move_rows(y, layout.rows.reshape(-1), layout.choices[:, None]).reshape(*weights.shape, -1)
    return jnp.einsum("nk,nkm->nm", weights.astype(y.dtype), chosen)


def multiply(
    x: Float[Array, "r m"], weights: Float[Array, "e m f"], layout: ExpertRows, impl: str = "auto"
) -> Float[Array, "r f"]:
    """Each row times the matrix of its expert; rows after the last used tile are zeros.

    Args:
      x: Rows of `dispatch`.
      weights: Matrix per expert.
      layout: Result of `sort_by_expert`.
      impl: "loop" over tiles, "ragged" for `jax.lax.ragged_dot`, or "auto".
    """
    if impl == "loop" or (impl == "auto" and on_cpu()):
        return _multiply_tiles(None, *vary_alike((x, weights, layout)))
    return name_arrays(jax.lax.ragged_dot(x, weights, layout.sizes), PRODUCT)


def add_bias(x: Float[Array, "r f"], bias: Float[Array, "e f"], layout: ExpertRows) -> Float[Array, "r f"]:
    """Each row plus the bias of its expert."""
    tiles = x.reshape(-1, layout.tile, x.shape[-1])
    return (tiles + bias[layout.tile_experts][:, None]).reshape(x.shape)


def count_choices(
    experts: Int[Array, "*b t k"], count: int, mask: Bool[Array, "*b t"] | None = None
) -> Int[Array, "*b e"]:
    """Number of choices per expert, over the tokens of each sequence.

    Args:
      experts: The choices, in [0, count).
      count: Number of experts.
      mask: False for tokens that are not counted.
    """
    hits = experts.reshape(*experts.shape[:-2], -1)
    if mask is not None:
        hits = jnp.where(jnp.repeat(mask, experts.shape[-1], axis=-1), hits, count)
    return jnp.apply_along_axis(lambda row: jnp.zeros(count, jnp.int32).at[row].add(1, mode="drop"), -1, hits)


def balance_loss(
    scores: Float[Array, "*b t e"], choices: Int[Array, "*b e"], mask: Bool[Array, "*b t"] | None = None
) -> Float[Array, "*b"]:
    """Load-balancing loss of Switch (arXiv:2101.03961): 1 if balanced, up to e / k if all tokens choose alike.

    It is e times the sum over experts of the fraction of choices, which has no gradient, times the mean fraction of the
    scores. It is linear in the scores, so that over any parts of a batch the mean with the choices of the whole batch
    is the loss of the batch.

    Args:
      scores: Scores of all experts.
      choices: Number of choices per expert, of these or of more tokens.
      mask: False for tokens that are not counted.
    """
    count, loads = scores.shape[-1], choices.astype(scores.dtype)
    loads = loads / jnp.maximum(loads.sum(axis=-1, keepdims=True), 1)
    fractions = scores / (scores.sum(axis=-1, keepdims=True) + TINY)
    return count * (loads * mean_over_tokens(fractions, mask)).sum(axis=-1)


def mean_over_tokens(x: Float[Array, "*b t e"], mask: Bool[Array, "*b t"] | None = None) -> Float[Array, "*b e"]:
    """Mean over the tokens at which `mask` is true; 0 if there is none."""
    if mask is None:
        return x.mean(axis=-2)
    return jnp.where(mask[..., None], x, 0.0).sum(axis=-2) / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)


def update_selection_bias(bias: Float[Array, "*b e"], choices: Int[Array, "*b e"], rate: float) -> Float[Array, "*b e"]:
    """Adds `rate` to the bias of experts below the mean load, and subtracts it above (arXiv:2412.19437, 2.1.2).

    Args:
      bias: Added to the scores of the selection.
      choices: Number of choices per expert in the step.
      rate: Step of the bias.
    """
    loads = choices.astype(jnp.float32)
    return bias + rate * jnp.sign(loads.mean(axis=-1, keepdims=True) - loads)


def router_z_loss(logits: Float[Array, "n e"], mask: Bool[Array, " n"] | None = None) -> Float[Array, ""]:
    """Mean square of the log-sum-exp of the logits, which keeps them small (ST-MoE, arXiv:2202.08906).

    Args:
      logits: The router's output.
      mask: False for tokens that are not counted.
    """
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    return squares.mean() if mask is None else jnp.where(mask, squares, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _multiply_tiles_plain(_, x, weights, layout):
    return _multiply_tiles_forward(None, x, weights, layout)[0]


def _multiply_tiles_forward(_, x, weights, layout):
    def multiply_tile(i, y):
        return _put_tile(y, _tile(x, i, layout) @ weights[layout.tile_experts[i]], i, layout)

    y, _ = vary_alike((jnp.zeros((len(x), weights.shape[2]), x.dtype), x))
    return jax.lax.fori_loop(0, _used_tiles(layout), multiply_tile, y), (x, weights, layout)


def _multiply_tiles_backward(_, residuals, dy):
    x, weights, layout = residuals
    dtype = jnp.promote_types(weights.dtype, jnp.float32)  # an expert's gradient is a sum over its tiles

    def differentiate_tile(i, carry):
        dx, d_weights = carry
        expert, dy_tile = layout.tile_experts[i], _tile(dy, i, layout)
        d_weight = jnp.matmul(_tile(x, i, layout).T, dy_tile, preferred_element_type=dtype)
        return _put_tile(dx, dy_tile @ weights[expert].T, i, layout), d_weights.at[expert].add(d_weight)

    zeros, _ = vary_alike(((jnp.zeros_like(x), jnp.zeros(weights.shape, dtype)), x))
    dx, d_weights = jax.lax.fori_loop(0, _used_tiles(layout), differentiate_tile, zeros)
    return dx, d_weights.astype(weights.dtype), None


def _used_tiles(layout: ExpertRows) -> Int[Array, ""]:
    return layout.sizes.sum() // layout.tile


def _tile(x: Float[Array, "r m"], i: Int[Array, ""], layout: ExpertRows) -> Float[Array, "tile m"]:
    return jax.lax.dynamic_slice_in_dim(x, i * layout.tile, layout.tile)


def _put_tile(
    x: Float[Array, "r m"], tile: Float[Array, "tile m"], i: Int[Array, ""], layout: ExpertRows
) -> Float[Array, "r m"]:
    return jax.lax.dynamic_update_slice_in_dim(x, tile, i * layout.tile, axis=0)


_multiply_tiles = with_derivatives(_multiply_tiles_forward, _multiply_tiles_backward, _multiply_tiles_plain, PRODUCT)
