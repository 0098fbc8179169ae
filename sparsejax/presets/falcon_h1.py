"""Falcon-H1 34B: attention and Mamba-2 in parallel in each of 72 layers, with factors on all activations.

    sparsejax show --config=preset:falcon_h1 --length=262144
    sparsejax train --config=preset:falcon_h1:tiny --workdir=runs/falcon_h1

Attention is dense. The factors (muP) are those of the released model and depend on its width; the tiny form has none.
Sizes: arXiv:2507.22448 and the released config.json. Published: 34B parameters (33.64B in the checkpoint). The full
size is for cost accounting and for loading released weights.

`:tiny` reduces the loss from 6.09 to 2.57 nats in 30 steps and 44 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def build(factors):
    norm = recipe.rms(1e-5)
    ssm = recipe.mamba2(32, 128, 256, groups=2, norm_eps=1e-5, norm_groups=2)
    full = recipe.attention("causal", 20, 4, 128, rope=dict(base=1e11))
    mlp = recipe.gated(21_504)
    branches = dict(attention=dict(mixer=full), ssm=dict(mixer=ssm))
    ends = {}
    if factors:
        ssm["multipliers"] = (0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738)
        full["scale"] = 128**-0.5 * 0.011048543456039804
        mlp |= dict(gate_scale=0.1767766952966369, out_scale=0.011160714285714284)
        branches["attention"]["scale_out"] = 0.0375
        branches["ssm"] |= dict(scale_in=0.25, scale_out=0.08838834764831845)
        ends = dict(embedding=dict(scale=5.656854249492381), head=dict(scale=0.0078125))
    return recipe.model(
        vocab=261_120,
        width=5120,
        schedule="72x(hybrid)",
        layers=dict(hybrid=recipe.layer(dict(kind="parallel", branches=branches), mlp, norm)),
        norm=norm,
        **ends,
    )


def get_config(argument=""):
    return recipe.choose(argument, build(factors=argument != "tiny"), 4096, schedule="2x(hybrid)")
