"""Longformer's character language model (arXiv:2004.05150, section 4): causal layers with windows.

    sparsejax train --config=configs/longformer_lm.py:mini --workdir=runs/longformer_lm
    sparsejax show --config=configs/longformer_lm.py:paper

`:paper` (the default) is the small model, with 41M parameters, in the setting of table 4: text8, 2,048 characters,
150,000 steps. A window of w keys includes the query. In the default schedule windows grow with depth;
experiments/longformer_lm has the other rows of the table. The paper states the range, 32 to 512, and the fixed width,
230, but not the widths per layer; 2, 2, 2, 3 and 3 layers of 32, 64, 128, 256 and 512 keys have that mean.

`:staged` is the complete training (section 4.2, table 12): each of five phases doubles the windows and the sequence
length of the previous one, as far as memory allows, and halves its learning rate; two heads are dilated. The paper does
not state phases two to four; doubling is an inference. The relative positions have 512 features in all phases.

`:mini` is for two CPU cores: six layers of width 96 with four heads, windows a quarter as wide, and 512 bytes.
`data.files` selects the text.
"""

from sparsejax.presets import recipe

# Divisors of the widest window per layer, from bottom to top. The mean window is that of the fixed row.
PAPER = dict(parts=(16, 16, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1), width=512, heads=8, widest=512, relative=512, vocab=27)
# Steps, tokens per sequence and sequences per batch of each phase of `:staged`.
STAGES = ((430_000, 2048, 32), (50_000, 4096, 32), (50_000, 8192, 16), (35_000, 16_384, 16), (5_000, 23_040, 16))
MINI = dict(parts=(16, 8, 4, 2, 1, 1), width=96, heads=4, widest=128, relative=32, vocab=256)
DILATED = "2x(w16) 2x(w8) 2x(w4) 2x(w2_stride2) w2_stride3 w1_stride3 2x(w1_stride4)"  # gaps of 0, 1, 2, 3 keys


def write_patterns(widest, heads):
    """Returns the patterns by layer name. A quarter of the heads of a strided layer, two in the paper, are dilated."""
    patterns = {f"w{part}": f"causal & window({widest // part - 1})" for part in (16, 8, 4, 2, 1)}
    for part, stride in ((2, 2), (2, 3), (1, 3), (1, 4)):
        left = widest // part - 1
        windows = [f"window({left})"] * (heads - heads // 4) + [f"dilated({left}, stride={stride})"] * (heads // 4)
        patterns[f"w{part}_stride{stride}"] = f"causal & per_head({', '.join(windows)})"
    return patterns


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
    """Returns phases that double windows and sequence length and halve the learning rate, and the number of steps."""
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
    recipe.check_argument(argument, "paper", "staged", "mini")
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
    config = recipe.make_run(build(**MINI), length=512, steps=600, batch=8, learning_rate=3e-3, warmup=60)
    return recipe.fit_cpu(config, evaluations=4)
