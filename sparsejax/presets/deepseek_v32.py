"""DeepSeek-V3.2: latent attention to 2,048 keys that a lightning indexer selects, and 256 experts.

    sparsejax show --config=preset:deepseek_v32 --length=131072
    sparsejax train --config=preset:deepseek_v32:tiny --workdir=runs/deepseek_v32

The first three layers have an MLP; the others have experts, of which a token selects eight, and a shared expert. Sizes:
arXiv:2412.19437, arXiv:2512.02556 and the released config.json. Published: 671B parameters, 37B active, without the
indexers and the layer that predicts a second token. Counted: 671.9B and 37.5B
without the embedding, of which 0.9B are indexers. The full size is for cost accounting. The
indexers train with the weight `loss_weight` of their loss, see docs/howto/train_an_indexer.md.

`:tiny` reaches 3.09 nats per byte in 30 steps and 114 CPU seconds, with compilation, check and evaluation.
"""

from sparsejax.presets import recipe


def build(
    vocab, width, depth, heads, query_rank, nope, value, mlp, index_heads, eps, interleaved, rope, scale, **groups
):
    """Returns the model section: three dense layers, then experts in all layers."""
    norm = recipe.rms(eps)
    latent = dict(
        kind="latent",
        pattern="causal",
        heads=heads,
        query_rank=query_rank,
        kv_rank=512,
        nope_width=nope,
        rope_width=64,
        value_width=value,
        rope=rope,
        norm_eps=1e-6,
        impl="auto",
        scale=scale,
        indexer=dict(heads=index_heads, width=128, top_k=2048, interleaved=interleaved),
    )
    experts = recipe.experts(
        256, 8, 2048, router="sigmoid", renormalize=True, scale=2.5, selection_bias=True, bias_rate=1e-3,
        shared_width=2048, **groups,
    )  # fmt: skip
    layers = dict(dense=recipe.layer(latent, recipe.gated(mlp), norm), experts=recipe.layer(latent, experts, norm))
    return recipe.model(vocab, width, f"3x(dense) {depth - 3}x(experts)", layers, norm)


def get_config(argument=""):
    yarn = dict(kind="yarn", factor=40.0, original_length=4096, fast=32.0, slow=1.0, attention_factor=1.0)
    rope = dict(base=10_000.0, interleaved=True, scaling=yarn)
    growth = 1.0 + 0.1 * 3.6888794541139363  # YaRN multiplies the scores by (1 + 0.1 ln 40)^2
    full = build(
        129_280, 7168, 61, heads=128, query_rank=1536, nope=128, value=128, mlp=18_432, index_heads=64, eps=1e-6,
        interleaved=False, rope=rope, scale=192**-0.5 * growth**2, groups=8, top_groups=4,
    )  # fmt: skip
    return recipe.choose(argument, full, 4096, schedule="3x(dense) 2x(experts)")
