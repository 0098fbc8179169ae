"""What cuDNN is given: there is none here, so that the product over all pairs stands in for it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import attend, cudnn
from sparsejax.ops.call import AttentionCall
from sparsejax.patterns import parse
from tests.tolerances import assert_close

T = 70


def make_call(pattern: str, t: int = T, width: int = 16, dtype="bfloat16") -> AttentionCall:
    random = np.random.default_rng(t)
    q, k, v = (jnp.asarray(random.standard_normal((2, t, heads, width)), dtype) for heads in (4, 2, 2))
    return AttentionCall(q, k, v, parse(pattern), 0.3, None, None, None, False, return_lse=False)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    device = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    asked = []

    def compute(q, k, v, *, implementation, **options):
        asked.append(options | {"implementation": implementation})
        return plain(q, k, v, **options)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", compute)
    return asked


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("full", {"is_causal": False}),
        ("causal", {"is_causal": True}),
        ("full & causal", {"is_causal": True}),
        ("causal & window(9)", {"is_causal": True, "local_window_size": (9, 0)}),
        ("window(9)", {"is_causal": True, "local_window_size": (9, 0)}),
        ("window(9, 5) & causal & window(20)", {"is_causal": True, "local_window_size": (9, 0)}),
        ("window(0)", {"is_causal": True, "local_window_size": (0, 0)}),
        ("causal & window(200)", {"is_causal": True, "local_window_size": (200, 0)}),
        ("per_head(causal, window(99) & causal, causal, causal)", None),
        ("per_head(causal, causal, causal, causal)", {"is_causal": True}),
        ("window(9, 5)", None),
        ("causal & dilated(9, stride=2)", None),
        ("causal & (window(9) | sink(1))", None),
        ("causal | prefix(3)", None),
        ("shift(causal, 1)", None),
    ],
)
def test_masks_that_it_has(gpu, pattern, expected):
    call = make_call(pattern)
    if expected is None:
        assert cudnn.unsupported_reason(call) == "the masks full, causal, and causal windows"
        return
    assert cudnn.unsupported_reason(call) is None
    out = attend(call.q, call.k, call.v, call.pattern, scale=call.scale)  # auto takes it
    assert gpu == [{"scale": 0.3, "implementation": "cudnn"} | expected]
    wide = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    assert_close("out", out, attend(*wide, call.pattern, impl="dense", scale=call.scale), "bfloat16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"return_lse": True}, "no log-sum-exp: cuDNN's has the dtype of q and no gradient"),
        ({"interpret": True}, "interpret=True is for Pallas kernels"),
        ({"softcap": 3.0}, "no softcap, sink logits, ALiBi or segments"),
        ({"sink_logits": jnp.zeros(4)}, "no softcap, sink logits, ALiBi or segments"),
        ({"q": jnp.zeros((2, T, 4, 16))}, "q, k and v in bfloat16 or in float16; got bfloat16, float32"),
        ({"q": jnp.zeros((2, 9, 4, 16), "bfloat16")}, "as many queries as keys; got 9 and 70"),
        ({"v": jnp.zeros((2, T, 2, 8), "bfloat16")}, "one width of heads, a multiple of 8 up to 128; got 16 and 8"),
    ],
)
def test_refusals(gpu, change, reason):
    assert cudnn.unsupported_reason(dataclasses.replace(make_call("causal"), **change)) == reason


@pytest.mark.parametrize(
    "device",
    [
        {"device_kind": "NVIDIA T4", "compute_capability": "7.5"},
        {"device_kind": "AMD Instinct MI300X", "compute_capability": "gfx942"},
        {"device_kind": "cpu"},
    ],
)
def test_machines_without_it(monkeypatch, device):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    kind = device["device_kind"]
    reason = f"it needs an NVIDIA GPU of compute capability 8.0 or more; here: {kind}"
    assert cudnn.unsupported_reason(make_call("causal")) == reason
