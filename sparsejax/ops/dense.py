"""The oracle: all scores, one mask. Right for any pattern, quadratic in time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.softmax import add_alibi, log_multiplicity, masked_softmax, softcap


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    return "interpret=True is for Pallas kernels" if call.interpret else None


def run(call: AttentionCall) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32; matrix products at the highest precision."""
    (b, t, h, d), g = call.q.shape, call.k.shape[2]
    q, k, v = (x.astype(call.dtype) for x in (call.q, call.k, call.v))
    q = q.reshape(b, t, g, h // g, d)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=jax.lax.Precision.HIGHEST) * call.scale
    queries, keys, *lengths = _positions(call)
    scores = add_alibi(softcap(scores, call.softcap), _of_heads(call, call.alibi_slopes), queries - keys)
    scores = scores + _by_head(call, log_multiplicity(call.pattern, queries, keys, *lengths))
    weights, lse = masked_softmax(scores, _mask(call), _of_heads(call, call.sink_logits))
    out = jnp.einsum("bgrts,bsge->btgre", weights, v, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(b, t, h, -1).astype(call.q.dtype), jnp.moveaxis(lse, -1, 1).reshape(b, t, h)


def _positions(call: AttentionCall) -> tuple[Array, Array, int, int]:
    t, s = call.q.shape[1], call.k.shape[1]
    return jnp.arange(t)[:, None], jnp.arange(s)[None, :], t, s


def _by_head(call: AttentionCall, x: Array | float) -> Array | float:
    """[t, s] or [h, t, s] -> [1, g or 1, r or 1, t, s]."""
    return x.reshape(1, call.k.shape[2], -1, *x.shape[1:]) if jnp.ndim(x) == 3 else x


def _mask(call: AttentionCall) -> Array:
    """Booleans that broadcast to [b, g, r, t, s]."""
    mask = _by_head(call, call.pattern.allows(*_positions(call)))
    if call.segments is None:
        return mask
    queries, keys = call.segments
    return mask & (queries[:, :, None] == keys[:, None, :])[:, None, None]


def _of_heads(call: AttentionCall, x: Array | None) -> Array | None:
    """[h] -> [1, g, r, 1, 1]."""
    return None if x is None else x.astype(call.dtype).reshape(1, call.k.shape[2], -1, 1, 1)
