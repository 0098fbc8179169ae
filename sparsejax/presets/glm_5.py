"""GLM-5: latent attention to 2,048 keys that an indexer with interleaved rotary positions selects, and 256 experts.

    sparsejax show --config=preset:glm_5 --length=202752
    sparsejax train --config=preset:glm_5:tiny --workdir=runs/glm_5

The layers are those of DeepSeek-V3.2 with other sizes; no groups of experts. Each layer has an indexer of its own; with
`indexer.shared` a layer reuses the selection of the one before. Sizes: arXiv:2602.15763 and the released config.json.
Published: 744B parameters, 40B active. Counted: 743.9B and 39.9B without embedding and head. The full size is for cost
accounting.

`:tiny` reaches 3.06 nats per byte in 30 steps and 112 CPU seconds, with compilation, check and evaluation.
"""

from sparsejax.presets import recipe
from sparsejax.presets.deepseek_v32 import build


def get_config(argument=""):
    full = build(
        154_880, 6144, 78, heads=64, query_rank=2048, nope=192, value=256, mlp=12_288, index_heads=32, eps=1e-5,
        interleaved=True, rope=dict(base=1_000_000.0, interleaved=True), scale=256**-0.5,
    )  # fmt: skip
    return recipe.choose(argument, full, 4096, schedule="3x(dense) 2x(experts)")
