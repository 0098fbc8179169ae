"""Dense encoders, and their conversions with the positions copied or drawn at random, before and after updates."""

from sparsejax.sweep import seeds

DENSE = "runs/longformer_from_dense/dense/runs/seed={}"
POSITIONS = {"copied": "", "random": "embedding.positions"}
BEFORE = {"train.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.warmup": 0}


def dense():
    return seeds(3)


def long():
    """The conversions, each without an update and with all of them."""
    rows = []
    for seed in seeds(3):
        source = {"init.source": f"run:{DENSE.format(seed['train.seed'])}"}
        for positions, fresh in POSITIONS.items():
            for stage, changes in (("before", BEFORE), ("after", {})):
                rows.append(seed | source | {"label": f"{positions}, {stage}", "init.fresh": fresh} | changes)
    return rows
