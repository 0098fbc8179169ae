"""What a query attends to: fixed patterns, choices by content, and states, at equal parameters and attended pairs.

    sparsejax train --config=configs/selection.py:text --workdir=runs/selection
    sparsejax show --config=configs/selection.py:paper --config.model.schedule='conv 6x(3x(moba) full)'

`:paper` (the default) has 24 layers and 1.27B parameters. `:text`, `:recall` and `:needle` have four layers of width
64, which train in minutes on a CPU core; a short convolution comes first. A query of every layer attends to as many
keys as in `window`, except in `full` and in `mamba2` and `delta`, which have states. The width of the MLP makes the
parameters of the layers equal. experiments/selection has the schedules.
"""

from sparsejax.presets import recipe

SMALL = dict(width=64, heads=4, kv_heads=2, repeats=1)
SIZES = {
    "paper": dict(keys=1024, length=8192, width=2048, heads=16, kv_heads=4, repeats=6, vocab=65_536, mlp=5632),
    "text": dict(keys=64, length=512, vocab=256, mlp=128, **SMALL),
    "recall": dict(keys=16, length=64, vocab=32, mlp=64, **SMALL),
    "needle": dict(keys=32, length=192, vocab=20, mlp=64, **SMALL),
}
PROBES = {
    "recall": dict(task="mqar", probe=dict(length=64, pairs=4, vocab=32)),
    "needle": dict(task="passkey", probe=dict(length=192, digits=1, names=6, fillers=3)),
}
STEPS = {"text": (400, 8), "recall": (300, 64), "needle": (300, 16)}  # and rows per step
# By how much the MLP of a layer is narrower than that of attention, because its mixer has more parameters.
NARROWER = {
    "paper": dict(csa=471, delta=695, dsa=215, hca=129, lsh=341, mamba2=1459, msa=213, nsa=699, routing=341),
    "small": dict(csa=51, delta=27, dsa=28, hca=7, mamba2=48, msa=16, nsa=47, routing=1),
}


def list_mixers(keys, length, width, heads, kv_heads):
    """Returns the mixers by name of the layer."""
    head_width, rope, norm = width // heads, dict(base=10_000.0), recipe.rms(1e-6)
    block, every = keys // 8, 2 * length // keys  # `every` tokens have one entry: a quarter of the keys at the mean
    near, quarter = 3 * keys // 4, keys // 4

    def attention(pattern, **options):
        return recipe.attention(pattern, heads, kv_heads, head_width, rope, qk_norm=norm, **options)

    def compressed(window, **compression):
        ranks = dict(query_rank=width // 2, out_rank=width // 2, groups=2)
        rotation = dict(rope_width=head_width // 2, rope=rope | dict(interleaved=True))
        return dict(
            kind="compressed",
            heads=heads,
            head_width=head_width,
            window=window,
            norm_eps=1e-6,
            impl="auto",
            compression=compression,
            **ranks,
            **rotation,
        )

    global_ids = ", ".join(str(i) for i in range(0, length, length // quarter))
    learned = dict(heads=4, width=head_width, loss_weight=1.0)
    return dict(
        full=attention("causal"),
        window=attention(f"causal & window({keys - 1})"),
        sinks=attention(f"causal & (window({keys - 5}) | sink(4))"),
        globals=attention(f"causal & (window({near - 1}) | globals([{global_ids}]))"),
        bigbird=attention(f"causal & (window({near - 1}) | sink({block // 2}) | random(3, tile={block}, seed=0))"),
        strided=attention(f"causal & (window({near - 1}) | strided({every}))"),
        lsh=dict(
            kind="lsh",
            heads=heads,
            head_width=head_width,
            causal=True,
            strict=True,
            chunk=keys // 2,
            buckets=(4,),
            hashes=1,
            seed=0,
        ),
        routing=dict(
            kind="routing",
            heads=heads,
            kv_heads=heads,
            shared=True,
            head_width=head_width,
            clusters=4,
            members=keys,
            rope=rope,
        ),
        tokens=attention("causal", select=dict(kind="tokens", count=keys)),
        moba=attention("causal", select=dict(kind="moba", count=8, block=block)),
        nsa=dict(
            kind="nsa",
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            rope=rope,
            qk_norm=norm,
            impl="auto",
            compress="mean",
            compress_length=every,
            compress_stride=every,
            select_block=every,
            count=2,
            initial=0,
            local=1,
            window=max(near - 3 * every // 2, 1),
        ),
        dsa=attention("causal", indexer=dict(top_k=keys, **learned)),
        csa=compressed(keys // 2, ratio=4, overlap=True, indexer=dict(top_k=keys // 2, **learned)),
        hca=compressed(near, ratio=every),
        msa=attention(
            "causal",
            indexer=learned
            | dict(heads=kv_heads, top_k=8, block=block, scope="kv_head", local=1, weights=False, relu=False),
        ),
        mamba2=recipe.mamba2(heads, 3 * head_width // 2, head_width, 1, norm_eps=1e-6, chunk=32),
        delta=recipe.delta(heads, kv_heads, head_width, chunk=32),
    )


def build(keys, length, width, heads, kv_heads, repeats, vocab, mlp, narrower):
    norm = recipe.rms(1e-6)
    layers = {
        name: recipe.layer(mixer, recipe.gated(mlp - narrower.get(name, 0)), norm)
        for name, mixer in list_mixers(keys, length, width, heads, kv_heads).items()
    }
    layers["conv"] = recipe.layer(dict(kind="conv", conv=4), recipe.gated(mlp), norm)
    return recipe.model(vocab, width, f"conv {4 * repeats}x(window)", layers, norm, tied=True)


def get_config(argument="paper"):
    recipe.check_argument(argument, *SIZES)
    sizes = SIZES[argument]
    model = build(**sizes, narrower=NARROWER["paper" if argument == "paper" else "small"])
    if argument == "paper":
        return recipe.make_run(model, sizes["length"], steps=50_000, batch=128, learning_rate=3e-4, warmup=2000)
    steps, batch = STEPS[argument]
    config = recipe.make_run(model, sizes["length"], steps, batch, learning_rate=3e-3, warmup=50)
    config = recipe.fit_cpu(config, evaluations=2)
    config.train.check = False  # `python -m benchmarks certificates --only="selection, sweep"` checks each model once
    if argument != "text":
        config.model.tied = False
        config.optimizer.update(schedule="constant", beta2=0.98, weight_decay=0.0)
        config.data.update(PROBES[argument])
    return config
