"""`attend`: attention under a pattern, by whichever implementation serves the request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops import cudnn, dense, gather, segment
from sparsejax.ops.kernels import gpu, tpu
from sparsejax.ops.request import Request, cap, masked_softmax
from sparsejax.patterns import Pattern


class Implementation(NamedTuple):
    """A way to compute attention. `refuse` says in words why it cannot serve a request, or None.

    `run` gives the output and the log-sum-exp, for which there may be None where the request does not want it.
    """

    name: str
    run: Callable[[Request], tuple[Array, Array | None]]
    refuse: Callable[[Request], str | None]


IMPLEMENTATIONS = (
    Implementation("dense", dense.run, dense.refuse),
    Implementation("gather", gather.run, gather.refuse),
    Implementation("segment", segment.run, segment.refuse),
    Implementation("tpu", tpu.run, tpu.refuse),
    Implementation("gpu", gpu.run, gpu.refuse),
    Implementation("cudnn", cudnn.run, cudnn.refuse),
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
    """No implementation can serve the request; the message says why each one refused."""


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
      ImplementationError: `impl` cannot serve the request, or for "auto" none can; lists each one's reason.
    """
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slopes = None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes)
    request = Request(q, k, v, pattern, scale, softcap, sink_logits, segment_ids, interpret, slopes, return_lse)
    out, lse = _choose(impl, request).run(request)
    return (out, lse) if return_lse else out


def attend_one(
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
    scores = cap(jnp.einsum("bgrd,bsgd->bgrs", q, k.astype(wide)), softcap)
    mask, bonus = (jnp.broadcast_to(x, (h, k.shape[1])).reshape(g, h // g, -1) for x in (mask, bonus))
    sink = None if sink_logits is None else sink_logits.astype(wide).reshape(g, h // g, 1)
    weights, _ = masked_softmax(scores + bonus, mask, sink)
    return jnp.einsum("bgrs,bsge->bgre", weights, v.astype(wide)).reshape(b, h, -1).astype(v.dtype)


def merge(
    parts: Sequence[tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]],
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Attention over a set of keys, from the outputs and log-sum-exps of attention over parts of it."""
    outs, lses = zip(*parts, strict=True)
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = [jnp.exp(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, shares)
    live = total > 0
    safe = jnp.where(live, total, 1.0)
    out = sum(
        out.astype(lse.dtype) * (share / safe)[..., None] for out, lse, share in zip(outs, lses, shares, strict=True)
    )
    return out.astype(outs[0].dtype), jnp.where(live, top + jnp.log(safe), -jnp.inf)


def _choose(impl: str, request: Request) -> Implementation:
    known = {one.name: one for one in IMPLEMENTATIONS}
    if impl not in ("auto", *known):
        raise ImplementationError(f"attend: no implementation {impl!r}; there are {', '.join(known)} and auto")
    reasons = {}
    for name in _preferences(request) if impl == "auto" else (impl,):
        reasons[name] = known[name].refuse(request)
        if reasons[name] is None:
            return known[name]
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ImplementationError(f"attend: impl={impl!r} cannot serve this request ({why})")


def _preferences(request: Request) -> Iterator[str]:
    """What "auto" tries, best first.

    Kernels for the machine come before what XLA makes of any machine, and cuDNN before them for the masks that it has:
    by published times it leads even kernels that visit each of their tiles. Neither order has been measured here.
    """
    t, s = request.q.shape[1], request.k.shape[1]
    kernels = "cudnn", "tpu", "gpu"
    if max(t, s) <= DENSE_LENGTH:
        yield from ("dense", *kernels, "gather", "segment")
        return
    yield from kernels
    tile, live, pairs = gather.SMALL, 0, 0
    for pattern, heads in request.head_groups().items():
        live += len(pattern.layout(t, s, (tile, tile)).columns) * len(heads)
        pairs += pattern.pairs(t, s) * len(heads)
    if pairs < SEGMENT_FILL * live * tile**2:
        yield from ("segment", "gather", "dense")
    elif jax.default_backend() != "cpu" and live > DENSE_DENSITY * -(-t // tile) * -(-s // tile) * request.q.shape[2]:
        yield from ("dense", "gather", "segment")
    else:
        yield from ("gather", "segment", "dense")
