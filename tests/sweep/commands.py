"""Runs that train nothing, to be quick, and a wait that ends."""

import dataclasses
import time
from pathlib import Path

from sparsejax.sweep import plan_runs

RECIPE = Path(__file__).parents[1] / "train" / "recipe.py"


LIMIT = 120.0  # seconds that anything may take


def wait_for(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@dataclasses.dataclass(frozen=True)
class Command:
    """Stands for a run: any shell command; it is done if it leaves `result.json`."""

    name: str
    script: str

    label, seed = property(lambda self: self.name), 0

    def workdir(self, folder):
        return folder / "runs" / self.name

    def command(self, folder):
        return [
            "sh",
            "-c",
            self.script.replace("DONE", f"mkdir -p {self.workdir(folder)}; touch {self.result(folder)}"),
        ]

    def result(self, folder):
        return self.workdir(folder) / "result.json"

    def finished(self, folder):
        return self.result(folder).exists()

    @property
    def checked(self):
        return plan_runs(str(RECIPE), [{}])[0].checked
