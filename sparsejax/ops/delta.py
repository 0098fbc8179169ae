"""The gated delta rule, in chunks: a state with decay that is corrected instead of added to.

Per head, a state S of n x p numbers maps keys to values. Each position decays it, reads the value stored for its key,
and moves that by beta of the way to its own value:

    S[t] = diag(exp(g[t])) S[t-1]
    S[t] = S[t] + k[t] (beta[t] (v[t] - S[t]^T k[t]))^T
    y[t] = S[t]^T q[t]

with one decay per head (Gated DeltaNet, arXiv:2412.06464) or one per channel of the key (Kimi Delta Attention,
arXiv:2510.26692); without decay it is the delta rule of arXiv:2406.06484.

Inside a chunk, let K[i, j] = sum over channels of k[i] k[j] exp(sum of g from j + 1 to i). The updates u of the
positions solve a triangular system (the UT transform of arXiv:2406.06484):

    u[i] + beta[i] sum over j < i of K[i, j] u[j] = beta[i] (v[i] - what the decayed incoming state stores for k[i])

It is solved by recursive inversion of the halves of the chunk; a power series of the matrix would cancel where keys are
alike. The state is carried from chunk to chunk. The backward pass keeps one state per chunk and recomputes the rest.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.ops.chunks import CHUNK, require_shapes, scan_chunks
from sparsejax.ops.sequence import carry_state, divides, map_device, map_shards
from sparsejax.ops.ssd import decay_matrix

# For all that enters the state, in which rounding errors would accumulate.
_exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_rule(
    q: Float[Array, "b t g n"],
    k: Float[Array, "b t g n"],
    v: Float[Array, "b t h p"],
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h n"],
    beta: Float[Array, "b t h"],
    state: Float[Array, "b h n p"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """The recurrence above, computed in float32. It is stable if |k|^2 beta is at most 2.

    Args:
      q: Queries; group i serves heads i h / g to (i + 1) h / g - 1.
      k: Keys, grouped likewise.
      v: Values.
      log_decay: Logarithm of the decay from the previous position, finite and not positive, per head or per channel of
        its key.
      beta: Step size of the correction.
      state: The state before the first position; defaults to zeros.
      starts: True where a document begins; the state before it counts as zeros.
      chunk: Positions per chunk; does not change the result.

    Returns:
      The output in the dtype of `v`, and the state after the last position in float32.
    """
    weights = {"log_decay": (log_decay, "b t h n" if log_decay.ndim == 4 else "b t h"), "beta": (beta, "b t h")}
    require_shapes(
        v=(v, "b t h p"),
        k=(k, "b t g n"),
        q=(q, "b t g n"),
        **weights,
        state=(state, "b h n p"),
        starts=(starts, "b t"),
    )
    (b, t, h, p), n = v.shape, k.shape[3]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    state = jnp.zeros((b, h, n, p), dtype) if state is None else state.astype(dtype)
    inputs = [a.astype(dtype) for a in (q, k, v, log_decay, beta)]
    if divides(t):
        y, states = map_shards(functools.partial(_scan_shard, chunk), (*inputs, starts), state, outputs=(1, 0))
        return y.astype(v.dtype), states[-len(v) :]
    starts = jnp.zeros((b, t), bool) if starts is None else starts
    run = functools.partial(_scan_device, chunk)
    y, state = map_device(run, (*inputs, starts, state), (2, 2, 2, 2, 2, None, 1), (2, 1))
    return y.astype(v.dtype), state


def _scan_device(
    chunk: int,
    q: Float[Array, "b t g n"],
    k: Float[Array, "b t g n"],
    v: Float[Array, "b t h p"],
    log_decay: Float[Array, "b t h *n"],
    beta: Float[Array, "b t h"],
    starts: Bool[Array, "b t"],
    state: Float[Array, "b h n p"],
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """The output, and the state after it, of the rows and heads of a device."""
    (b, t, h, p), (g, n) = v.shape, k.shape[2:]

    def fold(x: Shaped[Array, "b t heads *width"]) -> Shaped[Array, "bg t r *width"]:
        """Moves groups to the batch axis: XLA's matrix products for CPUs fail with many axes."""
        x = jnp.moveaxis(x.reshape(b, t, g, -1, *x.shape[3:]), 2, 1)
        return x.reshape(b * g, t, *x.shape[3:])

    # Zeros have decay 1 and add nothing, so they leave the state unchanged.
    folded = (*map(fold, (q, k, v, log_decay, beta)), jnp.repeat(starts, g, axis=0))
    state, y = scan_chunks(_run_chunk, state.reshape(b * g, h // g, n, p), folded, chunk)
    y = jnp.moveaxis(y.reshape(b, g, t, h // g, p), 1, 2).reshape(v.shape)
    return y, state.reshape(b, h, n, p)


def _scan_shard(
    chunk: int, inputs: tuple[Array, Array, Array, Array, Array, Array | None], state: Float[Array, "b h n p"]
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """The output of a shard, and the state after it.

    A shard multiplies the state by a matrix [n, n], which is the state that the identity becomes without values: n
    columns more of a first pass.
    """
    q, k, v, log_decay, beta, starts = inputs
    n = k.shape[3]
    columns = jnp.concatenate([v, jnp.zeros((*v.shape[:3], n), state.dtype)], axis=-1)
    identity = jnp.broadcast_to(jnp.eye(n, dtype=state.dtype), (*state.shape[:2], n, n))
    start = jnp.concatenate([jnp.zeros_like(state), identity], axis=-1)
    _, end = delta_rule(jax.lax.stop_gradient(q), k, columns, log_decay, beta, start, starts, chunk)
    added, matrix = jnp.split(end, [v.shape[3]], axis=-1)
    before, after = carry_state(matrix, added, state, functools.partial(_exact_einsum, "bhij,bhjk->bhik"))
    return delta_rule(q, k, v, log_decay, beta, before, starts, chunk)[0], after


def _run_chunk(
    state: Float[Array, "b r n p"], chunk: tuple[Array, Array, Array, Array, Array, Array]
) -> tuple[Float[Array, "b r n p"], Float[Array, "b c r p"]]:
    """The state after a chunk and its outputs, of r heads that share keys [b, c, 1, n]."""
    *inputs, starts = chunk
    q, k, v, decay, beta = (jnp.moveaxis(x, 1, 2) for x in inputs)  # [b, r, c, ...]
    document = jnp.cumsum(starts, axis=1)  # 0: the document of the incoming state
    weigh = _weigh_by_head if decay.ndim == beta.ndim else _weigh_by_channel
    products, since, until = weigh(jnp.concatenate([k, q], axis=2), k, decay, document)
    by_key, by_query = jnp.split(products, 2, axis=2)
    since = since * (document == 0)[:, None, :, None]
    stored = _exact_einsum("brcn,brnp->brcp", k * since, state)
    updates = _substitute(beta[..., None] * by_key, beta[..., None] * (v - stored))
    y = jnp.einsum("brcn,brnp->brcp", q * since, state) + jnp.einsum("brcs,brsp->brcp", by_query, updates)
    state = state * since[:, :, -1, :, None] + _exact_einsum("brcn,brcp->brnp", k * until, updates)
    return state, jnp.moveaxis(y, 2, 1)


def _substitute(matrix: Float[Array, "*batch c c"], x: Float[Array, "*batch c p"]) -> Float[Array, "*batch c p"]:
    """Solves u[i] + sum over j < i of matrix[i, j] u[j] = x[i]; the upper triangle is ignored."""
    c = matrix.shape[-1]
    matrix = jnp.tril(matrix, -1)
    inverse = jax.lax.stop_gradient(_invert(matrix.reshape(-1, c, c))).reshape(matrix.shape)
    return jax.lax.custom_linear_solve(
        lambda u: u + _exact_einsum("...ij,...jp->...ip", matrix, u),
        x,
        lambda _, x: _exact_einsum("...ij,...jp->...ip", inverse, x),
        lambda _, x: _exact_einsum("...ji,...jp->...ip", inverse, x),
    )


def _invert(matrix: Float[Array, "b c c"]) -> Float[Array, "b c c"]:
    """The inverse of 1 + a strictly lower triangular matrix, from the inverses of its diagonal halves.

    This takes a few matrix products. XLA's triangular solver for CPUs hands parts of its work to the threads that wait
    for it, and can deadlock.
    """
    c = matrix.shape[-1]
    if c == 1:
        return jnp.ones_like(matrix)
    half = -(-c // 2)
    matrix = jnp.pad(matrix, ((0, 0), (0, c % 2), (0, c % 2)))
    inverse = _invert(jnp.concatenate([matrix[:, :half, :half], matrix[:, half:, half:]]))
    first, second = jnp.split(inverse, 2)
    corner = -_exact_einsum("bij,bjk->bik", second, _exact_einsum("bij,bjk->bik", matrix[:, half:, :half], first))
    return jnp.block([[first, jnp.zeros_like(first)], [corner, second]])[:, :c, :c]


def _weigh_by_head(
    rows: Float[Array, "b 1 rows n"],
    k: Float[Array, "b 1 c n"],
    decay: Float[Array, "b r c"],
    document: Int[Array, "b c"],
) -> tuple[Float[Array, "b r rows c"], Float[Array, "b r c 1"], Float[Array, "b r c 1"]]:
    """`_weigh_by_channel` for one decay per head."""
    left = decay_matrix(jnp.swapaxes(decay, 1, 2), document)
    products = _exact_einsum("bin,bjn->bij", rows[:, 0], k[:, 0])[:, None] * jnp.tile(left, (1, 1, 2, 1))
    return products, jnp.exp(jnp.cumsum(decay, axis=-1))[..., None], left[:, :, -1, :, None]


def _weigh_by_channel(
    rows: Float[Array, "b 1 rows n"],
    k: Float[Array, "b 1 c n"],
    decay: Float[Array, "b r c n"],
    document: Int[Array, "b c"],
) -> tuple[Float[Array, "b r rows c"], Float[Array, "b r c n"], Float[Array, "b r c n"]]:
    """Products of rows with keys that have decayed since their positions.

    Args:
      rows: Keys followed by queries: 2 c rows.
      k: Keys.
      decay: Logarithm of the decay of each channel.
      document: Index of the document of each position.

    Returns:
      The products, 0 where a key is later or of another document; the decay from before the chunk to each position; and
      the decay from each position to the end of the chunk, 0 if that is of another document.
    """
    (b, r, c, n), same = decay.shape, (document[:, :, None] == document[:, None, :])[:, None]
    rows, k = (jnp.broadcast_to(x, (b, r, *x.shape[2:])) for x in (rows, k))
    sums = _weigh_halves(rows.reshape(b * r, 2, c, n), k.reshape(b * r, c, n), decay.reshape(b * r, c, n))
    products, since, until = (x.reshape(b, r, -1, x.shape[-1]) for x in sums)
    return (
        jnp.where(jnp.tile(same, (1, 1, 2, 1)), products, 0),
        jnp.exp(since),
        jnp.exp(until) * same[:, :, -1, :, None],
    )


def _weigh_halves(
    rows: Float[Array, "b z c n"], k: Float[Array, "b c n"], decay: Float[Array, "b c n"]
) -> tuple[Float[Array, "b z c c"], Float[Array, "b c n"], Float[Array, "b c n"]]:
    """Products of rows and decayed keys, and the sums of log decays up to and after each position.

    The decay between two positions splits where their halves part: from the earlier one to the end of its half, and
    from there to the later one. No exponent is positive, no sum is a difference of longer sums, and the products are
    matrix products, without an array over all pairs and channels.
    """
    c = k.shape[1]
    if c == 1:
        return (rows * k[:, None]).sum(axis=-1, keepdims=True), decay, jnp.zeros_like(decay)
    halves = [_stack_halves(x) for x in (rows, k, decay)]  # padding has decay 1
    parts = (jnp.split(x, 2) for x in (*halves, *_weigh_halves(*halves)))
    (_, rows), (k, _), (_, decay), (first, second), (since, since_next), (until, until_next) = parts
    rows, k = rows * jnp.exp(since_next)[:, None], k * jnp.exp(until)
    corner = _exact_einsum("bzin,bjn->bzij", rows, k)
    products = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])[..., :c, :c]
    since = jnp.concatenate([since, since_next + since[:, -1:]], axis=1)[:, :c]
    until = jnp.concatenate([until + decay.sum(axis=1, keepdims=True), until_next], axis=1)[:, :c]
    return products, since, until


def _stack_halves(x: Float[Array, "b *z c n"]) -> Float[Array, "two_b *z half n"]:
    """Stacks the halves of axis c along the batch axis, padded with a row of zeros if c is odd."""
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, x.shape[-2] % 2), (0, 0)))
    return jnp.concatenate(jnp.split(x, 2, axis=-2))
