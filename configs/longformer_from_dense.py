"""A Longformer from a dense encoder (arXiv:2004.05150, section 5), with the positions copied or drawn at random.

    sparsejax train --config=configs/longformer_from_dense.py:dense --workdir=runs/dense
    sparsejax train --config=configs/longformer_from_dense.py:long --config.init.source=run:runs/dense \
        --workdir=runs/long

`:dense` is a masked language model of four layers of width 128 with full attention and 64 learned positions, on bytes.
`:long` has windows of 64 tokens and 512 positions. `data.files` selects the text.
"""

from sparsejax.presets import recipe

SHORT, LONG, WINDOW = 64, 512, 64
STEPS = {"dense": 2000, "long": 150}


def build(pattern, positions):
    norm = dict(kind="layer", eps=1e-5)
    mixer = recipe.attention(pattern, 4, 4, 32, None, bias=True, out_bias=True)
    layer = recipe.layer(mixer, recipe.plain(512, "gelu", bias=True), norm)
    return recipe.model(
        recipe.BYTES_AND_MASK,
        128,
        "4x(layer)",
        dict(layer=layer),
        norm,
        tied=True,
        causal=False,
        embedding=dict(positions=positions, norm=norm),
        head=dict(activation="gelu", norm=norm, bias=True),
    )


def get_config(argument="dense"):
    recipe.check_argument(argument, "dense", "long")
    if argument == "dense":
        model = build("full", SHORT)
        config = recipe.make_run(model, SHORT, STEPS["dense"], batch=32, learning_rate=2e-3, warmup=100)
        return recipe.fit_cpu(config, evaluations=4)
    model = build(f"window({WINDOW // 2}, {WINDOW // 2})", LONG)
    config = recipe.make_run(model, LONG, STEPS["long"], batch=8, learning_rate=3e-4, warmup=10)
    config = recipe.fit_cpu(config, evaluations=3)
    config.eval.update(batch=8, batches=16, final=48)
    return config
