"""A small dense language model that retrieves, to be converted to windows and a few full layers.

    sparsejax train --config=configs/dense_to_windows.py --workdir=runs/dense

A short convolution and six layers of full attention of width 96, on 1,024 subwords. Two of seven rows are text, the
others are text with needles and questions about them, which `experiments/dense_to_windows/needles.py` writes. `local`
is a window that no schedule uses yet.
"""

from sparsejax.presets import recipe

WIDTH, HEADS, LENGTH, WINDOW = 96, 4, 256, 31


def get_config():
    norm, rope = recipe.rms(1e-6), dict(base=10_000.0)

    def layer(pattern):
        mixer = recipe.attention(pattern, HEADS, HEADS, WIDTH // HEADS, rope=rope, qk_norm=norm)
        return recipe.layer(mixer, recipe.gated(2 * WIDTH), norm)

    conv = recipe.layer(dict(kind="conv", conv=4), recipe.gated(2 * WIDTH), norm)
    layers = dict(conv=conv, full=layer("causal"), local=layer(f"causal & window({WINDOW})"))
    model = recipe.model(1024, WIDTH, "conv 6x(full)", layers, norm, tied=True)
    config = recipe.make_run(model, LENGTH, steps=1500, batch=16, learning_rate=2e-3, warmup=100)
    config = recipe.fit_cpu(config, evaluations=3)
    config.optimizer.beta2 = 0.98
    config.data.update(packing="packed", tokenizer="bpe:1024")
    config.data.sources = dict(
        text=dict(files="corpora/sympy/train.jsonl", validation="corpora/sympy/validation.jsonl", weight=2.0),
        needles=dict(files="corpora/needles/train.jsonl", validation="corpora/needles/validation.jsonl", weight=5.0),
    )
    return config
