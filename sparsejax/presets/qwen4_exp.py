"""Qwen3.8-Flash-Next (Qwen4-Exp), the text model: gated delta rule and attention to selected keys on four streams.

    sparsejax show --config=preset:qwen4_exp --length=262144
    sparsejax train --config=preset:qwen4_exp:tiny --workdir=runs/qwen4_exp

Three layers of the gated delta rule precede one of gated attention, whose queries select 512 blocks of 4 keys by the
mean index key of a block, and attend to the last block besides. Every layer has 512 experts, of which a token uses
10, and a gated shared expert; gates read and write the four residual streams. Sizes: the released config.json.
Published: 125B parameters, 6B active, and 51B in hashed embeddings of n-grams at the second layer, which are left
out, as are the vision encoder and the layer that predicts a second token. Counted: 125.7B, and 6.0B active without
embedding and head. The full size is for cost accounting.

`:tiny` reaches 3.31 nats per byte in 30 steps and 146 CPU seconds, with compilation, check and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-6, offset=True)
    experts = recipe.experts(512, 10, 640, renormalize=True, shared_width=640, shared_gate=True, balance_weight=1e-3)
    delta = recipe.delta(48, 16, 128, gate="sigmoid")
    indexer = dict(heads=4, width=128, top_k=512, block=4, pool="keys", weights=False, norm=norm)
    rope = dict(base=1e7, fraction=0.25)
    indexed = recipe.attention("causal", 24, 2, 256, rope=rope, qk_norm=norm, gate=True, indexer=indexer)
    hyper = dict(kind="gated", streams=4, eps=1e-6, rank=320)
    full = recipe.model(
        vocab=248_320,
        width=2560,
        schedule="12x(3x(delta) indexed)",
        layers=dict(delta=recipe.layer(delta, experts, None), indexed=recipe.layer(indexed, experts, None)),
        norm=None,
        hyper=hyper,
    )
    return recipe.choose(argument, full, 4096, schedule="3x(delta) indexed", hyper=hyper | dict(rank=8))
