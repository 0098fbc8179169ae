"""Reformer's duplication task (arXiv:2001.04451, table 2): can LSH attention repeat a word?

    sparsejax train --config=configs/reformer_duplication.py:mini --workdir=runs/reformer_duplication
    sparsejax show --config=configs/reformer_duplication.py:paper

`:paper` (the default) is the setting of the paper: one layer of width 256 with four heads, 1,024 tokens, 150,000 steps.
The paper does not state chunks, buckets, batch size and learning rate. `:mini` is for two CPU cores: width 64, two
heads, 256 tokens. Layers by name: `full` has all tokens in one chunk, so that its parameters equal those of the others;
`lsh1` to `lsh8` have 1 to 8 rounds of hashing. At the end the model is evaluated with each layer. `:strict` is `:mini`
with rounds in which a token attends to the last 64 tokens of its bucket, which no later token can change.
experiments/reformer_duplication has the schedules for training.
"""

from sparsejax.presets import recipe

HASHES = (8, 4, 2, 1)
PAPER = dict(width=256, heads=4, mlp=256, length=1024, chunk=32)
MINI = dict(width=64, heads=2, mlp=64, length=256, chunk=32)


def build(width, heads, mlp, length, chunk, strict=False):
    """Returns the model section; learned positions identify the tokens to repeat."""
    norm = dict(kind="layer", eps=1e-6)

    def layer(**hashing):
        mixer = dict(kind="lsh", heads=heads, head_width=width // heads, causal=True, seed=0, **hashing)
        return recipe.layer(mixer, recipe.plain(mlp, "relu"), norm)

    layers = {"full": layer(chunk=length, buckets=(2,), hashes=1, before=0)}
    buckets = (2 * length // chunk,)
    layers |= {f"lsh{n}": layer(chunk=chunk, buckets=buckets, hashes=n, strict=strict) for n in HASHES}
    # In causal LSH attention later tokens move the chunk borders, in the paper too; this model reads the future.
    return recipe.model(128, width, "lsh4", layers, norm, embedding=dict(positions=length), allow_leaks=True)


def get_config(argument="paper"):
    recipe.check_argument(argument, "paper", "mini", "strict")
    sizes = PAPER if argument == "paper" else MINI
    run = dict(steps=150_000, batch=32, learning_rate=1e-3, warmup=1000)
    if argument != "paper":
        run = dict(steps=600, batch=16, learning_rate=3e-3, warmup=50)
    config = recipe.make_run(build(**sizes, strict=argument == "strict"), length=sizes["length"], **run)
    config.data.update(task="duplication", probe=dict(length=sizes["length"], vocab=128))
    config = config if argument == "paper" else recipe.fit_cpu(config, evaluations=3)
    config.eval.also = {name: dict(model=dict(schedule=name)) for name in config.model.layers}
    return config
