"""What `sparsejax.patterns` and `sparsejax.draw` import."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick

LOADED = """
import sys, numpy
before = set(sys.modules)
import {}
print(*sorted(set(sys.modules) - before))
"""


def packages(module):
    """The top-level packages outside the standard library and the modules of sparsejax that an import loads."""
    command = [sys.executable, "-c", LOADED.format(module)]
    names = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    ours = {name for name in names if name.startswith("sparsejax.")}
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "numpy", "sparsejax"}, ours


def test_patterns_load_numpy_and_the_standard_library_only():
    others, ours = packages("sparsejax.patterns.testing")
    assert others == set()
    light = {f"sparsejax.{name}" for name in ("errors", "palette", "registry", "svg")}
    assert {name for name in ours if not name.startswith("sparsejax.patterns")} == light


@pytest.mark.parametrize("module", ["sparsejax.draw", "sparsejax.figures", "sparsejax.schedule"])
def test_pictures_and_schedules_are_light(module):
    others, _ = packages(module)
    assert not others & {
        "jax",
        "flax",
        "grain",
        "orbax",
        "optax",
        "ml_collections",
        "tensorflow_datasets",
        "matplotlib",
    }
