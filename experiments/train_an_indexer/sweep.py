"""Keys of an indexer, random keys, the last keys and all keys, from each dense model."""

from sparsejax.sweep import seeds

DENSE = "run:runs/train_an_indexer/dense-{}"  # by seed
PATTERN = "model.layers.full.mixer.pattern"
OTHERS = {
    "all 64 keys": {},
    "4 random keys": {PATTERN: "causal & (window(0) | random(3, tile=1, seed=0))"},
    "last 4 keys": {PATTERN: "causal & window(3)"},
}
PLAIN = {"model.layers.full.mixer.indexer": None, "train.phases": {}}


def sweep():
    arms = {"4 keys of an indexer": {}} | {label: PLAIN | changes for label, changes in OTHERS.items()}
    return [
        seed | {"label": label, "init.source": DENSE.format(seed["train.seed"])} | changes
        for seed in seeds(3)
        for label, changes in arms.items()
    ]
