"""The Hopper kernels, beyond what the suite of all implementations covers."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.errors import InputError
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import gpu
from sparsejax.patterns import parse
from tests.messages import check_message, rejects
from tests.ops.kernels import test_tpu
from tests.ops.kernels.test_tpu import assert_agrees, differentiate
from tests.ops.test_attend import Case, check, draw_inputs

make_call = functools.partial(test_tpu.make_call, b=1, dtype="bfloat16")


def skip_unless_supported(call: AttentionCall):
    if reason := gpu.unsupported_reason(call):
        pytest.skip(reason)


# Masks that are evaluated and masks that are looked up, full tiles, lengths that tiles do not divide, rows and keys
# without tiles. The interpreter takes seconds per thread block, so most cases are nightly.
CASES = [
    Case("causal & window(30)", 70, 130, heads=(2, 1), sink=True, dtype="bfloat16", q_offset=60),
    Case("causal & window(30)", 70, 70, heads=(1, 1), sink=True),
    Case("causal", 140, 140, heads=(2, 1), choice=(1, 3, 20), dtype="bfloat16"),
    Case("causal & window(90)", 130, 130, heads=(2, 1), sink=True),
    Case("causal & window(90)", 260, 260, (4, 2), sink=True, segments="one", choice=(4, 5, 10)),
    Case("causal & window(150)", 260, 260, heads=(2, 1), dtype="bfloat16"),
    Case("per_head(causal, globals([70]))", 129, 129, sink=True, dtype="float16"),
    Case("causal", 129, 65, segments="pair", softcap=3.0, sink=True, dtype="bfloat16"),
    Case("shift(window(9), 140)", 140, 129, dtype="bfloat16"),
]


@pytest.mark.parametrize(
    "case",
    [*CASES[:3], *(pytest.param(case, marks=pytest.mark.nightly) for case in CASES[3:])],
    ids=lambda case: f"{case.pattern}-{case.dtype}-{case.choice}",
)
def test_values_and_gradients(case):
    skip_unless_supported(make_call("causal", 9))
    check("gpu", case, draw_inputs(case, batch=1))


def test_no_races(monkeypatch):
    """Covers warpgroups and copies; the interpreter does not model the products of tensor cores."""
    call = make_call("causal & window(100)", 129)
    skip_unless_supported(call)
    gpu_callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    monkeypatch.setattr(plgpu, "InterpretGPUParams", functools.partial(plgpu.InterpretGPUParams, detect_races=True))
    differentiate(gpu.run, call)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.nightly
def test_wide_heads():
    call = make_call("causal & window(40)", 129, (1, 1), width=200)
    skip_unless_supported(call)
    assert_agrees(gpu.run, call)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"interpret": False}, id="device"),
        pytest.param({"alibi_slopes": jnp.zeros(2)}, id="alibi"),
        pytest.param({"pattern": parse("multiset(causal, sink(2))")}, id="multiplicity"),
        pytest.param({"q": jnp.zeros((1, 9, 2, 8))}, id="dtype"),
        pytest.param(
            {"q": jnp.zeros((1, 9, 2, 300), "bfloat16"), "k": jnp.zeros((1, 9, 1, 300), "bfloat16")}, id="width"
        ),
    ],
)
def test_unsupported_calls(change, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setenv("NPROC", "8")
    call = make_call("causal", 9)
    assert gpu.unsupported_reason(call) is None
    check_message(gpu.unsupported_reason(dataclasses.replace(call, **change)))


@pytest.mark.parametrize(("version", "threads"), [("0.12.0", "2"), ("0.11.2", "8")], ids=["threads", "version"])
def test_interpret_mode_is_unsupported_where_it_would_fail(monkeypatch, version, threads):
    monkeypatch.setenv("NPROC", threads)
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))
    check_message(gpu.unsupported_reason(make_call("causal", 9)))


def test_other_tiles_are_unsupported():
    with rejects(InputError, "tile"):
        gpu.run(make_call("causal", 9), (256, 256))
