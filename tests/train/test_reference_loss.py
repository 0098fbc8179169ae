"""The losses of a tiny run after 50 steps, compared with recorded values.

Any change of initialization, batches, layers, optimizer or loss changes them. After an intended change, print the new
values with `python -m tests.train.test_reference_loss` on each supported Python and record them here.
"""

import tempfile
from pathlib import Path

import pytest

from sparsejax.workdir import Workdir, read_rows
from tests.train import runs

STEPS = 50
REFERENCE = {"train/loss": 0.0, "train/loss_mean": 0.0, "train/grad_norm": 0.0, "eval/loss": 0.0}
TOLERANCE = 1e-3


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
