"""Verbs import no package that they do not need, and start fast."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

JAX = {"jax", "flax", "optax"}
TRAINING = {"grain", "orbax", "tensorflow", "tensorflow_datasets", "tensorboardX"}
REPORTS = {"matplotlib", "optuna", "pandas", "scipy", "submitit"}

PROGRAM = """
import resource, sys
from sparsejax.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:  # --help
    code = end.code
spent = resource.getrusage(resource.RUSAGE_SELF)
print(code, spent.ru_utime + spent.ru_stime, *{name.partition(".")[0] for name in sys.modules})
"""


def run(*arguments):
    """Exit code, CPU seconds and imported top-level modules of a command line."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    code, seconds, *modules = done.stdout.splitlines()[-1].split()
    return int(code), float(seconds), set(modules)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["--help"], 0.5),
        (["draw", "--help"], 1),
        (["draw", "causal & window(7)", "--length=32"], 1),
        (["draw", "causal & window(7)", "--length=32", "--receptive-field"], 1),
    ],
    ids=["help", "draw-help", "draw", "draw-receptive-field"],
)
def test_drawing_needs_no_jax(arguments, limit):
    code, seconds, modules = run(*arguments)
    assert code == 0
    assert not modules & (JAX | TRAINING | REPORTS)
    assert seconds < limit


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", f"--hf={GOLDEN / 'jamba'}", "--length=100"],
        ["show", "--config=preset:quickstart"],
        ["show", f"--config=hf:{GOLDEN / 'jamba'}", "--length=100"],
        ["draw", "--config=preset:quickstart", "--length=32"],
    ],
    ids=["show-hf", "show", "show-config-hf", "draw"],
)
def test_describing_a_model_needs_no_training_package(arguments):
    code, _, modules = run(*arguments)
    assert code == 0
    assert not modules & (TRAINING | REPORTS)


def test_a_missing_extra_is_named():
    hide = "import sys; sys.modules['safetensors'] = None; from sparsejax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hide, "show", f"--hf={GOLDEN / 'jamba'}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert "sparsejax[interop]" in done.stderr
    assert done.stderr.count("\n") == 1
