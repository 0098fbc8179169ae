"""MiniMax-M3, the text model: blocks of 128 keys that an index head per key/value head selects, and 128 experts.

    sparsejax show --config=preset:minimax_m3 --length=1048576
    sparsejax train --config=preset:minimax_m3:tiny --workdir=runs/minimax_m3

The first three of 60 layers have full attention and an MLP; the others attend to 16 blocks and have experts, of which a
token selects four, and a shared expert. Sizes: the released config.json. Published on the model card: 428B parameters,
23B active, with the vision encoder. Counted: 426.2B, and 23.3B active without embedding, head and index heads. The full
size is for cost accounting.

`:tiny` reaches 2.83 nats per byte in 30 steps and 79 CPU seconds, with compilation, check and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-6, offset=True)
    rope = dict(base=5_000_000.0, fraction=0.5)
    full = recipe.attention("causal", 64, 4, 128, rope=rope, qk_norm=norm)
    indexer = dict(
        heads=4, width=128, top_k=16, block=128, scope="kv_head", local=1, weights=False, relu=False, norm=norm
    )
    bounds = dict(limit=7.0, alpha=1.702)
    experts = recipe.experts(
        128, 4, 3072, router="sigmoid", renormalize=True, scale=2.0, selection_bias=True, bias_rate=1e-3,
        shared_width=3072, **bounds,
    )  # fmt: skip
    layers = dict(
        full=recipe.layer(full, recipe.gated(12_288, **bounds), norm),
        sparse=recipe.layer(full | dict(indexer=indexer), experts, norm),
    )
    model = recipe.model(200_064, 6144, "3x(full) 57x(sparse)", layers, norm)
    return recipe.choose(argument, model, 4096, schedule="3x(full) 2x(sparse)")
