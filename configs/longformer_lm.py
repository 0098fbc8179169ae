"""Longformer's character language model (arXiv:2004.05150, section 4): causal layers of windows.

    sparsejax train --config=configs/longformer_lm.py:mini --workdir=runs/longformer_lm
    sparsejax show --config=configs/longformer_lm.py:paper

`:paper` (or nothing) is the small model, 41M parameters, in the setting of table 4: text8, 2,048 characters, 150,000
steps. A window of w keys includes the query itself. The default schedule has wider windows in higher layers; the
table's other rows are in experiments/longformer_lm. The paper prints the range, 32 to 512, and the fixed width, 230,
not the list: that two, two, two, three and three layers have 32, 64, 128, 256 and 512 is inferred from their mean.

`:staged` is its whole training (section 4.2, table 12): five phases, each with windows and a sequence twice as long as
the one before, as far as memory went, and with half its rate; dilated on two heads. That phases two to four double what
phase one has is inferred. (The relative positions' sinusoids stay 512 numbers however wide the windows are.)

`:mini` is for two CPU cores: six of these layers with four heads at width 96, windows a quarter as wide, 512 bytes.
`data.files` says of which text.
"""

import recipe

# Windows of an N-th of the widest, from the bottom to the top: their mean is the fixed row's.
PAPER = dict(parts=(16, 16, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1), width=512, heads=8, widest=512, relative=512, vocab=27)
# Of `:staged`: steps, tokens of a sequence, sequences of a batch.
STAGES = ((430_000, 2048, 32), (50_000, 4096, 32), (50_000, 8192, 16), (35_000, 16_384, 16), (5_000, 23_040, 16))
MINI = dict(parts=(16, 8, 4, 2, 1, 1), width=96, heads=4, widest=128, relative=32, vocab=256)
DILATED = "2x(w16) 2x(w8) 2x(w4) 2x(w2_stride2) w2_stride3 w1_stride3 2x(w1_stride4)"  # gaps of 0, 1, 2, 3 keys


def write_patterns(widest, heads):
    """The pattern of each layer by name; in those with a stride a quarter of the heads, two in the paper, have gaps."""
    found = {f"w{part}": f"causal & window({widest // part - 1})" for part in (16, 8, 4, 2, 1)}
    for part, stride in ((2, 2), (2, 3), (1, 3), (1, 4)):
        left = widest // part - 1
        windows = [f"window({left})"] * (heads - heads // 4) + [f"dilated({left}, stride={stride})"] * (heads // 4)
        found[f"w{part}_stride{stride}"] = f"causal & per_head({', '.join(windows)})"
    return found


def build(parts, width, heads, widest, relative, vocab):
    norm = dict(kind="layer", eps=1e-5)

    def layer(pattern):
        options = dict(relative=relative, bias=True, out_bias=True)
        mixer = recipe.attention(pattern, heads, heads, width // heads, **options)
        return recipe.layer(mixer, recipe.plain(4 * width, "gelu", bias=True), norm)

    layers = {name: layer(pattern) for name, pattern in write_patterns(widest, heads).items()}
    layers["fixed"] = layer(f"causal & window({round(sum(widest / part for part in parts) / len(parts)) - 1})")
    return recipe.model(vocab, width, " ".join(f"w{part}" for part in parts), layers, norm)


def plan_stages(rate):
    """Phases that double windows and sequence and halve the rate, which is constant within each; steps in all."""
    phases, start = {}, 0
    for number, (steps, length, batch) in enumerate(STAGES):
        patterns = write_patterns(PAPER["widest"] * 2**number, PAPER["heads"])
        changes = dict(
            data=dict(length=length),
            train=dict(batch=batch),
            optimizer=dict(learning_rate=rate / 2**number, warmup=min(steps // 10, 10_000)),
            model=dict(layers={name: dict(mixer=dict(pattern=pattern)) for name, pattern in patterns.items()}),
        )
        phases[f"stage{number + 1}"] = dict(start=start, set=changes)
        start += steps
    return phases, start


def get_config(argument="paper"):
    if argument in ("paper", "staged"):
        run = dict(length=2048, steps=150_000, batch=32, learning_rate=2.5e-4, warmup=10_000)
        config = recipe.make_run(build(**PAPER), **run)
        config.data.tokenizer = "chars"
        config.model.dropout = 0.2
        config.optimizer.update(weight_decay=0.01, clip=0.25, schedule="constant")
        if argument == "staged":
            config.model.schedule = DILATED
            config.train.phases, config.train.steps = plan_stages(config.optimizer.learning_rate)
        return config
    if argument != "mini":
        raise ValueError(f"the argument must be paper, staged or mini, got {argument!r}")
    config = recipe.make_run(build(**MINI), length=512, steps=600, batch=8, learning_rate=3e-3, warmup=60)
    return recipe.fit_cpu(config, evaluations=4)
