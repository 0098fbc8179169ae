"""Attention to the gated delta rule by alignment and distillation (arXiv:2408.10189, arXiv:2408.15237).

    sparsejax train --config=configs/attention_to_delta.py:dense --workdir=runs/dense
    sparsejax train --config=configs/attention_to_delta.py:delta --workdir=runs/scratch

`:dense` is a language model of bytes with four layers of attention of width 96; `:delta` has the gated delta rule in
their place. `experiments/attention_to_delta` converts one to the other. `data.files` selects the text.
"""

from sparsejax.presets import recipe

WIDTH, HEADS, LENGTH, BATCH = 96, 4, 256, 8
STEPS = dict(dense=2000, delta=600)


def get_config(argument="dense"):
    recipe.check_argument(argument, "dense", "delta")
    norm, width = recipe.rms(1e-6), WIDTH // HEADS
    if argument == "dense":
        mixer = recipe.attention("causal", HEADS, HEADS, width, rope=dict(base=10_000.0))
    else:
        sizes = dict(heads=HEADS, key_heads=HEADS, key_width=width, value_width=width)
        mixer = dict(kind="delta", conv=4, norm_eps=1e-6, chunk=32) | sizes
    layers = dict(layer=recipe.layer(mixer, recipe.gated(2 * WIDTH), norm))
    model = recipe.model(256, WIDTH, "4x(layer)", layers, norm, tied=True)
    config = recipe.make_run(model, LENGTH, STEPS[argument], batch=BATCH, learning_rate=2e-3, warmup=50)
    return recipe.fit_cpu(config, evaluations=4)
