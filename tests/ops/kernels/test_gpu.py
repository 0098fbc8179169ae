"""What the kernels for Hopper GPUs have that the suite of all implementations does not ask for."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import gpu
from sparsejax.patterns import parse
from tests.ops.kernels.test_tpu import attend_densely, differentiate
from tests.ops.test_attend import Case, check, draw_inputs
from tests.tolerances import assert_close


def make_call(pattern: str, t: int, heads: tuple[int, int] = (2, 1), width: int = 8, dtype="bfloat16") -> AttentionCall:
    random = np.random.default_rng(t)
    q, k, v = (jnp.asarray(random.standard_normal((1, t, n, width)), dtype) for n in (heads[0], *heads[1:] * 2))
    return AttentionCall(q, k, v, parse(pattern), width**-0.5, None, None, None, True)


def skip_unless_served(call: AttentionCall):
    if reason := gpu.unsupported_reason(call):
        pytest.skip(reason)


# Masks by the formula and by bits, full tiles, lengths that no tile divides, rows and keys without any tile. The
# interpreter takes seconds for each block of threads, so that most is `pytest -m nightly`.
CASES = [
    Case("causal & window(30)", 70, 130, heads=(2, 1), sink=True, dtype="bfloat16"),
    Case("causal & window(30)", 70, 70, heads=(1, 1), sink=True),
    Case("causal & window(90)", 130, 130, heads=(2, 1), sink=True),
    Case("causal & window(150)", 260, 260, heads=(2, 1), dtype="bfloat16"),
    Case("per_head(causal, globals([70]))", 129, 129, sink=True, dtype="float16"),
    Case("causal", 129, 65, segments="pair", softcap=3.0, sink=True, dtype="bfloat16"),
    Case("shift(window(9), 140)", 140, 129, dtype="bfloat16"),
]


@pytest.mark.parametrize(
    "case",
    [*CASES[:2], *(pytest.param(case, marks=pytest.mark.nightly) for case in CASES[2:])],
    ids=lambda case: f"{case.pattern}-{case.dtype}",
)
def test_values_and_gradients(case):
    skip_unless_served(make_call("causal", 9))
    check("gpu", case, draw_inputs(case, batch=1))


def test_no_races(monkeypatch):
    """Of warpgroups and copies; products of tensor cores are not in the interpreter's model."""
    call = make_call("causal & window(100)", 129)
    skip_unless_served(call)
    gpu_callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    monkeypatch.setattr(plgpu, "InterpretGPUParams", functools.partial(plgpu.InterpretGPUParams, detect_races=True))
    differentiate(gpu.run, call)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.nightly
def test_wide_heads():
    call = make_call("causal & window(40)", 129, (1, 1), width=200)
    skip_unless_served(call)
    compare(gpu.run, call, jnp.asarray(call.pattern.dense(129)))


@pytest.mark.nightly
def test_tiles_that_the_data_select():
    call = make_call("causal", 260)
    skip_unless_served(call)
    chosen = np.array([[[[0, -1], [1, 0], [-1, -1]], [[-1, 0], [0, -1], [2, 1]]]])
    picked = (chosen[..., None] == np.arange(3)).any(axis=-2)
    mask = picked.repeat(128, axis=2).repeat(128, axis=3)[:, :, :260, :260] & call.pattern.dense(260)
    compare(lambda call: gpu.run(call, selected=jnp.asarray(chosen)), call, jnp.asarray(mask))


def compare(run, call: AttentionCall, mask):
    """With attention in float32 of the same numbers."""
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}
    compute = jax.jit(lambda q, k, v: differentiate(run, dataclasses.replace(call, q=q, k=k, v=v)))
    found = compute(call.q, call.k, call.v)
    mask = jnp.broadcast_to(mask, (1, call.q.shape[2], *mask.shape[-2:]))
    expected = differentiate(lambda call: attend_densely(call, mask), dataclasses.replace(call, **wide))
    for name, one, other in zip(("out", "lse", "q", "k", "v"), found, expected, strict=True):
        assert_close(name, one, other, "float32" if name == "lse" else "bfloat16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interpret": False}, "it needs a Hopper GPU and jax 0.11 or newer, or interpret=True; here: cpu"),
        ({"alibi_slopes": jnp.zeros(2)}, "no ALiBi"),
        ({"pattern": parse("multiset(causal, sink(2))")}, "no keys that count more than once"),
        (
            {"q": jnp.zeros((1, 9, 2, 8))},
            "q, k and v all in bfloat16, or all in float16, or all in float32; got bfloat16, float32",
        ),
        (
            {"q": jnp.zeros((1, 9, 2, 300), "bfloat16"), "k": jnp.zeros((1, 9, 1, 300), "bfloat16")},
            "heads of at most 256, got 300",
        ),
    ],
)
def test_refusals(change, reason, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setenv("NPROC", "8")
    assert gpu.unsupported_reason(make_call("causal", 9)) is None
    assert gpu.unsupported_reason(dataclasses.replace(make_call("causal", 9), **change)).startswith(reason)


def test_interpreting_is_refused_where_it_would_fail(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert gpu.unsupported_reason(make_call("causal", 9)).startswith("interpreting it needs 8 threads, here are 2: set NPROC")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert gpu.unsupported_reason(make_call("causal", 9)).startswith("interpreting it needs jax 0.12 or newer")


def test_other_tiles():
    with pytest.raises(ValueError, match=r"attend: gpu: tiles of \(128, 128\), got \(256, 256\)"):
        gpu.run(make_call("causal", 9), (256, 256))
