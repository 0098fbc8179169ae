"""The gated delta rule: a state that is corrected rather than added to, and that decays, in chunks.

Each head keeps a map S from keys to values, of n x p numbers. A position lets it decay, looks up what it holds for
its key, and moves that by beta of the way to its value:

    S[t] = diag(exp(g[t])) S[t-1]
    S[t] = S[t] + k[t] (beta[t] (v[t] - S[t]^T k[t]))^T
    y[t] = S[t]^T q[t]

with one decay for all channels of a key (Gated DeltaNet, arXiv:2412.06464) or one for each (Kimi Delta Attention,
arXiv:2510.26692); without decay it is the delta rule of arXiv:2406.06484.

Inside a chunk let K[i, j] = sum over channels of k[i] k[j] exp(sum of g from j + 1 to i). What the positions add, u,
depends on what those before them added by a triangular system (the UT transform of arXiv:2406.06484):

    u[i] + beta[i] sum over j < i of K[i, j] u[j] = beta[i] (v[i] - what is left of the state before the chunk, at k[i])

It is solved by the inverses of halves of halves of the chunk; a series in powers of the matrix would cancel where keys
are alike. From chunk to chunk the state is carried. The backward pass keeps one state for each chunk and computes the
rest of a chunk again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import scan_chunks
from sparsejax.ops.ssd import decay_matrix

CHUNK = 64

# What enters the state is as exact as the state is: rounding to fewer digits would be carried along.
_exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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
    """The recurrence above, in float32 whatever the inputs. It does not grow if |k|^2 beta is at most 2.

    Args:
      q: queries; those of group i serve the heads i h / g and following.
      k: keys, grouped likewise.
      v: values.
      log_decay: logarithms of what is kept from the position before, finite and not positive, for a head or for
        each channel of its key.
      beta: how far what is held for a key moves to the value.
      state: the state before the first position, zeros if not given.
      starts: True where a document begins; the state is zeros before it.
      chunk: positions of a chunk; the result does not depend on it.

    Returns:
      The output in the dtype of `v`, and the state after the last position in float32.
    """
    (b, t, h, p), (g, n) = v.shape, k.shape[2:]
    wide = jnp.promote_types(v.dtype, jnp.float32)
    state = jnp.zeros((b, h, n, p), wide) if state is None else state.astype(wide)
    inputs = [a.astype(wide) for a in (q, k, v, log_decay, beta)]
    starts = jnp.zeros((b, t), bool) if starts is None else starts

    def fold(x: Array) -> Array:
        """[b, t, h, ...] -> [b g, t, h / g, ...]: XLA's matrix products for CPUs fail at many axes."""
        x = jnp.moveaxis(x.reshape(b, t, g, -1, *x.shape[3:]), 2, 1)
        return x.reshape(b * g, t, *x.shape[3:])

    # Zeros decay by nothing and add nothing, so that they leave the state as it is.
    folded = (*map(fold, inputs), jnp.repeat(starts, g, axis=0))
    state, y = scan_chunks(_run_chunk, state.reshape(b * g, h // g, n, p), folded, chunk)
    y = jnp.moveaxis(y.reshape(b, g, t, h // g, p), 1, 2).reshape(v.shape)
    return y.astype(v.dtype), state.reshape(b, h, n, p)


def delta_step(
    q: Float[Array, "b g n"],
    k: Float[Array, "b g n"],
    v: Float[Array, "b h p"],
    log_decay: Float[Array, "b h"] | Float[Array, "b h n"],
    beta: Float[Array, "b h"],
    state: Float[Array, "b h n p"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h n p"]]:
    """One position of `delta_rule`: its output in the dtype of `v` and the next state, in float32."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    share = v.shape[1] // k.shape[1]
    q, k = (jnp.repeat(a.astype(wide), share, axis=1) for a in (q, k))
    decay = jnp.exp(log_decay.astype(wide))
    state = state.astype(wide) * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    held = _exactly("bhnp,bhn->bhp", state, k)
    state = state + k[..., None] * (beta.astype(wide)[..., None] * (v.astype(wide) - held))[:, :, None]
    return jnp.einsum("bhnp,bhn->bhp", state, q).astype(v.dtype), state


def _run_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    """The state [b, r, n, p] after a chunk, and its outputs [b, c, r, p], of r heads that share keys [b, c, 1, n]."""
    *inputs, starts = chunk
    q, k, v, decay, beta = (jnp.moveaxis(x, 1, 2) for x in inputs)  # [b, r, c, ...]
    document = jnp.cumsum(starts, axis=1)  # 0: the one that the state is of
    weigh = _weigh_by_head if decay.ndim == beta.ndim else _weigh_by_channel
    products, since, until = weigh(jnp.concatenate([k, q], axis=2), k, decay, document)
    by_key, by_query = jnp.split(products, 2, axis=2)
    since = since * (document == 0)[:, None, :, None]
    held = _exactly("brcn,brnp->brcp", k * since, state)
    added = _substitute(beta[..., None] * by_key, beta[..., None] * (v - held))
    y = jnp.einsum("brcn,brnp->brcp", q * since, state) + jnp.einsum("brcs,brsp->brcp", by_query, added)
    state = state * since[:, :, -1, :, None] + _exactly("brcn,brcp->brnp", k * until, added)
    return state, jnp.moveaxis(y, 2, 1)


def _substitute(matrix: Array, x: Array) -> Array:
    """Solves u[i] + sum over j < i of matrix[i, j] u[j] = x[i] for u [..., c, p]; reads no more of the matrix."""
    c = matrix.shape[-1]
    matrix = jnp.tril(matrix, -1)
    inverse = jax.lax.stop_gradient(_invert(matrix.reshape(-1, c, c))).reshape(matrix.shape)
    return jax.lax.custom_linear_solve(
        lambda u: u + _exactly("...ij,...jp->...ip", matrix, u),
        x,
        lambda _, x: _exactly("...ij,...jp->...ip", inverse, x),
        lambda _, x: _exactly("...ji,...jp->...ip", inverse, x),
    )


def _invert(matrix: Array) -> Array:
    """The inverse of 1 + a matrix [b, c, c] that is 0 on the diagonal and above, from those of its halves.

    By halves it is a few matrix products. A triangular solver would do the same, but XLA's for CPUs hands parts of
    its work to the threads that wait for it, and can wait forever.
    """
    c = matrix.shape[-1]
    if c == 1:
        return jnp.ones_like(matrix)
    half = -(-c // 2)
    matrix = jnp.pad(matrix, ((0, 0), (0, c % 2), (0, c % 2)))
    inverse = _invert(jnp.concatenate([matrix[:, :half, :half], matrix[:, half:, half:]]))
    first, second = jnp.split(inverse, 2)
    corner = -_exactly("bij,bjk->bik", second, _exactly("bij,bjk->bik", matrix[:, half:, :half], first))
    return jnp.block([[first, jnp.zeros_like(first)], [corner, second]])[:, :c, :c]


def _weigh_by_head(rows: Array, k: Array, decay: Array, document: Array) -> tuple[Array, Array, Array]:
    """For one decay of a head, [b, r, c]: see `_weigh_by_channel`."""
    left = decay_matrix(jnp.swapaxes(decay, 1, 2), document)
    products = _exactly("bin,bjn->bij", rows[:, 0], k[:, 0])[:, None] * jnp.tile(left, (1, 1, 2, 1))
    return products, jnp.exp(jnp.cumsum(decay, axis=-1))[..., None], left[:, :, -1, :, None]


def _weigh_by_channel(rows: Array, k: Array, decay: Array, document: Array) -> tuple[Array, Array, Array]:
    """Products of rows and keys over what is left of the keys' channels by then, from a decay of each channel.

    Args:
      rows: keys and behind them queries, [b, 1, 2 c, n].
      k: keys, [b, 1, c, n].
      decay: [b, r, c, n].
      document: number of the document of each position, [b, c].

    Returns:
      The products [b, r, 2 c, c], 0 where a key is later or of another document; what is left at each position of what
      was before the chunk; and what is left at its end of each position, 0 if of another document [b, r, c, n].
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


def _weigh_halves(rows: Array, k: Array, decay: Array) -> tuple[Array, Array, Array]:
    """Products [b, z, c, c] of rows [b, z, c, n] and keys [b, c, n]; sums of decays up to and after each [b, c, n].

    Two positions meet where their halves part: the earlier decays to the end of its half, the later since then. So
    no exponent is positive, a sum is a sum of its own terms, and products are matrix products, without an array of
    all pairs and channels.
    """
    c = k.shape[1]
    if c == 1:
        return (rows * k[:, None]).sum(axis=-1, keepdims=True), decay, jnp.zeros_like(decay)
    halves = [_stack_halves(x) for x in (rows, k, decay)]  # padding decays by nothing
    parts = (jnp.split(x, 2) for x in (*halves, *_weigh_halves(*halves)))
    (_, rows), (k, _), (_, decay), (first, second), (since, since_next), (until, until_next) = parts
    rows, k = rows * jnp.exp(since_next)[:, None], k * jnp.exp(until)
    corner = _exactly("bzin,bjn->bzij", rows, k)
    products = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])[..., :c, :c]
    since = jnp.concatenate([since, since_next + since[:, -1:]], axis=1)[:, :c]
    until = jnp.concatenate([until + decay.sum(axis=1, keepdims=True), until_next], axis=1)[:, :c]
    return products, since, until


def _stack_halves(x: Array) -> Array:
    """The first halves of x [b, ..., c, n], then the second ones: [2 b, ..., c / 2, n]; of an odd c, a row is zeros."""
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, x.shape[-2] % 2), (0, 0)))
    return jnp.concatenate(jnp.split(x, 2, axis=-2))
