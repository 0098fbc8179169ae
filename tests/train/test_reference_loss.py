"""The losses of a tiny run after 50 steps, compared with recorded values.

Any change of initialization, batches, layers, optimizer or loss changes them. After an intended change, print the new
values with `python -m tests.train.test_reference_loss` on each supported Python and record them here.
"""

import tempfile
from pathlib import Path

import pytest

from sparsejax.workdir import Workdir, read_rows
from tests.train import runs

pytestmark = pytest.mark.quick

STEPS = 50
REFERENCE = {
    "train/loss": 0.68004894,
    "train/loss_mean": 2.0178275,
    "train/grad_norm": 0.63573056,
    "eval/loss": 0.70621315,
}
# jax 0.10.2 and 0.12, one device and four, and XLA's optimization levels 0 and 3 differ by at most 2e-7.
TOLERANCE = 1e-5


def measure(text: Path, workdir: Path) -> dict[str, float]:
    """The metrics of the last step."""
    every = dict.fromkeys(("train.log_every", "eval.every", "checkpoint.every"), STEPS)
    runs.train_here(runs.load(text, every | {"train.steps": STEPS}), workdir)
    (row,) = read_rows(Workdir(workdir).metrics)
    return {name: row[name] for name in REFERENCE}


def test_losses_are_the_recorded_ones(text, tmp_path):
    assert measure(text, tmp_path / "run") == pytest.approx(REFERENCE, rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(measure(runs.write_text(Path(folder) / "text"), Path(folder) / "run"))
