"""The kernels compile for TPUs and Hopper GPUs; `python -m benchmarks compile` has the whole matrix."""

import jax
import pytest

from benchmarks import compile as compile_check


def skip_unless_installed(target: str):
    if not compile_check.compiler_folder(target).is_dir():
        pytest.skip(f"no compiler; `python -m benchmarks compile {target} --install` installs it")


def test_forward_and_backward_compile_for_v5e():
    skip_unless_installed("tpu")
    (row,) = compile_check.run_part("compile", "v5e", "1")
    assert row["error"] is None
    assert row["case"] == "causal & window(1023), 8,192 x 8:2 heads of 128"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")
def test_forward_and_backward_compile_for_hopper():
    skip_unless_installed("gpu")
    rows = compile_check.run_part("hopper", "0", target="gpu")
    assert [row["kernel"] for row in rows] == ["attend_dkv", "attend_dq", "attend_forward"]
    for row, tensor_cycles in zip(rows, (1024, 768, 1024), strict=True):
        assert row["error"] is None
        assert (row["spilled"], row["serialized"]) == (0, 0)
        full, partial = row["steps"]
        assert full["tensor_cycles"] == partial["tensor_cycles"] == tensor_cycles
        assert full["instructions"] < full["cycles"] < partial["cycles"]


CODE = """
   -:-:-:Y:01        /*0000*/                   MOV R1, c[0x0][0x28]
.L_x_9:
   -:-:-:Y:02        /*0010*/                   IADD3 R2, R2, 0x1, RZ
.L_x_1:
   -:-:-:Y:04        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
.L_x_7:
   -:-:-:-:12        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
   1:-:-:Y:05        /*0040*/              @!P1 BRA `(.L_x_8)
   -:-:-:Y:05        /*0050*/               @P3 BRA `(.L_x_1)
.L_x_2:
   -:-:-:-:12        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
   -:-:-:Y:01        /*0070*/               @P3 BRA `(.L_x_2)
   -:-:-:Y:01        /*0080*/               @P2 BRA `(.L_x_9)
.L_x_8:
   -:-:-:Y:09        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R15
   -:-:-:Y:05        /*00a0*/                   BRA `(.L_x_7)
"""


def test_steps_are_the_innermost_loops_with_products():
    full, partial = compile_check.read_steps(CODE)
    assert full == {"instructions": 4, "cycles": 26, "tensor_cycles": 2 * 2 * 64 * 128 * 16 // 4096}
    assert partial == {"instructions": 2, "cycles": 13, "tensor_cycles": 2 * 64 * 64 * 16 // 4096}
