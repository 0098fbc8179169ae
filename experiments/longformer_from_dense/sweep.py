"""Conversions of dense encoders, with the positions copied or drawn at random, before and after updates."""

from sparsejax.sweep import seeds

DENSE = "run:runs/longformer_from_dense/dense-{}"  # by seed
POSITIONS = {"copied": "", "random": "embedding.positions"}  # parameters drawn at random
STAGES = {
    "before": {"train.steps": 1, "optimizer.learning_rate": 0.0, "optimizer.warmup": 0},  # no parameter changes
    "after": {},
}


def sweep():
    return [
        seed
        | {"label": f"{positions}, {stage}", "init.source": DENSE.format(seed["train.seed"]), "init.fresh": fresh}
        | changes
        for seed in seeds(3)
        for positions, fresh in POSITIONS.items()
        for stage, changes in STAGES.items()
    ]
