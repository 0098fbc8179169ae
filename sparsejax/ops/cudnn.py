"""cuDNN's flash attention on NVIDIA GPUs, for the masks that it has: none, causal, and a causal window."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels.mesh import device_kind
from sparsejax.patterns import And, Causal, Full, Window

LEAST = 8, 0  # compute capability
WIDEST, MULTIPLE = 128, 8  # heads
DTYPES = "bfloat16", "float16"


class Mask(NamedTuple):
    """`left`: how many keys before its own a query sees; None: all."""

    causal: bool
    left: int | None


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why cuDNN cannot serve the call, or None."""
    (_, t, _, d), (_, s, _, e) = call.q.shape, call.v.shape
    dtypes = {str(x.dtype) for x in (call.q, call.k, call.v)}
    extras = call.softcap, call.sink_logits, call.alibi_slopes, call.segments
    reasons = (
        (call.interpret, "interpret=True is for Pallas kernels"),
        (
            _capability() < LEAST,
            f"it needs an NVIDIA GPU of compute capability {'.'.join(map(str, LEAST))} or more; here: {device_kind()}",
        ),
        (
            len(dtypes) > 1 or not dtypes <= {*DTYPES},
            f"q, k and v in {' or in '.join(DTYPES)}; got {', '.join(sorted(dtypes))}",
        ),
        (any(x is not None for x in extras), "no softcap, sink logits, ALiBi or segments"),
        (call.return_lse, "no log-sum-exp: cuDNN's has the dtype of q and no gradient"),
        (d != e or d % MULTIPLE or d > WIDEST, f"one width of heads, a multiple of 8 up to {WIDEST}; got {d} and {e}"),
        (t != s, f"as many queries as keys; got {t} and {s}"),
        (find_mask(call) is None, "the masks full, causal, and causal windows"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def run(call: AttentionCall) -> tuple[Float[Array, "b t h e"], None]:
    """Output in the dtype of q; no log-sum-exp."""
    causal, left = find_mask(call)
    window = {} if left is None else {"local_window_size": (left, 0)}
    options = {"scale": call.scale, "is_causal": causal, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(call.q, call.k, call.v, **options, **window), None


def find_mask(call: AttentionCall) -> Mask | None:
    """The one that is just the pattern of all heads, if there is one."""
    first, *others = call.head_groups()
    terms = first.terms if isinstance(first, And) else (first,)
    if others or not {type(term) for term in terms} <= {Full, Causal, Window}:
        return None
    windows = [term for term in terms if isinstance(term, Window)]
    causal = Causal() in terms or any(window.right == 0 for window in windows)
    return None if windows and not causal else Mask(causal, min((window.left for window in windows), default=None))


def _capability() -> tuple[int, ...]:
    """Of the machine's first GPU of NVIDIA's; (0,) if there is none. AMD's have names for numbers."""
    found = getattr(jax.devices()[0], "compute_capability", "")
    return tuple(map(int, found.split("."))) if "NVIDIA" in device_kind() and "." in found else (0,)
