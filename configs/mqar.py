"""MQAR: multi-query associative recall (Zoology, arXiv:2312.04927) at a size that takes minutes on a CPU.

    sparsejax train --config=configs/mqar.py --workdir=runs/mqar
    sparsejax train --config=configs/mqar.py --workdir=runs/mqar_window --config.model.schedule='2x(local)'

Sequences have 32 tokens with four key-value pairs; the vocabulary has 64 tokens. Two layers without MLPs suffice: the
first joins each key with its value, the second retrieves the pair of a query.
"""

from sparsejax.presets.quickstart import get_config as get_quickstart


def get_config():
    config = get_quickstart()
    config.data = dict(task="mqar", files="", length=32, probe=dict(length=32, pairs=4, vocab=64))
    config.model.width = 64
    config.model.schedule = "2x(full)"
    config.model.tied = False
    config.model.scan = False
    for layer in config.model.layers.values():
        layer.mlp = None
    for name in ("full", "local"):
        config.model.layers[name].mixer.heads = config.model.layers[name].mixer.kv_heads = 2
    config.model.layers.local.mixer.pattern = "causal & window(7)"
    config.model.layers.ssm.mixer.update(inner=64, state=16, dt_rank=4)
    config.train.steps = 2000
    config.train.batch = 64
    config.train.log_every = 100
    config.optimizer.learning_rate = 3e-3
    config.checkpoint = dict(every=500, keep_last=1, keep_best=0)
    config.eval = dict(every=500, batch=64, batches=4, sample=0)
    return config
