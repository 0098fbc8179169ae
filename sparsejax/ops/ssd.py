"""Structured state space duality: linear attention whose weights decay, in chunks (Mamba-2, arXiv:2405.21060).

For each head with a state of p x n numbers, where all numbers decay alike:

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T
    y[t] = S[t] C[t]

Inside a chunk that is a product of masked matrices, y = (L * C B^T) (dt x) with L[i, j] = exp(sum of dt A from j + 1
to i); from chunk to chunk the state is carried. The backward pass keeps one state for each chunk and computes the
rest of a chunk again. With dt = 1 it is lightning attention (arXiv:2401.04658).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import scan_chunks, spread

CHUNK = 64


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    state: Float[Array, "b h p n"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence above, in float32 whatever the inputs.

    Args:
      x: input.
      dt: step sizes, not negative.
      A: decay rates, not positive.
      B: input weights; group i serves the heads i h / g and following.
      C: output weights.
      state: the state before the first position, zeros if not given.
      starts: True where a document begins; the state is zeros before it.
      chunk: positions of a chunk; the result does not depend on it.

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32.
    """
    (b, t, h, p), n = x.shape, B.shape[3]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((b, h, p, n), wide) if state is None else state.astype(wide)
    decay = dt.astype(wide) * A.astype(wide)
    inputs = (x.astype(wide) * spread(dt.astype(wide), p), decay, B.astype(wide), C.astype(wide))
    inputs += (jnp.zeros((b, t), bool) if starts is None else starts,)
    # Padding decays by nothing and adds nothing, so it leaves the state as it is.
    state, y = scan_chunks(_run_chunk, state, inputs, chunk)
    return y.astype(x.dtype), state


def ssd_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    state: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One position of `ssd`: its output in the dtype of `x` and the next state, in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    share = x.shape[1] // B.shape[1]
    B, C = (jnp.repeat(a.astype(wide), share, axis=1) for a in (B, C))
    dt = dt.astype(wide)
    added = (x.astype(wide) * dt[..., None])[..., None] * B[:, :, None]
    state = jnp.exp(dt * A.astype(wide))[..., None, None] * state.astype(wide) + added
    return jnp.einsum("bhpn,bhn->bhp", state, C).astype(x.dtype), state


def _run_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    """The state after a chunk, and its outputs [b, c, h, p]."""
    x, decay, B, C, starts = chunk
    (b, c, h, p), (g, n) = x.shape, B.shape[2:]
    document = jnp.cumsum(starts, axis=1)  # 0: the one that the state is of
    total = jnp.cumsum(decay, axis=1)  # [b, c, h]: log decay since before the chunk
    old = jnp.exp(total) * (document == 0)[..., None]
    matrix = decay_matrix(decay, document)
    last = jnp.moveaxis(matrix[:, :, -1], 1, -1)  # how much of each position is left at the end
    heads = x.reshape(b, c, g, h // g, p)
    inner = spread(jnp.einsum("bcgn,bsgn->bgcs", C, B), h // g, axis=2) * matrix.reshape(b, g, -1, c, c)
    y = jnp.einsum("bgrcs,bsgrp->bcgrp", inner, heads)
    held = state.reshape(b, g, h // g, p, n)
    y = y + jnp.einsum("bcgn,bgrpn->bcgrp", C, held) * spread(old.reshape(b, c, g, -1), p)
    left = heads * spread(last.reshape(b, c, g, -1), p)
    added = jnp.einsum("bcgrp,bcgn->bgrpn", left, B).reshape(state.shape)
    return state * spread(spread(old[:, -1], p), n) + added, y.reshape(x.shape)


def decay_matrix(decay: Float[Array, "b c h"], document: Array) -> Float[Array, "b h c c"]:
    """L[i, j] = exp(sum of decay from j + 1 to i) where j is not after i and in its document, else 0.

    The sums are summed one by one, by a product with a triangle of ones: as differences of sums from the beginning
    they would lose the digits of the longest. They are masked before the exponential, which could overflow.
    """
    c = decay.shape[1]
    triangle = jnp.tri(c, dtype=decay.dtype)
    after = triangle - jnp.eye(c, dtype=decay.dtype)  # [k, j]: k is after j
    spans = jnp.einsum("ik,bkh,kj->bhij", triangle, decay, after, precision=jax.lax.Precision.HIGHEST)
    seen = (triangle > 0) & (document[:, :, None] == document[:, None, :])
    return jnp.exp(jnp.where(seen[:, None], spans, -jnp.inf))
