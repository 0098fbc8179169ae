"""`attend`: attention under a pattern, by whichever implementation serves the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops import cudnn, dense, gather, segment, softmax
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import gpu, tpu
from sparsejax.patterns import Pattern


class Implementation(NamedTuple):
    """A way to compute attention. `unsupported_reason` says in words why it cannot serve a call, or None.

    `run` gives the output and the log-sum-exp, for which there may be None where the call does not want it.
    """

    name: str
    run: Callable[[AttentionCall], tuple[Array, Array | None]]
    unsupported_reason: Callable[[AttentionCall], str | None]


IMPLEMENTATIONS = (
    Implementation("dense", dense.run, dense.unsupported_reason),
    Implementation("gather", gather.run, gather.unsupported_reason),
    Implementation("segment", segment.run, segment.unsupported_reason),
    Implementation("tpu", tpu.run, tpu.unsupported_reason),
    Implementation("gpu", gpu.run, gpu.unsupported_reason),
    Implementation("cudnn", cudnn.run, cudnn.unsupported_reason),
)

# Measured on CPU by scripts/measure_attention.py (experiments/attention): up to one tile there is nothing to skip, and
# from there on gathering beats the masked product even where it skips nothing. Edges one by one beat it where fewer
# pairs are allowed than this share of those in the live tiles.
DENSE_LENGTH = 64
SEGMENT_FILL = 1 / 16
# Not measured: elsewhere a loop over tiles keeps little of the machine busy, and above this share of live tiles one
# masked product is taken.
DENSE_DENSITY = 0.6


class ImplementationError(ValueError):
    """No implementation can serve the call; the message says why each one refused."""


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    pattern: Pattern,
    *,
    impl: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    segment_ids: Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> Float[Array, "b t h e"] | tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Softmax attention in which `pattern` says which keys each query may look at.

    Query i and key i are both at position i. A row without any allowed key gives zeros, and zero gradients.
    Query head i reads key/value head `i // (h // g)` (grouped queries, arXiv:2305.13245).

    Args:
      q: queries.
      k: keys; `g` divides `h`.
      v: values; their width may differ from that of the keys.
      pattern: who may look at whom; a pattern with heads must have `h` of them.
      impl: "auto", or the name of an implementation: "dense", "gather", "segment", "tpu", "gpu" or
        "cudnn".
      scale: factor on q·k, `d ** -0.5` if not given.
      softcap: bounds the scaled scores to `softcap * tanh(score / softcap)`.
      sink_logits: one logit for each query head that joins the softmax's denominator but has no value.
      alibi_slopes: scores fall by `alibi_slopes[head] * |i - j|`, after the softcap (ALiBi, arXiv:2108.12409). They are
        constants: no gradient flows into them.
      segment_ids: tokens look only at tokens of their own segment; one array for both sides when t equals s,
        or a pair (queries, keys).
      return_lse: also return the log-sum-exp of the scores, sink included: float32, minus infinity where a
        row has neither key nor sink.
      interpret: run Pallas kernels in interpret mode; only Pallas implementations take it.

    Returns:
      The output in the dtype of `q`, and with `return_lse` the log-sum-exp.

    Raises:
      ValueError: shapes that do not fit together.
      ImplementationError: `impl` cannot serve the call, or for "auto" none can; lists each one's reason.
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
    v: Float[Array, "b s g e"],
    mask: Bool[Array, "#h s"],
    scale: float | None = None,
    bonus: Float[Array, "#h s"] | float = 0.0,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
) -> Float[Array, "b h e"]:
    """Attention of one query over the slots of a decode cache; `mask` says which slots it may look at.

    `bonus` is added to the scores; the logarithm of how often a slot counts. The rest is as in `attend`.
    """
    (b, h, d), g = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(b, g, h // g, d).astype(wide) * (d**-0.5 if scale is None else scale)
    scores = softmax.softcap(jnp.einsum("bgrd,bsgd->bgrs", q, k.astype(wide)), softcap)
    mask, bonus = (jnp.broadcast_to(x, (h, k.shape[1])).reshape(g, h // g, -1) for x in (mask, bonus))
    sink = None if sink_logits is None else sink_logits.astype(wide).reshape(g, h // g, 1)
    weights, _ = softmax.masked_softmax(scores + bonus, mask, sink)
    return jnp.einsum("bgrs,bsge->bgre", weights, v.astype(wide)).reshape(b, h, -1).astype(v.dtype)


def _choose(impl: str, call: AttentionCall) -> Implementation:
    known = {one.name: one for one in IMPLEMENTATIONS}
    if impl not in ("auto", *known):
        raise ImplementationError(f"attend: no implementation {impl!r}; there are {', '.join(known)} and auto")
    reasons = {}
    for name in _preferences(call) if impl == "auto" else (impl,):
        reasons[name] = known[name].unsupported_reason(call)
        if reasons[name] is None:
            return known[name]
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ImplementationError(f"attend: impl={impl!r} cannot serve this call ({why})")


def _preferences(call: AttentionCall) -> Iterator[str]:
    """What "auto" tries, best first.

    Kernels for the machine come before what XLA makes of any machine, and cuDNN before them for the masks that it has:
    by published times it leads even kernels that visit each of their tiles. Neither order has been measured here.
    """
    t, s = call.q.shape[1], call.k.shape[1]
    kernels = "cudnn", "tpu", "gpu"
    if max(t, s) <= DENSE_LENGTH:
        yield from ("dense", *kernels, "gather", "segment")
        return
    yield from kernels
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
