"""Attention written out in NumPy, in float64, forward and backward: the reference for every implementation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, Shaped

# Largest error by dtype of the inputs, relative to the largest number of the array, or to 1 if that is smaller.
TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


class Attention(NamedTuple):
    """Output and log-sum-exp of attention, and the gradients with respect to its inputs."""

    out: Float[np.ndarray, "b t h value"]
    lse: Float[np.ndarray, "b t h"]
    q: Float[np.ndarray, "b t h d"]
    k: Float[np.ndarray, "b s g d"]
    v: Float[np.ndarray, "b s g value"]
    sink: Float[np.ndarray, " h"] | None


def attend_reference(
    q: Num[np.ndarray, "b t h d"],
    k: Num[np.ndarray, "b s g d"],
    v: Num[np.ndarray, "b s g value"],
    counts: Shaped[np.ndarray, "b h t s"],
    d_out: Num[np.ndarray, "b t h value"],
    d_lse: Num[np.ndarray, "b t h"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Num[np.ndarray, " h"] | None = None,
    alibi_slopes: Num[np.ndarray, " h"] | None = None,
    q_offset: int = 0,
) -> Attention:
    """Attention in which each key counts `counts` times, and its gradients for the cotangents `d_out` and `d_lse`.

    `q_offset` is the position of the first query.
    """
    q, k, v, d_out, d_lse = (np.float64(x) for x in (q, k, v, d_out, d_lse))
    b, s, g, d = k.shape
    t, share = q.shape[1], q.shape[2] // g
    k, v, d_lse = k.repeat(share, axis=2), v.repeat(share, axis=2), d_lse.transpose(0, 2, 1)
    scale = d**-0.5 if scale is None else scale
    products = scale * np.einsum("bthd,bshd->bhts", q, k)
    scores = products if softcap is None else softcap * np.tanh(products / softcap)
    if alibi_slopes is not None:
        scores = scores - np.float64(alibi_slopes)[:, None, None] * abs(q_offset + np.arange(t)[:, None] - np.arange(s))
    terms = np.where(counts, scores + np.log(np.maximum(counts, 1)), -np.inf)
    if sink_logits is not None:
        sink = np.broadcast_to(np.float64(sink_logits)[:, None], terms.shape[:-1])
        terms = np.concatenate([terms, sink[..., None]], axis=-1)
    lse = np.logaddexp.reduce(terms, axis=-1)
    p = np.where(counts, counts * np.exp(scores - np.where(np.isfinite(lse), lse, 0.0)[..., None]), 0.0)

    dp = np.einsum("bthd,bshd->bhts", d_out, v)
    delta = (p * dp).sum(axis=-1) - d_lse
    ds = p * (dp - delta[..., None])
    if softcap is not None:
        ds *= 1 - np.tanh(products / softcap) ** 2
    dk, dv = (np.einsum("bhts,bthd->bshd", a, x) for a, x in ((scale * ds, q), (p, d_out)))
    return Attention(
        out=np.einsum("bhts,bshd->bthd", p, v),
        lse=lse.transpose(0, 2, 1),
        q=scale * np.einsum("bhts,bshd->bthd", ds, k),
        k=dk.reshape(b, s, g, share, d).sum(axis=3),
        v=dv.reshape(b, s, g, share, -1).sum(axis=3),
        sink=None if sink_logits is None else -(np.exp(sink - lse) * delta).sum(axis=(0, 2)),
    )


def relative_error(actual: Num[np.ndarray, "*shape"], expected: Num[np.ndarray, "*shape"]) -> float:
    """Largest error relative to the largest number expected, or to 1; infinite if infinities differ or one is NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite]) or not np.isfinite(actual[finite]).all():
        return np.inf
    actual, expected = actual[finite], expected[finite]
    return float(abs(actual - expected).max(initial=0.0) / max(1.0, abs(expected).max(initial=0.0)))
