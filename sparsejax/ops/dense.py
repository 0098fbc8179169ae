"""The oracle: all scores, one mask. Right for any pattern, quadratic in time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.request import Request, cap, masked_softmax


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve the request, or None."""
    return "interpret=True is for Pallas kernels" if request.interpret else None


def run(request: Request) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32; matrix products at the highest precision."""
    (b, t, h, d), g = request.q.shape, request.k.shape[2]
    q, k, v = (x.astype(request.dtype) for x in (request.q, request.k, request.v))
    q = q.reshape(b, t, g, h // g, d)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=jax.lax.Precision.HIGHEST) * request.scale
    weights, lse = masked_softmax(cap(scores, request.softcap), _mask(request), _sink(request))
    out = jnp.einsum("bgrts,bsgd->btgrd", weights, v, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(b, t, h, d).astype(request.q.dtype), jnp.moveaxis(lse, -1, 1).reshape(b, t, h)


def _mask(request: Request) -> Array:
    """Booleans [b or 1, g or 1, r or 1, t, s]."""
    (_, t, h, _), (_, s, g, _) = request.q.shape, request.k.shape
    mask = request.pattern.allows(jnp.arange(t)[:, None], jnp.arange(s)[None, :], t, s)
    mask = mask[None, None, None] if mask.ndim == 2 else mask.reshape(1, g, h // g, t, s)
    if request.segments is None:
        return mask
    queries, keys = request.segments
    return mask & (queries[:, :, None] == keys[:, None, :])[:, None, None]


def _sink(request: Request) -> Array | None:
    if request.sink_logits is None:
        return None
    return request.sink_logits.astype(request.dtype).reshape(request.k.shape[2], -1)[None, :, :, None, None]
