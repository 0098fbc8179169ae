"""What Orbax and TensorStore raise about a save, in any thread, is one line; `tests/stress` fails the system calls."""

import errno
import os
import sys
from types import SimpleNamespace

import pytest

from sparsejax.cli import _report_unraisable
from sparsejax.runs import CheckpointError
from sparsejax.runs.checkpoint import _report_failure
from tests.messages import rejects

STORE = "UNKNOWN: Error writing local file \"/w/4/manifest.ocdbt\": Failed to open [os_error_code='{}']\ndetails"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(STORE.format(errno.EIO)), os.strerror(errno.EIO)),
        (ValueError(STORE.format(errno.ENOSPC)), "no space left"),
        (OSError(errno.EDQUOT, "quota"), "no space left"),
        (OSError(errno.EMFILE, "files"), os.strerror(errno.EMFILE)),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
    ],
)
def test_an_error_of_a_save_is_one_line(error, reason, tmp_path):
    with rejects(CheckpointError, reason), _report_failure(tmp_path):
        raise error


def test_only_coroutines_of_orbax_are_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    for path in ("/lib/orbax/checkpoint/serialization.py", "/lib/other.py"):
        coroutine = SimpleNamespace(cr_code=SimpleNamespace(co_filename=path))
        _report_unraisable(SimpleNamespace(object=coroutine, exc_value=ImportError("sys.meta_path is None")))
    _report_unraisable(SimpleNamespace(object=None, exc_value=ValueError("x")))
    assert len(shown) == 2
