"""A TPU's compiler takes the kernels; scripts/compile_check.py has the whole matrix."""

import pytest

from scripts import compile_check


def test_forward_and_backward_compile_for_v5e():
    if not compile_check.find_place("tpu").is_dir():
        pytest.skip("there is no libtpu; `scripts/compile_check.py tpu --install` fetches it")
    (row,) = compile_check.run_part("compile", "v5e", "1")
    assert row["error"] is None
    assert row["case"] == "causal & window(1023): 8192, heads 8:2 of 128, bfloat16"
