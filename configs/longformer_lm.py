"""Longformer's character language model (arXiv:2004.05150, section 4): causal layers of windows.

    sparsejax train --config=configs/longformer_lm.py:mini --workdir=runs/longformer_lm
    sparsejax show --config=configs/longformer_lm.py:paper

`:paper` (or nothing) is the small model, 41M parameters, in the setting of table 4: text8, 2,048 characters, 150,000
steps. A window of w keys includes the query itself. The default schedule has wider windows in higher layers; the
table's other rows are in experiments/longformer_lm. The paper prints the range, 32 to 512, and the fixed width, 230,
not the list: that two, two, two, three and three layers have 32, 64, 128, 256 and 512 is inferred from their mean.

`:staged` is its whole training (section 4.2 and appendix A): five phases, each with windows and a sequence twice as
long as the one before, as far as memory went, and with half its rate.

`:mini` is for two CPU cores: six of these layers with four heads at width 96, windows a quarter as wide, 512 bytes.
`data.files` says of which text.
"""

import recipe

# Windows of an N-th of the widest, from the bottom to the top: their mean is the fixed row's.
PAPER = dict(parts=(16, 16, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1), width=512, heads=8, widest=512, relative=512, vocab=27)
# Of `:staged`: steps, tokens of a sequence, sequences of a batch.
STAGES = ((430_000, 2048, 32), (50_000, 4096, 32), (50_000, 8192, 16), (35_000, 16_384, 16), (5_000, 23_040, 16))
MINI = dict(parts=(16, 8, 4, 2, 1, 1), width=96, heads=4, widest=128, relative=32, vocab=256)


def build(parts, width, heads, widest, relative, vocab):
    norm = dict(kind="layer", eps=1e-5)

    def layer(pattern):
        options = dict(relative=relative, bias=True, out_bias=True)
        mixer = recipe.attention(pattern, heads, heads, width // heads, **options)
        return recipe.layer(mixer, recipe.plain(4 * width, "gelu", bias=True), norm)

    def dilate(left, stride):
        """A quarter of the heads, two in the paper, have gaps."""
        windows = [f"window({left})"] * (heads - heads // 4) + [f"dilated({left}, stride={stride})"] * (heads // 4)
        return f"causal & per_head({', '.join(windows)})"

    layers = {f"w{part}": layer(f"causal & window({widest // part - 1})") for part in (16, 8, 4, 2, 1)}
    layers["fixed"] = layer(f"causal & window({round(sum(widest / part for part in parts) / len(parts)) - 1})")
    for part, stride in ((2, 2), (2, 3), (1, 3), (1, 4)):
        layers[f"w{part}_stride{stride}"] = layer(dilate(widest // part - 1, stride))
    return recipe.model(vocab, width, " ".join(f"w{part}" for part in parts), layers, norm)


def plan_stages(config):
    """Phases that double windows and sequence and halve the rate; the rate is constant within each."""
    phases, start = {}, 0
    for number, (steps, length, batch) in enumerate(STAGES):
        rate, warmup = config.optimizer.learning_rate / 2**number, min(steps // 10, 10_000)
        widths = {part: 2**number * PAPER["widest"] // part for part in sorted(set(PAPER["parts"]))}
        windows = [f"model.layers.w{n}.mixer.pattern=causal & window({width - 1})" for n, width in widths.items()]
        changes = [f"data.length={length}", f"train.batch={batch}", f"optimizer.learning_rate={rate}"]
        phases[f"stage{number + 1}"] = dict(start=start, set=[*changes, f"optimizer.warmup={warmup}", *windows])
        start += steps
    return start, phases


def get_config(argument="paper"):
    if argument in ("paper", "staged"):
        run = dict(length=2048, steps=150_000, batch=32, learning_rate=2.5e-4, warmup=10_000)
        config = recipe.make_run(build(**PAPER), **run)
        config.data.tokenizer = "chars"
        config.model.dropout = 0.2
        config.optimizer.update(weight_decay=0.01, clip=0.25, schedule="constant")
        if argument == "staged":
            config.train.steps, config.train.phases = plan_stages(config)
        return config
    if argument != "mini":
        raise ValueError(f"the argument must be paper, staged or mini, got {argument!r}")
    config = recipe.make_run(build(**MINI), length=512, steps=600, batch=8, learning_rate=3e-3, warmup=60)
    return recipe.fit_cpu(config, evaluations=4)
