"""The record of verified kernels. Its effect on "auto" is in test_attend.py."""

import jax
import numpy as np
import pytest

from sparsejax.ops import verification
from tests.messages import check_message

pytestmark = pytest.mark.quick

KIND = "TPU v5 lite"


def test_a_record_holds_for_one_device_kind_and_version_of_jax(monkeypatch):
    assert verification.verified_here(KIND) == frozenset()
    verification.write_record(KIND, ["tpu"])
    verification.write_record("TPU v6 lite", [])
    assert verification.verified_here(KIND) == {"tpu"}
    assert verification.verified_here("TPU v6 lite") == frozenset()
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert verification.verified_here(KIND) == frozenset()


def test_a_new_version_of_sparsejax_needs_a_new_record(monkeypatch):
    verification.write_record(KIND, ["tpu"])
    monkeypatch.setattr(verification.importlib.metadata, "version", lambda name: "99.0")
    assert verification.verified_here(KIND) == frozenset()


def test_a_damaged_record_is_reported_and_replaced(caplog):
    path = verification.write_record(KIND, ["tpu"])
    path.write_text("{")
    verification._read_records.cache_clear()
    assert verification.verified_here(KIND) == frozenset()
    (record,) = caplog.records
    check_message(record.getMessage().partition(" (")[0])
    verification.write_record(KIND, ["tpu"])
    assert verification.verified_here(KIND) == {"tpu"}


def test_the_folder_of_the_record(monkeypatch, tmp_path):
    monkeypatch.setenv(verification.CACHE_VARIABLE, str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert verification.record_path() == tmp_path / "a" / "verified.json"
    monkeypatch.delenv(verification.CACHE_VARIABLE)
    assert verification.record_path() == tmp_path / "b" / "sparsejax" / "verified.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verification.record_path() == tmp_path / "c" / ".cache" / "sparsejax" / "verified.json"


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([[True, False, True]], {"cudnn", "tpu"}),
        ([[True, True, True], [True, False, True]], {"cudnn", "tpu"}),
        ([[True, False, False], [False, False, True]], set()),
    ],
)
def test_all_processes_must_agree(processes, expected):
    assert verification.intersect(["cudnn", "gpu", "tpu"], np.array(processes)) == expected


def test_several_processes_use_no_record_before_they_agree(monkeypatch):
    verification.write_record(jax.devices()[0].device_kind, ["gpu", "tpu"])
    here = lambda: verification.verified_here(jax.devices()[0].device_kind)  # noqa: E731
    monkeypatch.setattr(verification, "_agreed", frozenset())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert here() == frozenset()
    other = np.array([True, True, False])  # cudnn, gpu, tpu

    def gather(flags):
        assert flags.tolist() == [False, True, True]
        return np.stack([flags, other])

    monkeypatch.setattr(verification.multihost_utils, "process_allgather", gather)
    verification.agree()
    assert here() == {"gpu"}
