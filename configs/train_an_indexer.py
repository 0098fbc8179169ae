"""An indexer for a dense model that recalls: a warm-up over all keys, then attention to the keys that it selects.

    sparsejax train --config=configs/train_an_indexer.py:dense --workdir=runs/dense
    sparsejax train --config=configs/train_an_indexer.py:indexed --config.init.source=run:runs/dense \
        --workdir=runs/indexed

The stages are those of DeepSeek-V3.2-Exp (section 2.1). `:dense` learns MQAR with eight pairs in 64 tokens in two
layers of full attention. `:indexed` starts from it: in the first 300 steps attention stays dense and only the indexers
train; then each query attends to four keys, and everything trains. `:converted` has the same steps without an indexer.
"""

import importlib.util
from pathlib import Path

from sparsejax.presets import recipe

WARMUP, STEPS = 300, 600
INDEXER = dict(heads=4, width=32, top_k=4, loss_weight=1.0)
ONLY_INDEXERS = [dict(match="*.indexer.*", rate=3.0), dict(match="*", freeze=True)]
PROBE = dict(length=64, pairs=8, vocab=96)


def load_mqar():
    """Returns the config of configs/mqar.py, of which this is a longer form."""
    path = Path(__file__).with_name("mqar.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config(argument="dense"):
    recipe.check_argument(argument, "dense", "indexed", "converted")
    config = load_mqar()
    config.data.update(length=PROBE["length"], probe=PROBE)
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1000
    if argument == "dense":
        return config
    config.train.steps = STEPS
    config.optimizer.update(learning_rate=1e-3, warmup=20)
    config.eval.update(every=100, final=16)
    if argument == "indexed":
        config.model.layers.full.mixer.indexer = INDEXER
        layers = dict(full=dict(mixer=dict(indexer=dict(dense=True))))
        warmup = dict(model=dict(layers=layers), optimizer=dict(groups=ONLY_INDEXERS))
        config.train.phases = dict(warmup=dict(start=0, set=warmup), sparse=dict(start=WARMUP))
    return config
