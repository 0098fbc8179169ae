"""BigBird base: an encoder with a window of tiles, global tiles or tokens, and random tiles drawn per layer.

    sparsejax show --config=preset:bigbird_base:itc --length=4096
    sparsejax show --config=preset:bigbird_base:etc --length=4096
    sparsejax train --config=preset:bigbird_base:tiny --workdir=runs/bigbird_base

`:itc` (the default) has tiles of 64 tokens, of which the first and the last are global, and three random tiles per
query tile. `:etc` has tiles of 84 tokens, 256 global tokens in front and no random tiles. Sizes: arXiv:2007.14062,
table 8, and the released config.json (bigbird-roberta-base). Published: 127M parameters (arXiv:2110.00976, table 3).
Both are masked language models. The full sizes are for cost accounting. (The released weights were trained with tiles
that count twice where two draws coincide; `sparsejax.load` reads them.)

`:tiny` reduces the loss from 5.99 to 3.36 nats in 30 steps and 25 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe

LAYERS = 12


def build(itc):
    norm = dict(kind="layer", eps=1e-12)

    def layer(number):
        tiles = "64, 3" if itc else "84, 0, extra=256"
        mixer = recipe.attention(f"bigbird({tiles}, seed=0, layer={number})", 12, 12, 64, bias=True, out_bias=True)
        return recipe.layer(mixer, recipe.plain(3072, "gelu_tanh", bias=True), norm, "post")

    return recipe.model(
        vocab=50_358,
        width=768,
        schedule=" ".join(f"layer{i}" for i in range(LAYERS)),
        layers={f"layer{i}": layer(i) for i in range(LAYERS)},
        norm=None,
        tied=True,
        causal=False,
        embedding=dict(types=2, positions=4096, norm=norm),
        head=dict(activation="gelu_tanh", norm=norm, bias=True),
    )


def get_config(argument="itc"):
    full = build(itc=argument != "etc")
    tiny = {f"layer{i}": f"bigbird(8, 2, seed=0, layer={i})" for i in range(2)}
    return recipe.choose(
        "" if argument in ("itc", "etc") else argument,
        full,
        4096,
        schedule="layer0 layer1",
        patterns=tiny,
        vocab=recipe.BYTES_AND_MASK,
        embedding=full["embedding"] | dict(positions=128),
    )
