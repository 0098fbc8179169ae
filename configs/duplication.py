"""Duplication: repeat a random word, the sequence 0w0w of Reformer (arXiv:2001.04451), in minutes on a CPU.

    sparsejax train --config=configs/duplication.py --workdir=runs/duplication
    sparsejax train --config=configs/duplication.py --workdir=runs/short \
        --config.model.layers.local.mixer.pattern='causal & window(126)' --config.model.schedule=local

A word has 127 tokens, so every answer is 127 tokens back. The model is one attention layer without an MLP.
"""

from mqar import get_config as get_mqar


def get_config():
    config = get_mqar()
    config.data = dict(task="duplication", files="", length=256, probe=dict(length=256, vocab=128))
    config.model.vocab = 128
    config.model.schedule = "full"
    config.model.layers.local.mixer.pattern = "causal & window(127)"
    config.train.steps = 600
    config.train.batch = 16
    config.checkpoint.every = 600
    config.eval.update(every=300, batch=32)
    return config
