"""Errors as tests see them: the type, the argument that the message names, and one golden file of all messages.

`scripts/test.sh --refresh-messages` rewrites `tests/golden/messages.txt` from what the code says now. Read the
difference: it is the only place where the wording of an error is reviewed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
ROOT = Path(__file__).parents[1]
REFRESH = "SPARSEJAX_REFRESH_MESSAGES"

_counts: dict[str, int] = {}


@contextlib.contextmanager
def rejects(error: type[Exception] | tuple[type[Exception], ...], argument: str) -> Iterator[pytest.ExceptionInfo]:
    """Expects `error` with a message of one line that names `argument`, and compares it with the golden file."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert argument in message
    assert "\n" not in message, message
    check_message(message)


def check_message(message: str) -> None:
    """Compares a message of the running test with the golden file, or records it there."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    _counts[test] = _counts.get(test, -1) + 1
    key = f"{test} #{_counts[test]}" if _counts[test] else test
    message = _normalize(message)
    if os.environ.get(REFRESH):
        with filelock.FileLock(Path(tempfile.gettempdir()) / "sparsejax-messages.lock"):
            write_golden(read_golden() | {key: message})
    else:
        assert read_golden().get(key) == message, "run scripts/test.sh --refresh-messages and read the difference"


def read_golden() -> dict[str, str]:
    """Messages by test."""
    lines = GOLDEN.read_text().splitlines() if GOLDEN.exists() else []
    return {key: message.removeprefix("    ") for key, message in zip(lines[::2], lines[1::2], strict=True)}


def write_golden(messages: dict[str, str]) -> None:
    """Writes two lines per message, in the order of the tests."""
    GOLDEN.write_text("".join(f"{key}\n    {message}\n" for key, message in sorted(messages.items())))


def _normalize(message: str) -> str:
    """Paths, processes and digests of trained parameters, which differ between runs and machines, by name."""
    message = re.sub(r"(the digest of its parameters is) \w+, not \w+", r"\1 DIGEST, not DIGEST", message)
    message = re.sub(r"process \d+ on [^\s;]+", "process PID on HOST", message)
    temporary = re.escape(tempfile.gettempdir())
    message = re.sub(rf"{temporary}/pytest-of-[^/]+/pytest-\d+(/popen-gw\d+)?/[^/\s'\":]+", "TMP", message)
    return re.sub(rf"{temporary}/\w+", "TMP", message.replace(str(ROOT), "ROOT"))
