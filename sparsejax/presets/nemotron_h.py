"""Nemotron-H 8B: 24 layers of Mamba-2, 24 MLP layers and four layers of full attention without positions.

    sparsejax show --config=preset:nemotron_h --length=262144
    sparsejax train --config=preset:nemotron_h:tiny --workdir=runs/nemotron_h

Attention is dense, in layers 7, 18, 29 and 40 of 52. Sizes: arXiv:2504.03624, table 1, and the released config.json.
Published: 8.1B parameters. The full size is for cost accounting and for loading released weights.

`:tiny` reduces the loss from 5.92 to 2.52 nats in 30 steps and 74 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-5)
    ssm = recipe.mamba2(128, 64, 128, groups=8, norm_eps=1e-5, norm_groups=8)
    full = recipe.model(
        vocab=131_072,
        width=4096,
        schedule="3x(ssm mlp) ssm full mlp 3x(4x(ssm mlp) ssm full mlp) 5x(ssm mlp)",
        layers=dict(
            ssm=recipe.layer(ssm, None, norm),
            mlp=recipe.layer(None, recipe.plain(21_504, "relu2"), norm),
            full=recipe.layer(recipe.attention("causal", 32, 8, 128), None, norm),
        ),
        norm=norm,
    )
    return recipe.choose(argument, full, 8192, schedule="3x(ssm mlp) ssm full mlp")
