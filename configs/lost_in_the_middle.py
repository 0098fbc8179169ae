"""Key-value retrieval by a window with globals and by full attention.

    sparsejax train --config=configs/lost_in_the_middle.py --workdir=runs/lost_in_the_middle
    sparsejax train --config=configs/lost_in_the_middle.py --workdir=runs/full --config.model.schedule='local full'

Six pairs, then a query of every pair; two layers without MLPs. Layers by name: `local` is `window(7)`, to which
`globals` adds the first eight tokens (two pairs) as sinks; `full` is causal attention.
"""

from sparsejax.presets import recipe

WIDTH, HEADS, WINDOW, PAIRS = 64, 2, 7, 6


def get_config():
    norm = recipe.rms(1e-6)

    def layer(pattern):
        rope = dict(base=10_000.0)
        mixer = recipe.attention(pattern, HEADS, HEADS, WIDTH // HEADS, rope, qk_norm=norm)
        return recipe.layer(mixer, None, norm)

    layers = dict(
        local=layer(f"causal & window({WINDOW})"),
        globals=layer(f"causal & (window({WINDOW}) | sink(8))"),
        full=layer("causal"),
    )
    # The norm of a token is that of the output of an attention layer at initialization; it is small otherwise.
    embedding = dict(scale=WIDTH**0.5)
    model = recipe.model(18, WIDTH, "local globals", layers, norm, embedding=embedding)
    config = recipe.make_run(model, length=8 * PAIRS - 1, steps=500, batch=64, learning_rate=3e-3, warmup=50)
    config = recipe.fit_cpu(config, evaluations=2)
    config.optimizer.update(beta2=0.98, weight_decay=0.0)
    config.data.update(task="key_value", probe=dict(pairs=PAIRS, digits=1, queries=PAIRS))
    return config
