"""Passkey retrieval by layers of equal size whose windows end before the haystack does.

    sparsejax train --config=configs/needle.py --workdir=runs/needle
    sparsejax train --config=configs/needle.py --workdir=runs/needle_full --config.model.schedule='3x(local) full'

A digit follows a name somewhere among 128 tokens; the end repeats the name. Four layers of `window(15)` read 60 tokens
back. Layers by name: `local` is the window, to which `sinks` adds the first four tokens; `full` is causal attention;
`ssm` is Mamba with as many parameters.
"""

from sparsejax.presets import recipe

WIDTH, HEADS, WINDOW, LENGTH = 64, 2, 15, 128
PROBE = dict(digits=1, names=6, fillers=3)
VOCAB = 10 + 6 + 3 + 1


def get_config():
    norm = recipe.rms(1e-6)

    def layer(mixer):
        return recipe.layer(mixer, None, norm)

    def attention(pattern):
        rope = dict(base=10_000.0)
        return layer(recipe.attention(pattern, HEADS, HEADS, WIDTH // HEADS, rope, qk_norm=norm))

    layers = dict(
        local=attention(f"causal & window({WINDOW})"),
        sinks=attention(f"causal & (window({WINDOW}) | sink(4))"),
        full=attention("causal"),
        ssm=layer(recipe.mamba(WIDTH, inner=WIDTH)),
    )
    model = recipe.model(VOCAB, WIDTH, "4x(local)", layers, norm, tied=True)
    config = recipe.make_run(model, length=LENGTH, steps=600, batch=16, learning_rate=3e-3, warmup=50)
    config = recipe.fit_cpu(config, evaluations=2)
    config.optimizer.update(beta2=0.98, weight_decay=0.0)
    config.data.update(task="passkey", probe=dict(length=LENGTH, **PROBE))
    return config
