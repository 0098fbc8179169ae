"""Kimi Linear 48B-A3B: the delta rule with a decay per channel, latent attention in every fourth layer, no positions.

    sparsejax show --config=preset:kimi_linear --length=262144
    sparsejax train --config=preset:kimi_linear:tiny --workdir=runs/kimi_linear

Attention is dense, in layers 3, 7, 11, 15, 19, 23 and 26 of 27. The first layer has an MLP; the others have 256
experts, of which a token selects eight, and a shared expert. Sizes: arXiv:2510.26692 and the released config.json.
Published: 48B parameters, 3B active, both without embedding and head. Counted: 48.4B and 2.73B without them; 49.1B, as
in the checkpoint, and 3.48B with them. The full size is for cost accounting.

`:tiny` reduces the loss from 5.92 to 2.90 nats in 30 steps and 97 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-5)
    delta = recipe.delta(32, 32, 128, norm_eps=1e-5, channel_decay=True, rank=128, gate="sigmoid")
    latent = dict(
        kind="latent",
        pattern="causal",
        heads=32,
        query_rank=None,
        kv_rank=512,
        nope_width=128,
        rope_width=64,
        value_width=128,
        rope=None,
        norm_eps=1e-6,
        impl="auto",
    )
    experts = recipe.experts(
        256,
        8,
        1024,
        router="sigmoid",
        renormalize=True,
        scale=2.446,
        selection_bias=True,
        bias_rate=1e-3,
        shared_width=1024,
    )
    full = recipe.model(
        vocab=163_840,
        width=2304,
        schedule="delta_dense 2x(delta) full 5x(3x(delta) full) 2x(delta) full",
        layers=dict(
            delta_dense=recipe.layer(delta, recipe.gated(9216), norm),
            delta=recipe.layer(delta, experts, norm),
            full=recipe.layer(latent, experts, norm),
        ),
        norm=norm,
    )
    return recipe.choose(argument, full, 4096, schedule="delta_dense 2x(delta) full")
