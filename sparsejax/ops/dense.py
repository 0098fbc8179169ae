"""The oracle: all scores and one mask. Exact for any pattern, quadratic in time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.residuals import MIXED, name_arrays
from sparsejax.ops.softmax import add_alibi, log_multiplicity, masked_softmax, softcap, zero_nan


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot compute the call, or None."""
    return "interpret=True is for Pallas kernels" if call.interpret else None


def run(call: AttentionCall) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in `call.dtype`; matrix products at the highest precision."""
    (b, t, h, d), (_, s, g, _) = call.q.shape, call.k.shape
    q, k, v = (x.astype(call.dtype) for x in (call.q, call.k, call.v))
    bad_q, bad_k = (jnp.moveaxis(jnp.isnan(x[..., 0]), 1, -1) for x in (q, k))  # see `confine_nan`
    q, k = zero_nan(q).reshape(b, t, g, h // g, d), zero_nan(k)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=jax.lax.Precision.HIGHEST) * call.scale
    queries, keys, count = call.first_query + jnp.arange(t)[:, None], jnp.arange(s)[None, :], call.query_count
    distance = queries + call.q_offset - keys
    scores = add_alibi(softcap(scores, call.softcap), _per_head(call, call.alibi_slopes), distance)
    scores = scores + _group_heads(call, log_multiplicity(call.pattern, queries, keys, count, s))
    mask = _group_heads(call, call.pattern.allows(queries, keys, count, s))
    if call.segments is not None:
        q_ids, k_ids = call.segments
        mask = mask & (q_ids[:, :, None] == k_ids[:, None, :])[:, None, None]
    if call.selection is not None:
        chosen = call.selection.mask
        mask = mask & jnp.repeat(chosen, h // chosen.shape[1], axis=1).reshape(b, g, -1, t, s)
    p, lse = masked_softmax(scores, mask, _per_head(call, call.sink_logits))
    out = jnp.einsum("bgrts,bsge->btgre", p, v, precision=jax.lax.Precision.HIGHEST).reshape(b, t, h, -1)
    bad = (mask & (bad_q.reshape(b, g, -1, t, 1) | bad_k.reshape(b, g, 1, 1, s))).any(axis=-1)
    bad, lse = (jnp.moveaxis(x, -1, 1).reshape(b, t, h) for x in (bad, lse))
    return name_arrays(
        (jnp.where(bad[..., None], jnp.nan, out).astype(call.q.dtype), jnp.where(bad, jnp.nan, lse)), MIXED
    )


def _group_heads(call: AttentionCall, x: Bool[Array, " ..."] | Float[Array, " ..."] | float) -> Array:
    """[t, s] or [h, t, s] -> [t, s] or [1, g, r, t, s]."""
    x = jnp.asarray(x)
    return x.reshape(1, call.k.shape[2], -1, *x.shape[1:]) if x.ndim == 3 else x


def _per_head(call: AttentionCall, x: Float[Array, " h"] | None) -> Float[Array, "1 g r 1 1"] | None:
    return None if x is None else x.astype(call.dtype).reshape(1, call.k.shape[2], -1, 1, 1)
