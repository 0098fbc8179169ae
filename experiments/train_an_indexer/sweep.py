"""Keys of an indexer, random keys, the last keys and all keys, from each dense model."""

from sparsejax.sweep import seeds

DENSE = "run:runs/train_an_indexer/dense-{}"  # by seed
PATTERN, INDEXER = "model.layers.full.mixer.pattern", "model.layers.full.mixer.indexer"
ONLY_INDEXERS = [{"match": "*.indexer.*", "rate": 3.0}, {"match": "*", "freeze": True}]
ARMS = {
    "4 keys of an indexer": {
        INDEXER: {"heads": 4, "width": 32, "top_k": 4, "loss_weight": 1.0},
        "init.fresh": "*.indexer.*",
        "train.phases.warmup.start": 0,
        f"train.phases.warmup.set.{INDEXER}.dense": True,
        "train.phases.warmup.set.optimizer.groups": ONLY_INDEXERS,
        "train.phases.sparse.start": 300,
    },
    "all 64 keys": {},
    "4 random keys": {PATTERN: "causal & (window(0) | random(3, tile=1, seed=0))"},
    "last 4 keys": {PATTERN: "causal & window(3)"},
}


def sweep():
    return [
        seed | {"label": label, "init.source": DENSE.format(seed["train.seed"])} | changes
        for seed in seeds(3)
        for label, changes in ARMS.items()
    ]
