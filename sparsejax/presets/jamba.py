"""Jamba v0.1: dense attention in one of eight layers, Mamba in the others, experts in every second, no positions.

    sparsejax show --config=preset:jamba --length=262144
    sparsejax train --config=preset:jamba:tiny --workdir=runs/jamba

Layer i has attention if i % 8 == 4, and experts if i % 2 == 1. Jamba uses no sparse attention; its cache is small
because only four of 32 layers have one. Sizes: arXiv:2403.19887 and the released config.json. Published: 52B
parameters, 12B active, 4 GB of cache at 256K tokens in 16 bits (table 1 of the paper). The full size is for cost
accounting and for loading released weights.

`:tiny` reduces the loss from 6.04 to 2.32 nats in 30 steps and 75 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe

PERIOD = "ssm ssm_experts ssm ssm_experts full ssm_experts ssm ssm_experts"


def build(width, inner, periods, heads):
    """The model section, also of Jamba 1.5."""
    norm = recipe.rms(1e-6)
    ssm = recipe.mamba(width, norm_eps=1e-6)
    dense, experts = recipe.gated(inner), recipe.experts(16, 2, inner, balance_weight=1e-3)
    return recipe.model(
        vocab=65_536,
        width=width,
        schedule=f"{periods}x({PERIOD})",
        layers=dict(
            ssm=recipe.layer(ssm, dense, norm),
            ssm_experts=recipe.layer(ssm, experts, norm),
            full=recipe.layer(recipe.attention("causal", heads, 8, 128), dense, norm),
        ),
        norm=norm,
    )


def get_config(argument=""):
    return recipe.choose(argument, build(width=4096, inner=14_336, periods=4, heads=32), 4096, schedule=PERIOD)
