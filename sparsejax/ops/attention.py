"""`attend`: attention under a pattern, by any implementation that supports the call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError
from sparsejax.ops import cudnn, dense, exchange, gather, segment, softmax, verification
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import reject_forward_mode
from sparsejax.ops.device import device_kind, on_cpu
from sparsejax.ops.kernels import gpu, tpu
from sparsejax.ops.kernels.mesh import run_on_mesh
from sparsejax.ops.selection import Selection
from sparsejax.patterns import Pattern
from sparsejax.patterns.algebra import OffsetQueries
from sparsejax.patterns.base import MAX_POSITION


class Implementation(NamedTuple):
    """A way to compute attention.

    Attributes:
      name: The value of `impl` that selects it.
      run: Returns the output and the log-sum-exp, which may be None if the call does not need it.
      unsupported_reason: Why it cannot compute a call on the current devices, or None.
      verified_on: Device kinds on which a recorded benchmark verified it; None: it is plain JAX and needs none.
      kernel: How it attends to the keys of a shard of a sequence, if it is a kernel that does.
    """

    name: str
    run: Callable[[AttentionCall], tuple[Array, Array | None]]
    unsupported_reason: Callable[[AttentionCall], str | None]
    verified_on: frozenset[str] | None = None
    kernel: exchange.Kernel | None = None

    def reason_against(self, call: AttentionCall, impl: str) -> str | None:
        """Why it does not compute a call for the implementation that is asked for, or None."""
        reason = self.unsupported_reason(call)
        return self.unverified_reason(call) if reason is None and impl == "auto" else reason

    def unverified_reason(self, call: AttentionCall) -> str | None:
        """Why "auto" does not use it for a call that it supports, or None."""
        if self.verified_on is None or call.interpret:
            return None
        kind = device_kind()
        if kind in self.verified_on or self.name in verification.verified_here(kind):
            return None
        verification.suggest_doctor(kind)
        return f"not verified on {kind} with jax {jax.__version__}; run `sparsejax doctor`"


TPU = exchange.Kernel(tpu.run, tpu.choose_tile, tpu.TILE_SIDES)
GPU = exchange.Kernel(gpu.run, lambda *_: (gpu.TILE_SIDE, gpu.TILE_SIDE), (gpu.TILE_SIDE,))

IMPLEMENTATIONS = (
    Implementation("dense", dense.run, dense.unsupported_reason),
    Implementation("gather", gather.run, gather.unsupported_reason),
    Implementation("segment", segment.run, segment.unsupported_reason),
    Implementation("tpu", tpu.run, tpu.unsupported_reason, verification.RECORDED["tpu"], TPU),
    Implementation("gpu", gpu.run, gpu.unsupported_reason, verification.RECORDED["gpu"], GPU),
    Implementation("cudnn", cudnn.run, cudnn.unsupported_reason, verification.RECORDED["cudnn"]),
)

# Of a sharded sequence, see `sparsejax.ops.ring`; on one shard it is "gather".
RING = Implementation("ring", gather.run, exchange.unsupported_in_ring)
KERNELS = "cudnn", "tpu", "gpu"  # in the order in which "auto" tries them

# Measured on CPU (experiments/attention). Up to one tile there is nothing to skip; from there on gathering is faster
# than the masked product even if it skips nothing. The edge list is faster if less than this fraction of the pairs in
# live tiles is allowed.
DENSE_LENGTH = 64
SEGMENT_FILL = 1 / 16
# Measured on CPU (experiments/selected_attention): an edge takes as long as this number of pairs in masked tiles.
EDGE_PAIRS = 20
# Not measured: on accelerators a loop over tiles leaves most of the device idle, so above this fraction of live tiles
# one masked product is preferred.
DENSE_DENSITY = 0.6


class ImplementationError(InputError):
    """No implementation supports the call; the message gives the reason of each."""


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    pattern: Pattern | str,
    *,
    selection: Selection | None = None,
    impl: str = "auto",
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    segment_ids: Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    return_lse: bool = False,
    interpret: Any = False,
) -> Float[Array, "b t h value"] | tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Softmax attention in which each query attends to the keys that `pattern` allows.

    Key j is at position j and query i at position `q_offset` + i. A row without an allowed key is zeros, and so are its
    gradients. A row with a query that is not finite, or with an allowed key or value that is not finite, is NaN and has
    no gradient; no other row is affected. Query head i uses key/value head `i // (h // g)` (grouped-query attention,
    arXiv:2305.13245). Products have the widest dtype among those of `q`, `k` and `v`.

    Implementations in plain JAX can be differentiated in forward and reverse mode, to any order; kernels ("tpu", "gpu"
    and "cudnn") in reverse mode once.

    If the sequence is sharded, "auto", "gather", "tpu" and "gpu" exchange the keys that the pattern lets a shard read,
    see `sparsejax.ops.exchange`; the number of shards must divide the lengths. Keys that all shards read are gathered,
    as are those among which queries chose; with "ring" they travel from shard to shard, so that none holds them all.

    Args:
      q: Queries.
      k: Keys; `g` divides `h`.
      v: Values; their width may differ from that of the keys.
      pattern: The allowed keys per query, or its text form; a pattern with heads must have `h` of them.
      selection: Groups of keys that each query chose, see `sparsejax.ops.selection`; a query attends to those of their
        keys that the pattern and the segments allow. The pattern must be the same for all heads.
      impl: "dense", "gather", "segment", "ring" (that is "gather" on one shard), "tpu", "gpu" or "cudnn"; or "auto",
        which uses a kernel only on devices where it is verified (see `sparsejax.ops.verification`).
      q_offset: Position of the first query. Queries that continue a sequence, as in chunked prefill, follow the keys
        before them: `q_offset=s - t` if the last query is at the last key. The sequence that the pattern describes
        ends with the last key or query. By default queries and keys are counted from 0, independently of each other;
        with fewer queries than keys this requires a pattern that means the same with `q_offset=s - t`, such as `full`.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      softcap: Bounds the scaled scores to `softcap * tanh(score / softcap)`; positive.
      sink_logits: Logit per query head that joins the softmax's denominator without a value.
      alibi_slopes: Subtracts `alibi_slopes[head] * distance` from the scores, after the softcap (ALiBi,
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
      InputError: Shapes do not agree, an argument is invalid, or `q_offset` is required.
      ImplementationError: `impl` does not support the call; with "auto", no implementation does.
      TypeError: Forward-mode differentiation of a kernel.
    """
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    pattern = parse_pattern(pattern)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slopes = None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes)
    call = AttentionCall(
        q, k, v, pattern, scale, softcap, sink_logits, segment_ids, interpret, slopes, return_lse, selection=selection
    )
    pattern = _offset_queries(pattern, q.shape[1], k.shape[1], q_offset)
    dtype = q.dtype
    widest = jnp.promote_types(dtype, jnp.promote_types(k.dtype, v.dtype))
    arrays = (*(x.astype(widest) for x in (q, k, v)), sink_logits, segment_ids, slopes)
    q, k, v, sink_logits, segment_ids, slopes = vary_alike(arrays)
    call = dataclasses.replace(
        call,
        **dict(zip("qkv", softmax.confine_nan(q, k, v), strict=True)),
        pattern=pattern,
        sink_logits=sink_logits,
        segments=segment_ids,
        alibi_slopes=slopes,
        q_offset=q_offset or 0,
    )
    if exchange.applies(call, impl):
        call, kernel = _find_kernel(impl, call)
        out, lse = exchange.run(call, impl == "ring", kernel)
        return (out.astype(dtype), lse) if return_lse else out.astype(dtype)
    run = functools.partial(_run, impl)
    out, lse = exchange.run_selected(call, run) if exchange.gathers(call) else run(call)
    return (out.astype(dtype), lse) if return_lse else out.astype(dtype)


def _run(impl: str, call: AttentionCall) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"] | None]:
    """Output and log-sum-exp, which may be None if the call does not need it."""
    chosen = _choose(impl, call)
    call = _prepare(chosen, call)
    return chosen.run(call) if call.selection is None else run_on_mesh(chosen.run, call)


def _prepare(chosen: Implementation, call: AttentionCall) -> AttentionCall:
    """The call, which a kernel does not differentiate in forward mode."""
    if chosen.verified_on is None:
        return call
    problem = f"attend: {chosen.name!r} has no forward-mode differentiation; use impl='gather'"
    return dataclasses.replace(call, **reject_forward_mode({"q": call.q, "k": call.k, "v": call.v}, problem))


def _find_kernel(impl: str, call: AttentionCall) -> tuple[AttentionCall, exchange.Kernel | None]:
    """The kernel that attends to the keys of a shard, if there is one, and the call for it."""
    tokens = call.q.shape[1] // exchange.shard_count()
    reasons = {}
    for chosen in IMPLEMENTATIONS:
        if chosen.kernel is None or impl not in ("auto", chosen.name):
            continue
        reason = chosen.reason_against(call, impl)
        if reason is None and not chosen.kernel.list_sides(tokens):
            reason = f"{tokens} tokens of a shard are not a multiple of {chosen.kernel.sides[0]}"
        if reason is None:
            return _prepare(chosen, call), chosen.kernel
        reasons[chosen.name] = reason
    if impl in reasons:
        raise ImplementationError("impl", f"{impl!r} does not support this call ({impl}: {reasons[impl]})")
    return call, None


def attention_flops(pairs: int, key_width: int, value_width: int | None = None) -> float:
    """FLOPs of the two matrix products of attention, forward, over (query, key) pairs of all heads.

    Args:
      pairs: Number of pairs.
      key_width: Width of a head of queries and keys.
      value_width: Width of a head of values; defaults to `key_width`.
    """
    return 2.0 * pairs * (key_width + (key_width if value_width is None else value_width))


def parse_pattern(pattern: Any) -> Pattern:
    """Returns a pattern, given the pattern or its text form.

    Raises:
      InputError: It is neither.
      PatternError: The text does not parse.
    """
    if isinstance(pattern, str):
        return patterns.parse(pattern)
    if not isinstance(pattern, Pattern):
        shape = f" of shape {list(pattern.shape)}" if hasattr(pattern, "shape") else ""
        raise InputError("pattern", f"{type(pattern).__name__}{shape}: expected a Pattern or its text form")
    return pattern


def _offset_queries(pattern: Pattern, t: int, s: int, q_offset: int | None) -> Pattern:
    """The pattern of queries whose first is at position `q_offset`."""
    if q_offset is None:
        if t < s and _depends_on_offset(pattern, t, s):
            raise InputError(
                "q_offset",
                f"required by {t} queries, {s} keys and {pattern}; the last query is at the last key with {s - t}, "
                "the first query at the first key with 0",
            )
        return pattern
    if isinstance(q_offset, bool) or not isinstance(q_offset, int | np.integer) or not 0 <= q_offset <= MAX_POSITION:
        raise InputError("q_offset", f"{q_offset!r} is not an integer from 0 to 2**30; layouts cannot depend on arrays")
    return pattern if t + q_offset >= s and not q_offset else OffsetQueries(pattern, int(q_offset))


def _depends_on_offset(pattern: Pattern, t: int, s: int) -> bool:
    """Whether the first `t` queries of `s` keys attend to other keys than the last `t` queries."""
    last = OffsetQueries(pattern, s - t)
    return not pattern.pairs(t, s) == last.pairs(t, s) == (pattern & last).pairs(t, s)


def _choose(impl: str, call: AttentionCall) -> Implementation:
    by_name = {implementation.name: implementation for implementation in (*IMPLEMENTATIONS, RING)}
    if impl not in ("auto", *by_name):
        raise ImplementationError("impl", f"{impl!r} is not one of auto, {', '.join(by_name)}")
    reasons = {}
    for name in _preferences(call) if impl == "auto" else (impl,):
        reason = by_name[name].reason_against(call, impl)
        if reason is None:
            return by_name[name]
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ImplementationError("impl", f"{impl!r} does not support this call ({listed})")


def _prefers_edges(call: AttentionCall, selection: Selection) -> bool:
    """Whether the keys of a selection are few enough to be scored one by one.

    Blocks from `gather.BLOCK` keys on are multiplied as they are. For smaller ones "gather" masks tiles, in time
    proportional to the allowed pairs, and "segment" takes time proportional to the chosen ones.
    """
    if selection.blocks.size >= gather.BLOCK:
        return False
    k, s = selection.groups.shape[3], call.k.shape[1]
    chosen = call.query_count * k * selection.blocks.size
    return not on_cpu() or call.pattern.pairs(call.query_count, s) > EDGE_PAIRS * chosen


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
    if call.selection is not None:
        yield from ("segment", "gather") if _prefers_edges(call, call.selection) else ("gather", "segment")
        return
    tile, live, pairs = gather.SMALL, 0, 0
    for pattern, heads in call.head_groups().items():
        live += len(pattern.layout(t, s, (tile, tile)).columns) * len(heads)
        pairs += pattern.pairs(t, s) * len(heads)
    if pairs < SEGMENT_FILL * live * tile**2:
        yield from ("segment", "gather", "dense")
    elif not on_cpu() and live > DENSE_DENSITY * -(-t // tile) * -(-s // tile) * call.q.shape[2]:
        yield from ("dense", "gather", "segment")
    else:
        yield from ("gather", "segment", "dense")
