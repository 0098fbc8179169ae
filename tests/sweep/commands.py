"""Runs that train nothing, to be quick, and a wait that ends."""

import dataclasses
import functools
import time
from pathlib import Path

from sparsejax.sweep import plan_runs
from sparsejax.workdir import Workdir

RECIPE = Path(__file__).parents[1] / "train" / "recipe.py"
LIMIT = 120.0  # seconds that anything may take


def wait_for(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@functools.cache
def checked():
    return plan_runs(str(RECIPE), [{}])[0].checked


@dataclasses.dataclass(frozen=True)
class Command:
    """Stands for a run: any shell command. It is done if it leaves a result, as DONE does."""

    name: str
    script: str

    label, seed = property(lambda self: self.name), 0
    checked = property(lambda self: checked())

    def workdir(self, folder):
        return Workdir(folder / "runs" / self.name)

    def command(self, folder):
        workdir = self.workdir(folder)
        return ["sh", "-c", self.script.replace("DONE", f"mkdir -p {workdir.path}; touch {workdir.result}")]
