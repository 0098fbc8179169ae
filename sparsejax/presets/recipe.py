"""Building blocks of the presets: sections of a config, a run for a model, and the tiny form of a model."""

from ml_collections import ConfigDict

from sparsejax import schedule as schedules
from sparsejax.errors import InputError

# Sizes of tiny forms by kind. Keys that the full form omits are omitted.
MIXERS = {
    "attention": dict(heads=4, head_width=16),
    "compressed": dict(heads=4, head_width=16, query_rank=32, window=16, rope_width=8, out_rank=16),
    "latent": dict(heads=4, query_rank=32, kv_rank=32, nope_width=16, rope_width=8, value_width=16),
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
BYTES_AND_MASK = 257  # vocabulary of a masked language model of bytes
FEW = dict(kv_heads=2, key_heads=2, groups=2, top_groups=1, norm_groups=2, top_k=2)  # upper bounds


def rms(eps, **options):
    return dict(kind="rms", eps=eps, **options)


def layer(mixer, mlp, norm, norm_position="pre", **options):
    """Returns a layer that recomputes its activations in the backward pass."""
    return dict(mixer=mixer, mlp=mlp, norm=norm, norm_position=norm_position, remat="full", **options)


def attention(pattern, heads, kv_heads, head_width, rope=None, qk_norm=None, **options):
    sizes = dict(heads=heads, kv_heads=kv_heads, head_width=head_width)
    return dict(kind="attention", pattern=pattern, rope=rope, qk_norm=qk_norm, impl="auto") | sizes | options


def mamba(width, **options):
    """Returns Mamba with its usual sizes at this width of the model."""
    sizes = dict(inner=2 * width, state=16, conv=4, dt_rank=width // 16)
    return dict(kind="mamba", dt_min=1e-3, dt_max=0.1) | sizes | options


def mamba2(heads, head_width, state, groups, **options):
    sizes = dict(heads=heads, head_width=head_width, state=state, groups=groups, conv=4)
    return dict(kind="mamba2", dt_min=1e-3, dt_max=0.1) | sizes | options


def delta(heads, key_heads, width, **options):
    """Returns the gated delta rule with keys and values of one width."""
    sizes = dict(heads=heads, key_heads=key_heads, key_width=width, value_width=width)
    return dict(kind="delta", conv=4, norm_eps=1e-6) | sizes | options


def gated(width, activation="silu", **options):
    return dict(kind="gated", width=width, activation=activation, **options)


def plain(width, activation, **options):
    return dict(kind="plain", width=width, activation=activation, **options)


def experts(count, top_k, width, **options):
    return dict(kind="experts", experts=count, top_k=top_k, width=width, activation="silu", **options)


def model(vocab, width, schedule, layers, norm, tied=False, **options):
    """Returns the model section, computed in bfloat16."""
    ends = dict(vocab=vocab, width=width, norm=norm, tied=tied)
    return dict(schedule=schedule, layers=layers, dtype="bfloat16", scan=True) | ends | options


def choose(argument, full, length, **tiny):
    """Returns a run of the model section `full` on windows of `length` tokens, or of its tiny form for "tiny".

    `tiny` are the arguments of `shrink`.
    """
    if argument == "tiny":
        return make_run(shrink(full, **tiny), length=128, steps=30, batch=8, learning_rate=4e-3, warmup=5)
    check_argument(argument, "", "tiny")
    return make_run(full, length=length, steps=100_000, batch=256, learning_rate=3e-4, warmup=2000)


def check_argument(argument, *known):
    """Raises InputError if the argument of a config is none of the known ones."""
    if argument not in known:
        raise InputError("argument", f"{argument!r} is not one of {', '.join(filter(None, known))}")


def make_run(model, length, steps, batch, learning_rate, warmup):
    """Returns all sections of a run on the text that CPython ships; a large model needs a different `sharding`.

    A causal model predicts the next token, other models predict masked tokens.
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
    """Changes a run to float32 without scan and rematerialization, and to `evaluations` short evaluations."""
    config.model.dtype = "float32"
    config.model.scan = False  # a few unrolled layers compile in seconds and run a fifth faster
    for layer in config.model.layers.values():
        layer.remat = "none"
    config.train.log_every = 50
    every = config.train.steps // evaluations
    config.eval = dict(every=every, batch=16, batches=8, final=48, sample=0)
    config.checkpoint = dict(every=every, keep_last=1, keep_best=0)
    return config


def shrink(full, schedule, patterns=None, **changes):
    """Returns the tiny form of a model section: bytes, width 64, few and small heads, experts and states, in float32.

    Args:
      full: The model section.
      schedule: Schedule of the tiny form, of layers of the full form.
      patterns: New patterns by layer name.
      changes: Other keys of the model section.
    """
    patterns = patterns or {}
    layers = {
        name: shrink_layer(full["layers"][name], patterns.get(name))
        for name in dict.fromkeys(schedules.parse(schedule))
    }
    return full | dict(vocab=256, width=64, schedule=schedule, layers=layers, dtype="float32") | changes


def shrink_layer(layer, pattern):
    mlp = layer["mlp"]
    mlp = mlp and shrink_section(mlp, FEEDFORWARDS[mlp["kind"]])
    return layer | dict(mixer=shrink_mixer(layer["mixer"], pattern), mlp=mlp, remat="none")


def shrink_mixer(mixer, pattern):
    if mixer is None:
        return None
    if mixer["kind"] == "parallel":
        branches = mixer["branches"].items()
        return mixer | dict(branches={k: v | dict(mixer=shrink_mixer(v["mixer"], pattern)) for k, v in branches})
    changes = dict(pattern=pattern) if pattern else {}
    if mixer.get("indexer"):
        changes |= dict(indexer=shrink_indexer(mixer["indexer"]))
    if mixer.get("compression"):
        changes |= dict(compression=shrink_compression(mixer["compression"]))
    return shrink_section(mixer, MIXERS[mixer["kind"]]) | changes


def shrink_compression(section):
    indexer = section.get("indexer") and dict(indexer=section["indexer"] | dict(heads=8, width=16, top_k=8))
    return section | dict(ratio=min(section["ratio"], 8)) | (indexer or {})


def shrink_indexer(section):
    """Returns an indexer of 16 selected keys, or of four blocks."""
    blocks = dict(block=min(section["block"], 16), top_k=4) if section.get("block", 1) > 1 else dict(top_k=16)
    return section | dict(heads=2 if section.get("scope") == "kv_head" else 8, width=16) | blocks


def shrink_section(section, sizes):
    """Returns a section with smaller sizes; those that equal the number of heads stay equal to it."""
    per_head = [name for name in ("kv_heads", "key_heads") if section.get(name) and section[name] == section["heads"]]
    few = {name: min(section[name], most) for name, most in FEW.items() if name in section}
    smaller = {name: size for name, size in sizes.items() if section.get(name)}
    return section | few | smaller | dict.fromkeys(per_head, sizes.get("heads"))
