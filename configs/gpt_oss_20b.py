"""gpt-oss-20b: windows of 128 keys and full attention in turn, sink logits in both, 32 experts of which four serve.

    sparsejax show --config=configs/gpt_oss_20b.py --length=131072
    sparsejax train --config=configs/gpt_oss_20b.py:tiny --workdir=runs/gpt_oss_20b

Sizes: arXiv:2508.10925, the model card, and the released config.json. Published (its table 1): 20.91B parameters,
3.61B active; the card counts the head as active and the embedding not. The cache of the twelve full layers, of eight
heads of 64, is 24 KiB for each token in bfloat16: 6.00 GiB at 256K tokens, 3.00 GiB at the 128K that it was made for;
windows add 3 MiB. The full size is for the account and for loading.

`:tiny` falls from 6.00 to 2.76 nats in its 30 steps, in 34 CPU seconds with compilation and evaluation.
"""

import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-5)
    yarn = dict(kind="yarn", factor=32.0, original_length=4096, truncate=False)
    experts = recipe.experts(32, 4, 2880, bias=True, renormalize=True, limit=7.0, alpha=1.702, balance_weight=1e-3)

    def layer(pattern):
        rope = dict(base=150_000.0, scaling=yarn)
        mixer = recipe.attention(pattern, 64, 8, 64, rope=rope, sinks=True, bias=True, out_bias=True)
        return recipe.layer(mixer, experts, norm)

    full = recipe.model(
        vocab=201_088,
        width=2880,
        schedule="12x(local full)",
        layers=dict(local=layer("causal & window(127)"), full=layer("causal")),
        norm=norm,
    )
    return recipe.choose(argument, full, 4096, schedule="2x(local full)", patterns=dict(local="causal & window(15)"))
