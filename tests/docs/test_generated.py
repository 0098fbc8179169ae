"""The generated pages are those that the code writes, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_generated_files_are_current():
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "run python docs/generate.py"


@pytest.mark.quick
def test_every_key_and_option_has_a_meaning():
    for page in ("config", "cli", "patterns", "workdir"):
        lines = (ROOT / "docs" / "reference" / f"{page}.md").read_text().splitlines()
        assert [line for line in lines if line.startswith("| ") and line.endswith("|  |")] == []
