"""Placements of two full layers among windows, before and after a short continuation, from each dense model.

The rows of a search exist once it has written its result.
"""

from pathlib import Path

from sparsejax import config as configs
from sparsejax.sweep import seeds

RUNS = Path("runs/dense_to_windows")
FIXED = {"dense": "conv 6x(full)", "windows": "conv 6x(local)", "interleaved": "conv 2x(2x(local) full)"}
SEARCHED = {"searched": "layers", "heads": "heads"}  # folder of the search by label
STAGES = {
    "before": {"train.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.warmup": 0},  # no parameter changes
    "after": {"train.steps": 100, "optimizer.learning_rate": 5e-4, "optimizer.warmup": 10},
}


def best(label, seed):
    """The config that a search has written."""
    return RUNS / f"{SEARCHED[label]}-{seed}" / "best.py"


def find(label, seed):
    """The overrides of a placement: its schedule, and the patterns of its layers if a search found it."""
    if label in FIXED:
        return {"model.schedule": FIXED[label]}
    model = configs.load(str(best(label, seed))).model
    overrides = {"model.schedule": model.schedule}
    for name, layer in model.layers.items():
        overrides |= {f"model.layers.{name}": "full"} if name not in ("full", "local", "conv") else {}
        overrides |= {f"model.layers.{name}.mixer.pattern": layer.mixer.pattern} if name != "conv" else {}
    return overrides


def list_placements(seed):
    """The overrides of each placement by label; a search that ends with the placement of another adds none."""
    placements = {label: find(label, seed) for label in FIXED}
    for label in SEARCHED:
        if best(label, seed).exists() and (placement := find(label, seed)) not in placements.values():
            placements[label] = placement
    return placements


def sweep():
    return [
        seed
        | {"label": f"{label}, {stage}", "init.source": f"run:{RUNS}/dense-{seed['train.seed']}"}
        | placed
        | changes
        for seed in seeds(3)
        for label, placed in list_placements(seed["train.seed"]).items()
        for stage, changes in STAGES.items()
    ]
