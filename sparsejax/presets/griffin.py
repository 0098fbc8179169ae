"""Griffin, as released in RecurrentGemma 2B: two gated linear recurrences per layer with windows of 2,048 keys.

    sparsejax show --config=preset:griffin --length=262144
    sparsejax train --config=preset:griffin:tiny --workdir=runs/griffin

All ten query heads share one key/value head; rotary positions apply to half of the head width. Sizes: arXiv:2402.19427,
arXiv:2404.07839 and the released config.json. Published: 2.7B parameters, of which the embedding has 0.7B
(2,682,862,080 in the checkpoint). The full size is for cost accounting.

`:tiny` reduces the loss from 5.42 to 2.79 nats in 30 steps and 31 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-6, offset=True)
    mlp = recipe.gated(7680, "gelu_tanh", bias=True)
    recurrent = dict(kind="rglru", inner=2560, heads=10, conv=4)
    rope = dict(base=10_000.0, fraction=0.5)
    local = recipe.attention("causal & window(2047)", 10, 1, 256, rope=rope, out_bias=True)
    full = recipe.model(
        vocab=256_000,
        width=2560,
        schedule="8x(2x(recurrent) local) 2x(recurrent)",
        layers=dict(recurrent=recipe.layer(recurrent, mlp, norm), local=recipe.layer(local, mlp, norm)),
        norm=norm,
        tied=True,
        embedding=dict(scale=2560**0.5),
        head=dict(softcap=30.0),
    )
    return recipe.choose(
        argument,
        full,
        8192,
        schedule="2x(recurrent) local",
        patterns=dict(local="causal & window(31)"),
        embedding=dict(scale=64**0.5),
    )
