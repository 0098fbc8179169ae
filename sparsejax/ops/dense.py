"""The oracle: all scores, one mask. Right for any pattern, quadratic in time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.request import Request, cap, count_bonus, lean, masked_softmax


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve the request, or None."""
    return "interpret=True is for Pallas kernels" if request.interpret else None


def run(request: Request) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32; matrix products at the highest precision."""
    (b, t, h, d), g = request.q.shape, request.k.shape[2]
    q, k, v = (x.astype(request.dtype) for x in (request.q, request.k, request.v))
    q = q.reshape(b, t, g, h // g, d)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=jax.lax.Precision.HIGHEST) * request.scale
    queries, keys, *lengths = _positions(request)
    scores = lean(cap(scores, request.softcap), _of_heads(request, request.alibi_slopes), queries - keys)
    scores = scores + _by_head(request, count_bonus(request.pattern, queries, keys, *lengths))
    weights, lse = masked_softmax(scores, _mask(request), _of_heads(request, request.sink_logits))
    out = jnp.einsum("bgrts,bsge->btgre", weights, v, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(b, t, h, -1).astype(request.q.dtype), jnp.moveaxis(lse, -1, 1).reshape(b, t, h)


def _positions(request: Request) -> tuple[Array, Array, int, int]:
    t, s = request.q.shape[1], request.k.shape[1]
    return jnp.arange(t)[:, None], jnp.arange(s)[None, :], t, s


def _by_head(request: Request, x: Array | float) -> Array | float:
    """[t, s] or [h, t, s] -> [1, g or 1, r or 1, t, s]."""
    return x.reshape(1, request.k.shape[2], -1, *x.shape[1:]) if jnp.ndim(x) == 3 else x


def _mask(request: Request) -> Array:
    """Booleans that broadcast to [b, g, r, t, s]."""
    mask = _by_head(request, request.pattern.allows(*_positions(request)))
    if request.segments is None:
        return mask
    queries, keys = request.segments
    return mask & (queries[:, :, None] == keys[:, None, :])[:, None, None]


def _of_heads(request: Request, x: Array | None) -> Array | None:
    """[h] -> [1, g, r, 1, 1]."""
    return None if x is None else x.astype(request.dtype).reshape(1, request.k.shape[2], -1, 1, 1)
