"""Duplication: say a random word again, the sequence 0w0w of Reformer (arXiv:2001.04451), in minutes on a CPU.

    sparsejax train --config=configs/duplication.py --workdir=runs/duplication
    sparsejax train --config=configs/duplication.py --workdir=runs/short \
        --config.model.layers.local.mixer.pattern='causal & window(126)' --config.model.schedule=local

Words of 127 of 127 symbols, so that every answer stands 127 tokens back; one layer of attention without an MLP.
"""

from quickstart import get_config as get_quickstart


def get_config():
    config = get_quickstart()
    config.data = dict(task="duplication", files="", length=256, probe=dict(length=256, vocab=128))
    config.model.vocab = 128
    config.model.width = 64
    config.model.schedule = "full"
    config.model.tied = False
    config.model.scan = False
    for layer in config.model.layers.values():
        layer.mlp = None
    for name in ("full", "local"):
        config.model.layers[name].mixer.heads = config.model.layers[name].mixer.kv_heads = 2
    config.model.layers.local.mixer.pattern = "causal & window(127)"
    config.train.steps = 600
    config.train.batch = 16
    config.train.log_every = 100
    config.optimizer.learning_rate = 3e-3
    config.checkpoint = dict(every=600, keep_last=1, keep_best=0)
    config.eval = dict(every=300, batch=32, batches=4, sample=0)
    return config
