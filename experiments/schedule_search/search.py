"""Searches of schedules: recall against cache bytes, and the placement of full layers among windows."""

from sparsejax.sweep import suggest_period, suggest_placement


def space(trial):
    """Two layers of any kind for `configs/mqar.py`: nine schedules."""
    return {"model.schedule": suggest_period(trial, ("ssm", "local", "full"), layers=2, period=2)}


def placement(trial):
    """Eight layers for `preset:quickstart`, windows and some full ones, and the width of the windows."""
    window = trial.suggest_categorical("window", [15, 31, 63])
    return {
        "model.schedule": suggest_placement(trial, "local", "full", layers=8, counts=(0, 1, 2, 4)),
        "model.layers.local.mixer.pattern": f"causal & (window({window}) | sink(4))",
    }
