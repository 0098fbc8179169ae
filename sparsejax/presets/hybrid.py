"""Hybrid: seven layers of Mamba, windows and full attention on 512 bytes of text.

    sparsejax train --config=preset:hybrid --workdir=runs/hybrid

The layers are those of the quickstart, with wider windows. Reaches 1.520 bits per byte on held-out source of SymPy
1.14.0 (order-5 n-gram 2.041, gzip -9 1.421) in 25 minutes on 2 CPU cores, and 1.651 on the text of CPython 3.11.7
(order-4 n-gram 2.253, gzip -9 1.965). The command with the corpus is in experiments/byte_lm.
"""

from sparsejax.presets.quickstart import get_config as get_quickstart


def get_config():
    config = get_quickstart()
    config.model.schedule = "3x(ssm local) full"
    config.model.layers.local.mixer.pattern = "causal & (window(127) | sink(4))"
    config.model.scan = False  # seven unrolled layers compile in seconds and run a fifth faster on CPU
    config.data.length = 512
    config.train.steps = 1750
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_rate = 0.02
    config.optimizer.warmup = 100
    config.checkpoint.every = 350
    config.eval.every = 350
    config.eval.batch = 16
    config.eval.sample = 400
    return config
