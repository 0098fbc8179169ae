"""The doctor, with small cases, and with fake kernels that run on CPU."""

import dataclasses
import io

import jax
import pytest
from rich.console import Console

from sparsejax import doctor
from sparsejax.cli import main
from sparsejax.cli.exit_codes import VERIFICATION_FAILED
from sparsejax.ops import IMPLEMENTATIONS, Implementation, gather, verification

CASES = tuple(
    dataclasses.replace(case, length=37, width=8)
    for case in doctor.CASES
    if case.pattern in ("causal", "window(40, 40) | globals(2)")
)


@pytest.fixture(autouse=True)
def _small_cases_and_an_empty_user_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CASES", CASES)
    monkeypatch.setenv(verification.CACHE_VARIABLE, str(tmp_path / "user-cache"))


def supports_bfloat16(call):
    return None if call.q.dtype == "bfloat16" else "bfloat16 only"


def wrong(call):
    out, lse = gather.run(call)
    return out * 1.1, lse


def broken(call):
    raise RuntimeError("no such instruction\nat line 7")


def without_lse(call):
    return gather.run(call)[0], None


def fake(name, run=gather.run, unsupported_reason=lambda call: None):
    return Implementation(name, run, unsupported_reason, frozenset())


def run(*implementations) -> str:
    output = io.StringIO()
    try:
        doctor.run_doctor(Console(file=output, width=200), implementations)
    except doctor.VerificationError as error:
        return f"{output.getvalue()}{error}"
    return output.getvalue()


def verified() -> frozenset[str]:
    return verification.verified_here(jax.devices()[0].device_kind)


def test_the_command_checks_plain_jax_on_cpu(capsys):
    assert main(["doctor"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    results = {row[1].strip(): row[4].strip() for row in rows if row[1].strip()}
    assert set(results) == {impl.name for impl in IMPLEMENTATIONS}
    assert [name for name, result in results.items() if result == "passed"] == ["dense", "gather", "segment"]
    assert all(results[name].startswith("does not run here: ") for name in ("tpu", "gpu", "cudnn"))
    assert not verification.record_path().exists()


def test_a_failure_has_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor.run_doctor, "__defaults__", ((fake("tpu", wrong),),))
    assert main(["doctor"]) == VERIFICATION_FAILED
    assert "tpu" in capsys.readouterr().err


def test_kernels_that_pass_are_recorded():
    text = run(fake("tpu"), fake("cudnn", without_lse, lambda call: "no lse" if call.return_lse else None))
    assert "verified: tpu, cudnn" in text
    assert verified() == {"tpu", "cudnn"}


def test_a_case_that_a_kernel_does_not_support_is_no_failure():
    text = run(
        fake("gpu", unsupported_reason=supports_bfloat16), fake("tpu", unsupported_reason=lambda call: "too old")
    )
    assert verified() == {"gpu"}
    assert "does not run here: too old" in text


@pytest.mark.parametrize(
    ("kernel", "problem"), [(wrong, "error of out"), (broken, "RuntimeError: no such instruction")]
)
def test_a_kernel_that_fails_is_not_recorded(kernel, problem):
    run(fake("tpu"), fake("gpu"))
    text = run(fake("tpu", kernel), fake("gpu"))
    assert f"tpu: {CASES[0].title}: {problem}" in text
    assert "line 7" not in text
    assert verified() == {"gpu"}
