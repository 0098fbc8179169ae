"""Longformer's character language model (arXiv:2004.05150, section 4): twelve causal layers of windows.

    sparsejax train --config=configs/longformer_lm.py:mini --workdir=runs/longformer_lm
    sparsejax show --config=configs/longformer_lm.py:paper

`:paper` (or nothing) is the small model, 41M parameters, in the setting of table 4: text8, 2,048 characters, 150,000
steps. A window of w keys includes the query itself. The default schedule has wider windows in higher layers; the
table's other rows are in experiments/longformer_lm. The paper prints the range, 32 to 512, and the fixed width, 230,
not the list: that two, two, two, three and three layers have 32, 64, 128, 256 and 512 is inferred from their mean,
229.3.

`:mini` is for two CPU cores: the same twelve layers and eight heads at width 128, windows a quarter as wide, 512 bytes.
`data.files` says of which text.
"""

import recipe

LAYERS, HEADS, DILATED_HEADS = 12, 8, 2
FIXED = 230 / 512  # of the widest window
PAPER = dict(width=512, widest=512, relative=512, vocab=27)
MINI = dict(width=128, widest=128, relative=32, vocab=256)

INCREASING = "2x(w16) 2x(w8) 2x(w4) 3x(w2) 3x(w1)"  # wN: a window of an N-th of the widest


def build(width, widest, relative, vocab):
    norm = dict(kind="layer", eps=1e-5)

    def layer(pattern):
        options = dict(relative=relative, bias=True, out_bias=True)
        mixer = recipe.attention(pattern, HEADS, HEADS, width // HEADS, **options)
        return recipe.layer(mixer, recipe.plain(4 * width, "gelu", bias=True), norm)

    def dilate(left, stride):
        heads = [f"window({left})"] * (HEADS - DILATED_HEADS) + [f"dilated({left}, stride={stride})"] * DILATED_HEADS
        return f"causal & per_head({', '.join(heads)})"

    layers = {f"w{part}": layer(f"causal & window({widest // part - 1})") for part in (16, 8, 4, 2, 1)}
    layers["fixed"] = layer(f"causal & window({round(FIXED * widest) - 1})")
    for part, stride in ((2, 2), (2, 3), (1, 3), (1, 4)):
        layers[f"w{part}_stride{stride}"] = layer(dilate(widest // part - 1, stride))
    return recipe.model(vocab, width, INCREASING, layers, norm)


def get_config(argument="paper"):
    if argument == "paper":
        run = dict(length=2048, steps=150_000, batch=32, learning_rate=2.5e-4, warmup=10_000)
        config = recipe.make_run(build(**PAPER), **run)
        config.data.tokenizer = "chars"
        config.optimizer.weight_decay = 0.01
        config.optimizer.clip = 0.25
        return config
    if argument != "mini":
        raise ValueError(f"the argument must be paper or mini, got {argument!r}")
    config = recipe.make_run(build(**MINI), length=512, steps=1000, batch=4, learning_rate=2e-3, warmup=50)
    return recipe.fit_cpu(config, evaluations=4)
