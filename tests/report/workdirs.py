"""Workdirs and records of sweeps as the program writes them, without training."""

import json

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.sweep import plan_runs
from tests.train import runs

TOKENS = 4 * 32  # of a step of the recipe
VERSIONS = {"python": "3.11.7", "jax": "0.10.2", "git": "abc123", "devices": "1 x cpu", "platform": "Linux"}


def dump(path, value):
    path.write_text(json.dumps(value))


def write_workdir(workdir, settings, value=None, metric="eval/bits_per_byte", step=20, speed=4.0):
    """Writes a run that has reached `step`, and has ended if there is a `value`; returns its folder."""
    workdir.mkdir(parents=True)
    dump(workdir / "config.json", settings.to_dict())
    dump(workdir / "versions.json", [VERSIONS])
    dump(workdir / "certificate.json", [{"passed": True}])
    dump(workdir / "data.json", {"digest": "c0ffee", "train": {"tokens": 1000}})
    with (workdir / "metrics.jsonl").open("w") as log, (workdir / "timing.jsonl").open("w") as timing:
        for number in range(5, step + 1, 5):
            row = {"step": number, "train/loss": 5.0 - 0.1 * number, "train/loss_mean": 5.0 - 0.05 * number}
            row |= {metric: (3.0 if value is None else value) + 0.1 * (step - number), "eval/loss": 1.5}
            log.write(json.dumps(row) + "\n")
            rates = {"steps_per_second": speed, "tokens_per_second": TOKENS * speed}
            timing.write(json.dumps({"step": number} | rates) + "\n")
    if value is not None:
        dump(workdir / "result.json", {"step": step, "parameters": 1, metric: value, "eval/loss": 1.5})
    return workdir


def settings_of(overrides=None):
    return configs.load(str(runs.RECIPE), overrides)


def write_sweep(folder, values, metric="eval/bits_per_byte"):
    """Writes a sweep with a run per key of `values`: label, schedule and seed.

    A value is the final metric; None stands for a stopped run, and "planned" for one that has not started.
    """
    sweep = [{"label": label, "model.schedule": schedule, "train.seed": seed} for label, schedule, seed in values]
    planned = plan_runs(str(runs.RECIPE), sweep)
    folder.mkdir(parents=True)
    recorded = {run.name: {"label": run.label, "seed": run.seed, "overrides": dict(run.overrides)} for run in planned}
    dump(folder / "sweep.json", {"config": "configs/recipe.py", "sweeps": ["sweep.py"], "runs": recorded})
    for run, value in zip(planned, values.values(), strict=True):
        if value != "planned":
            step = 10 if value is None else 20
            write_workdir(run.workdir(folder).path, ConfigDict(run.settings), value, metric, step)
    return folder
