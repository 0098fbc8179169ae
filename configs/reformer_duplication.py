"""Reformer's duplication task (arXiv:2001.04451, table 2): can attention among tokens that hash alike say a word again?

    sparsejax train --config=configs/reformer_duplication.py:mini --workdir=runs/reformer_duplication
    sparsejax show --config=configs/reformer_duplication.py:paper

`:paper` (or nothing) is the paper's: one layer of width 256 with four heads, 1,024 tokens, 150,000 steps. Chunks,
buckets, batch and rate are not in the paper. `:mini` is for two CPU cores: width 64, two heads, 256 tokens. Layers by
name: `full`, all of whose tokens are one chunk, so that its parameters are those of the others, and `lsh1` to `lsh8`,
hashed so many times. At the end a model is evaluated as each of them; what is trained stands in
experiments/reformer_duplication.
"""

import recipe

HASHES = (8, 4, 2, 1)
PAPER = dict(width=256, heads=4, mlp=256, length=1024, chunk=32)
MINI = dict(width=64, heads=2, mlp=64, length=256, chunk=32)


def build(width, heads, mlp, length, chunk):
    """Positions are learned: tokens find their places again by them."""
    norm = dict(kind="layer", eps=1e-6)

    def layer(**hashing):
        mixer = dict(kind="lsh", heads=heads, head_width=width // heads, causal=True, seed=0, **hashing)
        return recipe.layer(mixer, recipe.plain(mlp, "relu"), norm)

    layers = {"full": layer(chunk=length, buckets=(2,), hashes=1, before=0)}
    layers |= {f"lsh{n}": layer(chunk=chunk, buckets=(2 * length // chunk,), hashes=n) for n in HASHES}
    return recipe.model(128, width, "lsh4", layers, norm, embedding=dict(positions=length))


def get_config(argument="paper"):
    if argument not in ("paper", "mini"):
        raise ValueError(f"the argument must be paper or mini, got {argument!r}")
    sizes = PAPER if argument == "paper" else MINI
    run = dict(steps=150_000, batch=32, learning_rate=1e-3, warmup=1000)
    if argument == "mini":
        run = dict(steps=600, batch=16, learning_rate=3e-3, warmup=50)
    config = recipe.make_run(build(**sizes), length=sizes["length"], **run)
    config.data.update(task="duplication", probe=dict(length=sizes["length"], vocab=128))
    config = config if argument == "paper" else recipe.fit_cpu(config, evaluations=3)
    config.eval.also = {name: dict(model=dict(schedule=name)) for name in config.model.layers}
    return config
