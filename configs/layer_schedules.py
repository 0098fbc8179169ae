"""Comparison of layer schedules: attention, windows, sinks, Mamba and lightning attention at equal parameters.

    sparsejax train --config=configs/layer_schedules.py:mini --workdir=runs/layer_schedules
    sparsejax show --config=configs/layer_schedules.py:paper --config.model.schedule='7x(ssm) full'

`:paper` (the default) has 24 layers and 1.4B parameters, about the size at which Jamba (arXiv:2403.19887, section 6)
compares ratios of layers. `:mini` has eight layers of width 64 and trains in two minutes on two CPU cores. Layers by
name: `full` has rotary positions and `nope` has none; `local` is a window, to which `sinks1` to `sinks8` add sinks;
`ssm` and `lightning` have as many parameters as attention. experiments/layer_schedules has the schedules.
"""

from sparsejax.presets import recipe

PAPER = dict(repeats=3, width=2048, heads=16, inner=2600, mlp=5632, window=1023, vocab=65_536)
MINI = dict(repeats=1, width=64, heads=2, inner=64, mlp=128, window=31, vocab=256)


def build(repeats, width, heads, inner, mlp, window, vocab):
    norm = recipe.rms(1e-6)
    rope = dict(base=10_000.0)

    def layer(mixer):
        return recipe.layer(mixer, recipe.gated(mlp), norm)

    def attention(pattern, rope):
        return layer(recipe.attention(pattern, heads, heads, width // heads, rope, qk_norm=norm))

    layers = dict(
        full=attention("causal", rope),
        nope=attention("causal", None),
        local=attention(f"causal & window({window})", rope),
        ssm=layer(recipe.mamba(width, inner=inner)),
        lightning=layer(dict(kind="lightning", heads=heads, head_width=4 * width // 5 // heads)),
    )
    for sinks in (1, 2, 4, 8):
        layers[f"sinks{sinks}"] = attention(f"causal & (window({window}) | sink({sinks}))", rope)
    return recipe.model(vocab, width, f"{repeats}x(7x(ssm) full)", layers, norm, tied=True)


def get_config(argument="paper"):
    recipe.check_argument(argument, "paper", "mini")
    if argument == "paper":
        return recipe.make_run(build(**PAPER), length=4096, steps=100_000, batch=256, learning_rate=3e-4, warmup=2000)
    config = recipe.make_run(build(**MINI), length=256, steps=400, batch=8, learning_rate=3e-3, warmup=50)
    return recipe.fit_cpu(config, evaluations=4)
