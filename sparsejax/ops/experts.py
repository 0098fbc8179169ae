"""Mixtures of experts: which experts serve a token, and their matrix products over the tokens that each one serves.

No expert has a capacity, so no token is dropped (as in MegaBlocks, arXiv:2211.15841): the tokens' choices are sorted
by expert, and each expert's rows are padded to whole tiles, so that a tile is multiplied by one expert's matrix. Time
follows the choices and not the number of experts. On CPU the tiles are multiplied in a loop, since XLA there turns
`jax.lax.ragged_dot` into a masked product with every expert's matrix (jax 0.10.2 and 0.12; with 64 experts 64 times the
FLOPs and about 20 times the time of the loop); elsewhere `ragged_dot` takes the rows as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.rows import move_rows

LARGEST_TILE = 128  # rows
TINY = 1e-20  # keeps the sum of chosen scores above 0


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
) -> tuple[Float[Array, "n k"], Int[Array, "n k"], Float[Array, "n e"]]:
    """The experts of each token and their weights. Of equal scores the first expert's wins.

    Softmax over the chosen logits alone is softmax over all of them, renormalised.

    Args:
      logits: the router's output.
      top_k: experts for each token.
      kind: "softmax" (arXiv:1701.06538) or "sigmoid" (DeepSeek-V3, arXiv:2412.19437) makes scores of logits.
      renormalize: the chosen scores are divided by their sum.
      scale: factor on the weights.
      selection_bias: added to the scores for the choice, not for the weights; it gets no gradient (arXiv:2408.15664).
      groups: experts are split into so many groups of neighbours,
      top_groups: and each token's come from the groups whose two best scores have the greatest sums.

    Returns:
      Weights, experts, and the scores of all experts.
    """
    scores = jax.nn.softmax(logits, axis=-1) if kind == "softmax" else jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores if selection_bias is None else scores + selection_bias)
    if top_groups < groups:
        choice = _keep_top_groups(choice, groups, top_groups)
    _, experts = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + TINY) if renormalize else weights
    return weights if scale == 1 else weights * scale, experts, scores


def _keep_top_groups(choice: Array, groups: int, top_groups: int) -> Array:
    grouped = choice.reshape(len(choice), groups, -1)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(axis=-1), top_groups)
    open_groups = (kept[:, :, None] == jnp.arange(groups)).any(axis=1)
    return jnp.where(open_groups[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


class Groups(NamedTuple):
    """Where the choices of `n` tokens, `k` each, are among `r` rows that are sorted by expert and padded to tiles.

    Attributes:
      choices: of each row the choice that it serves, token * k + number; n * k at padding.
      rows: of each choice its row.
      tile_experts: of each tile its expert; tiles after the last used one have any.
      sizes: rows of each expert, a multiple of the tile.
    """

    choices: Int[Array, " r"]
    rows: Int[Array, "n k"]
    tile_experts: Int[Array, " tiles"]
    sizes: Int[Array, " e"]

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return len(self.choices) // len(self.tile_experts)


def choose_tile(choices: int, experts: int) -> int:
    """Rows of a tile for so many choices: a power of two, at most the mean of an expert; 1 where rows need no tiles."""
    if not _loops():
        return 1
    return min(LARGEST_TILE, 1 << max(0, (choices // experts).bit_length() - 1))


def group(experts: Int[Array, "n k"], count: int, tile: int) -> Groups:
    """Sorts the tokens' choices by expert.

    Args:
      experts: the choices, in [0, count).
      count: number of experts.
      tile: rows of a tile.
    """
    n, k = experts.shape
    total, used = n * k, min(count, n * k)
    tiles = (total - used) // tile + used  # enough, however the choices fall
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    ordered = chosen[order]
    ends = jnp.searchsorted(ordered, jnp.arange(count), side="right")
    counts = jnp.diff(ends, prepend=0)
    sizes = -(-counts // tile) * tile
    padded_ends = jnp.cumsum(sizes)
    shift = (padded_ends - sizes) - (ends - counts)  # of an expert's first row, by the padding of those before
    places = jnp.arange(total) + shift[ordered]
    tile_experts = jnp.searchsorted(padded_ends, jnp.arange(tiles) * tile, side="right")
    return Groups(
        choices=jnp.full(tiles * tile, total).at[places].set(order),
        rows=jnp.zeros(total, places.dtype).at[order].set(places).reshape(n, k),
        tile_experts=jnp.minimum(tile_experts, count - 1),
        sizes=sizes,
    )


def dispatch(x: Float[Array, "n m"], groups: Groups) -> Float[Array, "r m"]:
    """A copy of its token for each choice, sorted by expert; zeros at padding."""
    return move_rows(x, groups.choices // groups.rows.shape[1], groups.rows)


def combine(y: Float[Array, "r m"], weights: Float[Array, "n k"], groups: Groups) -> Float[Array, "n m"]:
    """The sum over each token's choices, by weight, in the dtype of `y`; the inverse of `dispatch`."""
    chosen = move_rows(y, groups.rows.reshape(-1), groups.choices[:, None]).reshape(*weights.shape, -1)
    return jnp.einsum("nk,nkm->nm", weights.astype(y.dtype), chosen)


def multiply(
    x: Float[Array, "r m"], weights: Float[Array, "e m f"], groups: Groups, impl: str = "auto"
) -> Float[Array, "r f"]:
    """Each row times the matrix of its expert; rows after the last used tile give zeros.

    Args:
      x: rows of `dispatch`.
      weights: a matrix for each expert.
      groups: of `group`.
      impl: "loop" over tiles, "ragged" for `jax.lax.ragged_dot`, or "auto".
    """
    if impl == "loop" or (impl == "auto" and _loops()):
        return _multiply_tiles(x, weights, groups)
    return jax.lax.ragged_dot(x, weights, groups.sizes)


def add_bias(x: Float[Array, "r f"], bias: Float[Array, "e f"], groups: Groups) -> Float[Array, "r f"]:
    """Each row plus the bias of its expert."""
    tiles = x.reshape(-1, groups.tile, x.shape[-1])
    return (tiles + bias[groups.tile_experts][:, None]).reshape(x.shape)


def balance_loss(
    scores: Float[Array, "n e"], experts: Int[Array, "n k"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """1 where all experts are chosen alike, up to e / k where the same ones always are (Switch, arXiv:2101.03961).

    e times the sum over experts of the share of choices that fall on it, which has no gradient, and its mean share of
    the scores.

    Args:
      scores: of all experts.
      experts: the choices.
      mask: False for tokens that do not count.
    """
    mask = jnp.ones(len(scores), bool) if mask is None else mask
    tokens = jnp.maximum(mask.sum(), 1)
    counted = jnp.where(mask[:, None], experts, scores.shape[1])
    chosen = jnp.zeros(scores.shape[1], scores.dtype).at[counted.reshape(-1)].add(1.0, mode="drop")
    shares = jnp.where(mask[:, None], scores / (scores.sum(axis=1, keepdims=True) + TINY), 0.0).sum(axis=0)
    return scores.shape[1] * (chosen / (tokens * experts.shape[1]) * (shares / tokens)).sum()


def router_z_loss(logits: Float[Array, "n e"], mask: Bool[Array, " n"] | None = None) -> Float[Array, ""]:
    """The mean square of the logits' log-sum-exp: keeps them small (ST-MoE, arXiv:2202.08906); `mask` as above."""
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    return squares.mean() if mask is None else jnp.where(mask, squares, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _loops() -> bool:
    return jax.default_backend() == "cpu"


@jax.custom_vjp
def _multiply_tiles(x, weights, groups):
    return _multiply_tiles_forward(x, weights, groups)[0]


def _multiply_tiles_forward(x, weights, groups):
    def multiply_tile(i, y):
        return _put_tile(y, _tile(x, i, groups) @ weights[groups.tile_experts[i]], i, groups)

    y = jnp.zeros((len(x), weights.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, _used(groups), multiply_tile, y), (x, weights, groups)


def _multiply_tiles_backward(saved, g):
    x, weights, groups = saved
    wide = jnp.promote_types(weights.dtype, jnp.float32)  # an expert's gradient is a sum over its tiles

    def differentiate_tile(i, carry):
        d_x, d_weights = carry
        expert, d_y = groups.tile_experts[i], _tile(g, i, groups)
        d_weight = jnp.matmul(_tile(x, i, groups).T, d_y, preferred_element_type=wide)
        return _put_tile(d_x, d_y @ weights[expert].T, i, groups), d_weights.at[expert].add(d_weight)

    zeros = jnp.zeros_like(x), jnp.zeros(weights.shape, wide)
    d_x, d_weights = jax.lax.fori_loop(0, _used(groups), differentiate_tile, zeros)
    return d_x, d_weights.astype(weights.dtype), None


def _used(groups: Groups) -> Array:
    return groups.sizes.sum() // groups.tile


def _tile(x: Array, i: Array, groups: Groups) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * groups.tile, groups.tile)


def _put_tile(x: Array, tile: Array, i: Array, groups: Groups) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, tile, i * groups.tile, axis=0)


_multiply_tiles.defvjp(_multiply_tiles_forward, _multiply_tiles_backward)
