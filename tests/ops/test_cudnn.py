"""The calls of cuDNN, with XLA's attention on CPU as a substitute."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import attend, cudnn
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.selection import Selection
from sparsejax.ops.verification import write_record
from sparsejax.patterns import parse
from tests.messages import check_message
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

T = 70


def make_call(pattern: str, t: int = T, width: int = 16, dtype="bfloat16") -> AttentionCall:
    random = np.random.default_rng(t)
    q, k, v = (jnp.asarray(random.standard_normal((2, t, heads, width)), dtype) for heads in (4, 2, 2))
    return AttentionCall(q, k, v, parse(pattern), 0.3, None, None, None, False, return_lse=False)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU on which cuDNN is verified; the fixture is the list of its calls."""
    device = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    write_record(device.device_kind, ["cudnn"])
    calls = []

    def compute(q, k, v, *, implementation, **options):
        calls.append(options | {"implementation": implementation})
        return on_cpu(q, k, v, **options)

    on_cpu = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", compute)
    return calls


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
def test_masks(gpu, pattern, expected):
    call = make_call(pattern)
    assert (cudnn.unsupported_reason(call) is None) == (expected is not None)
    if expected is None:
        return
    out = attend(call.q, call.k, call.v, call.pattern, scale=call.scale)
    assert gpu == [{"scale": 0.3, "implementation": "cudnn"} | expected]
    wide = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    assert_close("out", out, attend(*wide, call.pattern, impl="dense", scale=call.scale), "bfloat16")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "change",
    [
        {"return_lse": True},
        {"interpret": True},
        {"softcap": 3.0},
        {"sink_logits": jnp.zeros(4)},
        {"q": jnp.zeros((2, T, 4, 16))},
        {"q": jnp.zeros((2, 9, 4, 16), "bfloat16")},
        {"v": jnp.zeros((2, T, 2, 8), "bfloat16")},
        {"pattern": parse("window(9, 5)")},
        {"selection": Selection(jnp.zeros((2, 1, T, 1), jnp.int32), make_blocks(T, 8))},
    ],
    ids=["lse", "interpret", "softcap", "sink", "dtypes", "lengths", "widths", "pattern", "selection"],
)
def test_calls_that_it_does_not_support(change):
    check_message(cudnn.unsupported_reason(dataclasses.replace(make_call("causal"), **change)))


@pytest.mark.parametrize(
    "device",
    [
        {"device_kind": "NVIDIA T4", "compute_capability": "7.5"},
        {"device_kind": "AMD Instinct MI300X", "compute_capability": "gfx942"},
        {"device_kind": "cpu"},
    ],
    ids=["old", "amd", "cpu"],
)
def test_devices_without_it(monkeypatch, device):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    check_message(cudnn.unsupported_reason(make_call("causal")))
