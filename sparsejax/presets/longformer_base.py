"""Longformer base: an encoder with windows of 256 keys on either side and global tokens that the batch selects.

    sparsejax show --config=preset:longformer_base --length=4096
    sparsejax train --config=preset:longformer_base:tiny --workdir=runs/longformer_base

Each batch selects its global tokens (`layers.Extras.globals`), which have separate projections; the released weights
include them, and this preset counts them. Sizes: arXiv:2004.05150 and the released config.json (longformer-base-4096).
Published: 149M parameters (arXiv:2110.00976, table 3). It is a masked language model. The full size is for cost
accounting and for loading released weights. In the tiny form the pattern makes the first token global.

`:tiny` reduces the loss from 6.51 to 3.34 nats in 30 steps and 22 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = dict(kind="layer", eps=1e-5)
    biased = dict(bias=True, out_bias=True)
    mixer = recipe.attention("longformer(256)", 12, 12, 64, global_projections=argument != "tiny", **biased)
    full = recipe.model(
        vocab=50_265,
        width=768,
        schedule="12x(local)",
        layers=dict(local=recipe.layer(mixer, recipe.plain(3072, "gelu", bias=True), norm, "post")),
        norm=None,
        tied=True,
        causal=False,
        embedding=dict(types=1, positions=4098, padding=1, norm=norm),
        head=dict(activation="gelu", norm=norm, bias=True),
    )
    return recipe.choose(
        argument,
        full,
        4096,
        schedule="2x(local)",
        patterns=dict(local="longformer(15, ids=1)"),
        vocab=recipe.BYTES_AND_MASK,
        embedding=dict(positions=128, norm=norm),
    )
