"""What the presets are written with: layers in the words of a config, a run around a model, a model's tiny form."""

from ml_collections import ConfigDict

from sparsejax import schedule as schedules

# Sizes of the tiny forms by kind; a field that the full form leaves out stays out.
MIXERS = {
    "attention": dict(heads=4, head_width=16),
    "latent": dict(heads=4, kv_rank=32, nope_width=16, rope_width=8, value_width=16),
    "mamba": dict(inner=128, state=8, dt_rank=8),
    "mamba2": dict(heads=8, head_width=16, state=16, chunk=32),
    "lightning": dict(heads=4, head_width=16),
    "delta": dict(heads=4, key_width=16, value_width=16, rank=16),
    "rglru": dict(inner=64, heads=4),
}
FEEDFORWARDS = {
    "gated": dict(width=128),
    "plain": dict(width=256),
    "experts": dict(experts=4, width=64, shared_width=64),
}
BYTES_AND_MASK = 257  # ids of a masked model of bytes
FEW = dict(kv_heads=2, key_heads=2, groups=2, norm_groups=2, top_k=2)  # at most so many


def rms(eps, **options):
    return dict(kind="rms", eps=eps, **options)


def layer(mixer, mlp, norm, norm_position="pre", **options):
    """One residual unit; activations are computed again in the backward pass."""
    return dict(mixer=mixer, mlp=mlp, norm=norm, norm_position=norm_position, remat=True, **options)


def attention(pattern, heads, kv_heads, head_width, rope=None, qk_norm=None, **options):
    sizes = dict(heads=heads, kv_heads=kv_heads, head_width=head_width)
    return dict(kind="attention", pattern=pattern, rope=rope, qk_norm=qk_norm, impl="auto") | sizes | options


def mamba(width, **options):
    """Mamba at its usual proportions to the stream's width."""
    sizes = dict(inner=2 * width, state=16, conv=4, dt_rank=width // 16)
    return dict(kind="mamba", dt_min=1e-3, dt_max=0.1) | sizes | options


def mamba2(heads, head_width, state, groups, **options):
    sizes = dict(heads=heads, head_width=head_width, state=state, groups=groups, conv=4)
    return dict(kind="mamba2", dt_min=1e-3, dt_max=0.1) | sizes | options


def gated(width, activation="silu", **options):
    return dict(kind="gated", width=width, activation=activation, **options)


def plain(width, activation, **options):
    return dict(kind="plain", width=width, activation=activation, **options)


def experts(count, top_k, width, **options):
    return dict(kind="experts", experts=count, top_k=top_k, width=width, activation="silu", **options)


def model(vocab, width, schedule, layers, norm, tied=False, **options):
    """The model section, computed in bfloat16."""
    ends = dict(vocab=vocab, width=width, norm=norm, tied=tied)
    return dict(schedule=schedule, layers=layers, dtype="bfloat16", scan=True) | ends | options


def choose(argument, full, length, **tiny):
    """The run of the model section `full`, on windows of `length`; of its tiny form if `argument` is "tiny".

    `tiny` are arguments of `shrink`.
    """
    if argument == "tiny":
        return make_run(shrink(full, **tiny), length=128, steps=30, batch=8, learning_rate=4e-3, warmup=5)
    if argument:
        raise ValueError(f"the argument must be tiny or nothing, got {argument!r}")
    return make_run(full, length=length, steps=100_000, batch=256, learning_rate=3e-4, warmup=2000)


def make_run(model, length, steps, batch, learning_rate, warmup):
    """All sections, with the text that CPython ships; a larger model needs `sharding` for its machine.

    A model that sees both sides finds hidden tokens again, others predict the next one.
    """
    every, objective = min(steps, 1000), "causal" if model.get("causal", True) else "masked"
    return ConfigDict(
        dict(
            model=model,
            data=dict(task="text", files="", length=length, objective=objective),
            train=dict(steps=steps, batch=batch, accumulate=1, seed=0, log_every=10, bad_loss="stop", spike=0.0),
            optimizer=dict(
                learning_rate=learning_rate,
                final_rate=0.1,
                warmup=warmup,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1,
                clip=1.0,
            ),
            checkpoint=dict(every=every, keep_last=2, keep_best=1),
            sharding=dict(data=-1, fsdp=1, tensor=1),
            eval=dict(every=every, batch=32, batches=4, sample=0),
        )
    )


def fit_cpu(config, evaluations):
    """The run in float32, unrolled, with what its backward pass needs kept; evaluated so often, and not on all text."""
    config.model.dtype = "float32"
    config.model.scan = False  # a few layers compile in seconds anyway, and run a fifth faster unrolled
    for layer in config.model.layers.values():
        layer.remat = False
    config.train.log_every = 50
    every = config.train.steps // evaluations
    config.eval = dict(every=every, batch=16, batches=8, final=48, sample=0)
    config.checkpoint = dict(every=every, keep_last=1, keep_best=0)
    return config


def shrink(full, schedule, patterns=None, **changes):
    """The tiny form of a model section: bytes, width 64, few and small heads, experts and states, in float32.

    Args:
      full: the model section.
      schedule: of the tiny form, in the layers of the full one.
      patterns: new ones by the name of the layer; the others stay as they are.
      changes: other fields of the model section.
    """
    patterns = patterns or {}
    layers = {
        name: shrink_layer(full["layers"][name], patterns.get(name))
        for name in dict.fromkeys(schedules.parse(schedule))
    }
    return full | dict(vocab=256, width=64, schedule=schedule, layers=layers, dtype="float32") | changes


def shrink_layer(layer, pattern):
    mlp = layer["mlp"]
    mlp = mlp and shrink_part(mlp, FEEDFORWARDS[mlp["kind"]])
    return layer | dict(mixer=shrink_mixer(layer["mixer"], pattern), mlp=mlp, remat=False)


def shrink_mixer(mixer, pattern):
    if mixer is None:
        return None
    if mixer["kind"] == "parallel":
        branches = mixer["branches"].items()
        return mixer | dict(branches={k: v | dict(mixer=shrink_mixer(v["mixer"], pattern)) for k, v in branches})
    changes = dict(pattern=pattern) if pattern else {}
    return shrink_part(mixer, MIXERS[mixer["kind"]]) | changes


def shrink_part(part, sizes):
    """What there is one of for each head stays so."""
    one_each = [name for name in ("kv_heads", "key_heads") if part.get(name) and part[name] == part["heads"]]
    few = {name: min(part[name], most) for name, most in FEW.items() if name in part}
    smaller = {name: size for name, size in sizes.items() if part.get(name)}
    return part | few | smaller | dict.fromkeys(one_each, sizes.get("heads"))
