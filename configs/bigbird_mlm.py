"""BigBird's building blocks (arXiv:2007.14062, table 1): masked language models with random, window and global tiles.

    sparsejax train --config=configs/bigbird_mlm.py:mini --workdir=runs/bigbird_mlm
    sparsejax show --config=configs/bigbird_mlm.py:paper

`:paper` (the default) has the size of BERT base and 512 tokens in tiles of 64. The default schedule has random, window
and global tiles; experiments/bigbird_mlm has the rows of the table. Random tiles are drawn once per layer and head from
the seed of the pattern.

`:mini` is for two CPU cores: three layers of width 128 on 512 bytes in tiles of 32. With learned positions and subwords
so short a run learns little from context; this model has rotary positions, bytes and norms before the branches.
`data.files` selects the text.
"""

from sparsejax.presets import recipe

RANDOM = 3  # random tiles per query tile
PAPER = dict(layers=12, width=768, heads=12, tile=64, vocab=30_522)
MINI = dict(layers=3, width=128, heads=4, tile=32, vocab=recipe.BYTES_AND_MASK, learned=False)


def write_patterns(layers, heads, tile):
    """Returns the patterns by layer name. BigBird has global first and last tiles."""
    near = f"chunk({tile}) | shift(chunk({tile}), {tile}) | shift(chunk({tile}), {-tile})"

    def draw(layer, apart):
        draws = (f"random({RANDOM}, tile={tile}, seed=0, apart={apart}, layer={layer}, head={i})" for i in range(heads))
        return f"per_head({', '.join(draws)})"

    patterns = {"full": "full", "window": near}
    for i in range(layers):
        patterns[f"random{i}"] = f"chunk({tile}) | {draw(i, apart=1)}"
        patterns[f"random_window{i}"] = f"{near} | {draw(i, apart=2)}"
        patterns[f"random_window_global{i}"] = f"bigbird({tile}, {RANDOM}, seed=0, heads={heads}, layer={i})"
    return patterns


def build(layers, width, heads, tile, vocab, learned=True):
    """Returns BERT's model section, with learned positions, or with rotary positions and norms before the branches."""
    norm = dict(kind="layer", eps=1e-12)
    rope = None if learned else dict(base=10_000.0)

    def layer(pattern):
        mixer = recipe.attention(pattern, heads, heads, width // heads, rope, bias=True, out_bias=True)
        return recipe.layer(mixer, recipe.plain(4 * width, "gelu", bias=True), norm, "post" if learned else "pre")

    return recipe.model(
        vocab,
        width,
        " ".join(f"random_window_global{i}" for i in range(layers)),
        {name: layer(pattern) for name, pattern in write_patterns(layers, heads, tile).items()},
        None if learned else norm,
        tied=True,
        causal=False,
        embedding=dict(positions=512 if learned else 0, norm=norm),
        head=dict(activation="gelu", norm=norm, bias=True),
    )


def get_config(argument="paper"):
    recipe.check_argument(argument, "paper", "mini")
    if argument == "paper":
        run = dict(length=512, steps=500_000, batch=256, learning_rate=1e-4, warmup=10_000)
        config = recipe.make_run(build(**PAPER), **run)
        config.data.tokenizer = f"bpe:{PAPER['vocab'] - 1}"
        return config
    config = recipe.make_run(build(**MINI), length=512, steps=500, batch=8, learning_rate=2e-3, warmup=50)
    return recipe.fit_cpu(config, evaluations=4)
