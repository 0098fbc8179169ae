"""The room of patterns stands alone."""

import subprocess
import sys

LOADED_BY_PATTERNS = """
import sys, numpy
before = set(sys.modules)
import sparsejax.patterns
print(*sorted(set(sys.modules) - before))
"""


def test_patterns_load_numpy_and_the_standard_library_only():
    command = [sys.executable, "-c", LOADED_BY_PATTERNS]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert {name.partition(".")[0] for name in loaded} <= {*sys.stdlib_module_names, "numpy", "sparsejax"}
    ours = {name for name in loaded if name.startswith("sparsejax.")}
    assert "sparsejax.patterns" in ours
    assert {name for name in ours if not name.startswith("sparsejax.patterns")} == set()
