"""cuDNN's flash attention on NVIDIA GPUs, for the masks that it has: full, causal, and causal windows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.device import device_kind
from sparsejax.patterns import And, Causal, Full, Window

MIN_CAPABILITY = 8, 0
MAX_WIDTH, WIDTH_MULTIPLE = 128, 8  # of heads
DTYPES = "bfloat16", "float16"


class Mask(NamedTuple):
    """A mask of cuDNN. `left` is the number of keys before its position that a query attends to; None: all."""

    causal: bool
    left: int | None


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why cuDNN cannot compute the call, or None."""
    (_, t, _, d), (_, s, _, value) = call.q.shape, call.v.shape
    dtypes = {str(x.dtype) for x in (call.q, call.k, call.v)}
    extras = call.softcap, call.sink_logits, call.alibi_slopes, call.segments
    capability = ".".join(map(str, MIN_CAPABILITY))
    reasons = (
        (call.interpret, "interpret=True is for Pallas kernels"),
        (
            _capability() < MIN_CAPABILITY,
            f"{device_kind()} is not an NVIDIA GPU of compute capability {capability} or higher",
        ),
        (
            len(dtypes) > 1 or not dtypes <= {*DTYPES},
            f"{', '.join(sorted(dtypes))}: q, k and v must all be {' or all '.join(DTYPES)}",
        ),
        (any(x is not None for x in extras), "no softcap, sink logits, ALiBi or segments"),
        (call.selection is not None, "no keys that the data choose"),
        (call.return_lse, "no log-sum-exp: cuDNN's has the dtype of q and no gradient"),
        (
            d != value or d % WIDTH_MULTIPLE or d > MAX_WIDTH,
            f"{d}, {value}: head widths must be equal, a multiple of {WIDTH_MULTIPLE} and at most {MAX_WIDTH}",
        ),
        (t != s, f"{t} queries and {s} keys: their numbers must be equal"),
        (find_mask(call) is None, "only full, causal and causal window patterns"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def run(call: AttentionCall) -> tuple[Float[Array, "b t h value"], None]:
    """Output in the dtype of q; no log-sum-exp."""
    mask = find_mask(call)
    assert mask is not None  # as `unsupported_reason` checks
    window: dict[str, Any] = {} if mask.left is None else {"local_window_size": (mask.left, 0)}
    options: dict[str, Any] = {"scale": call.scale, "is_causal": mask.causal, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(call.q, call.k, call.v, **options, **window), None


def find_mask(call: AttentionCall) -> Mask | None:
    """The mask that equals the pattern of all heads, or None."""
    first, *others = call.head_groups()
    terms = first.terms if isinstance(first, And) else (first,)
    if others or not {type(term) for term in terms} <= {Full, Causal, Window}:
        return None
    windows = [term for term in terms if isinstance(term, Window)]
    causal = Causal() in terms or any(window.right == 0 for window in windows)
    return None if windows and not causal else Mask(causal, min((window.left for window in windows), default=None))


def _capability() -> tuple[int, ...]:
    """Compute capability of the first device; (0,) unless it is an NVIDIA GPU. AMD's are names, not numbers."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return tuple(map(int, capability.split("."))) if "NVIDIA" in device_kind() and "." in capability else (0,)
