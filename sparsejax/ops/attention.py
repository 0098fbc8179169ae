"""`attend`: attention under a pattern, by any implementation that supports the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops import cudnn, dense, gather, segment, softmax, verification
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import gpu, tpu
from sparsejax.ops.kernels.mesh import device_kind
from sparsejax.patterns import Pattern


class Implementation(NamedTuple):
    """A way to compute attention.

    Attributes:
      name: The value of `impl` that selects it.
      run: Returns the output and the log-sum-exp, which may be None if the call does not need it.
      unsupported_reason: Why it cannot compute a call on the current devices, or None.
      verified_on: Device kinds on which a recorded benchmark verified it; None: it is plain JAX and needs none.
    """

    name: str
    run: Callable[[AttentionCall], tuple[Array, Array | None]]
    unsupported_reason: Callable[[AttentionCall], str | None]
    verified_on: frozenset[str] | None = None

    def unverified_reason(self, call: AttentionCall) -> str | None:
        """Why "auto" does not use it for a call that it supports, or None."""
        if self.verified_on is None or call.interpret:
            return None
        kind = device_kind()
        if kind in self.verified_on or self.name in verification.verified_here(kind):
            return None
        verification.suggest_doctor(kind)
        return f"not verified on {kind} with jax {jax.__version__}; run `sparsejax doctor`"


IMPLEMENTATIONS = (
    Implementation("dense", dense.run, dense.unsupported_reason),
    Implementation("gather", gather.run, gather.unsupported_reason),
    Implementation("segment", segment.run, segment.unsupported_reason),
    Implementation("tpu", tpu.run, tpu.unsupported_reason, verification.RECORDED["tpu"]),
    Implementation("gpu", gpu.run, gpu.unsupported_reason, verification.RECORDED["gpu"]),
    Implementation("cudnn", cudnn.run, cudnn.unsupported_reason, verification.RECORDED["cudnn"]),
)

KERNELS = "cudnn", "tpu", "gpu"  # in the order in which "auto" tries them

# Measured on CPU by scripts/measure_attention.py (experiments/attention). Up to one tile there is nothing to skip; from
# there on gathering is faster than the masked product even if it skips nothing. The edge list is faster if less than
# this fraction of the pairs in live tiles is allowed.
DENSE_LENGTH = 64
SEGMENT_FILL = 1 / 16
# Not measured: on accelerators a loop over tiles leaves most of the device idle, so above this fraction of live tiles
# one masked product is preferred.
DENSE_DENSITY = 0.6


class ImplementationError(InputError):
    """No implementation supports the call; the message gives the reason of each."""


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    pattern: Pattern,
    *,
    impl: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    segment_ids: Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    return_lse: bool = False,
    interpret: Any = False,
) -> Float[Array, "b t h value"] | tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Softmax attention in which each query attends to the keys that `pattern` allows.

    Query i and key i are at position i. A row without an allowed key is zeros, and so are its gradients. Query head i
    uses key/value head `i // (h // g)` (grouped-query attention, arXiv:2305.13245).

    Args:
      q: Queries.
      k: Keys; `g` divides `h`.
      v: Values; their width may differ from that of the keys.
      pattern: The allowed keys per query; a pattern with heads must have `h` of them.
      impl: "dense", "gather", "segment", "tpu", "gpu" or "cudnn"; or "auto", which uses a kernel only on devices where
        it is verified (see `sparsejax.ops.verification`).
      scale: Factor on q·k; defaults to `d ** -0.5`.
      softcap: Bounds the scaled scores to `softcap * tanh(score / softcap)`.
      sink_logits: Logit per query head that joins the softmax's denominator without a value.
      alibi_slopes: Subtracts `alibi_slopes[head] * |i - j|` from the scores, after the softcap (ALiBi,
        arXiv:2108.12409). Slopes are constants: they get no gradient.
      segment_ids: Tokens attend only to tokens of their segment. One array for queries and keys if t equals s, or a
        pair of them.
      return_lse: Whether to return the log-sum-exp of the scores too, sink included: float32, minus infinity in a row
        with neither key nor sink.
      interpret: Whether to run Pallas kernels in interpret mode, or the parameters of a Pallas interpreter; other
        implementations do not support it.

    Returns:
      The output in the dtype of `q`, and with `return_lse` the log-sum-exp.

    Raises:
      InputError: Shapes do not agree.
      ImplementationError: `impl` does not support the call; with "auto", no implementation does.
    """
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slopes = None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes)
    call = AttentionCall(q, k, v, pattern, scale, softcap, sink_logits, segment_ids, interpret, slopes, return_lse)
    out, lse = _choose(impl, call).run(call)
    return (out, lse) if return_lse else out


def decode_attend(
    q: Float[Array, "b h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    mask: Bool[Array, "#h s"],
    scale: float | None = None,
    bias: Float[Array, "#h #s"] | float = 0.0,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
) -> Float[Array, "b h value"]:
    """Attention of one query per sequence over the slots of a KV cache; other arguments are those of `attend`.

    Args:
      q: Queries.
      k: Keys in the cache.
      v: Values in the cache.
      mask: The slots that the query attends to.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      bias: Added to the scores after the softcap; for example `log_multiplicity`.
      softcap: Bounds the scaled scores.
      sink_logits: Logit per query head in the softmax's denominator.
    """
    (b, h, d), g = q.shape, k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(b, g, h // g, d).astype(dtype) * (d**-0.5 if scale is None else scale)
    scores = softmax.softcap(jnp.einsum("bgrd,bsgd->bgrs", q, k.astype(dtype)), softcap)
    mask, bias = (jnp.broadcast_to(x, (h, k.shape[1])).reshape(g, h // g, -1) for x in (mask, bias))
    sink = None if sink_logits is None else sink_logits.astype(dtype).reshape(g, h // g, 1)
    p, _ = softmax.masked_softmax(scores + bias, mask, sink)
    return jnp.einsum("bgrs,bsge->bgre", p, v.astype(dtype)).reshape(b, h, -1).astype(v.dtype)


def attention_flops(pairs: int, key_width: int, value_width: int | None = None) -> float:
    """FLOPs of the two matrix products of attention, forward, over (query, key) pairs of all heads.

    Args:
      pairs: Number of pairs.
      key_width: Width of a head of queries and keys.
      value_width: Width of a head of values; defaults to `key_width`.
    """
    return 2.0 * pairs * (key_width + (key_width if value_width is None else value_width))


def _choose(impl: str, call: AttentionCall) -> Implementation:
    by_name = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    if impl not in ("auto", *by_name):
        raise ImplementationError("impl", f"{impl!r} is not one of auto, {', '.join(by_name)}")
    reasons = {}
    for name in _preferences(call) if impl == "auto" else (impl,):
        reason = by_name[name].unsupported_reason(call)
        if reason is None and impl == "auto":
            reason = by_name[name].unverified_reason(call)
        if reason is None:
            return by_name[name]
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ImplementationError("impl", f"{impl!r} does not support this call ({listed})")


def _preferences(call: AttentionCall) -> Iterator[str]:
    """The implementations that "auto" tries, best first.

    Kernels come before what XLA compiles for any device, and cuDNN comes first for the masks that it has: by published
    times it is faster than kernels that skip tiles. Neither order has been measured here.
    """
    t, s = call.q.shape[1], call.k.shape[1]
    if max(t, s) <= DENSE_LENGTH:
        yield from ("dense", *KERNELS, "gather", "segment")
        return
    yield from KERNELS
    tile, live, pairs = gather.SMALL, 0, 0
    for pattern, heads in call.head_groups().items():
        live += len(pattern.layout(t, s, (tile, tile)).columns) * len(heads)
        pairs += pattern.pairs(t, s) * len(heads)
    if pairs < SEGMENT_FILL * live * tile**2:
        yield from ("segment", "gather", "dense")
    elif jax.default_backend() != "cpu" and live > DENSE_DENSITY * -(-t // tile) * -(-s // tile) * call.q.shape[2]:
        yield from ("dense", "gather", "segment")
    else:
        yield from ("gather", "segment", "dense")
