"""Configurations: an invalid one is rejected in one line that names the key."""

import json
import sys
import textwrap

import pytest
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.data.probes import PROBES
from sparsejax.errors import InputError
from sparsejax.layers import AttentionConfig, LightningConfig, MambaConfig
from sparsejax.overrides import flatten, parse_overrides, write_overrides
from tests.messages import check_message, rejects

pytestmark = pytest.mark.quick

LOCAL = "model.layers.local.mixer"
SSM = "model.layers.ssm.mixer"


def put(config: ConfigDict, key: str, value) -> ConfigDict:
    """Sets a key, new or of another type than before."""
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    with section.unlocked():
        if name in section:
            del section[name]  # a ConfigDict would convert the new value to the type of the old
        section[name] = value
    return config


def reject(config: ConfigDict, key: str) -> None:
    with rejects(ConfigError, key) as caught:
        configs.check(config)
    assert caught.value.argument == key


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str, name: str = "recipe.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def test_a_config_becomes_frozen_dataclasses(tiny_config):
    config = configs.check(tiny_config)
    assert config.model.names == ("ssm", "local", "ssm", "local", "full")
    assert isinstance(config.model.layers["ssm"].mixer, MambaConfig)
    assert isinstance(config.model.layers["local"].mixer, AttentionConfig)
    assert config.model.layers["full"].mixer.rope is None
    assert (config.train.steps, config.data.length, config.sharding.data) == (20, 64, -1)
    with pytest.raises(AttributeError):
        config.train.steps = 1


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"),
        ("train.step", "steps"),
        ("model.layer", "layers"),
        ("model.norm.epsilon", "eps"),
        ("model.layers.ssm.remit", "remat"),
        (f"{LOCAL}.head", "heads"),
        (f"{LOCAL}.qk_norm.kid", "kind"),
        (f"{SSM}.heads", "inner, state, conv"),
    ],
)
def test_unknown_keys_at_every_depth(tiny_config, key, nearest):
    with pytest.raises(ConfigError) as caught:
        configs.check(put(tiny_config, key, 1))
    assert caught.value.argument == key
    assert nearest in caught.value.problem


@pytest.mark.parametrize(
    "key",
    ["eval", "train.seed", "model.tied", "model.layers", "model.layers.ssm.mlp", "model.norm.eps", f"{SSM}.dt_min"],
)
def test_missing_keys(tiny_config, key):
    *sections, name = key.split(".")
    section = tiny_config
    for part in sections:
        section = section[part]
    del section[name]
    reject(tiny_config, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 20.5),
        ("train.steps", float("inf")),
        ("train.steps", 2**63),
        ("train.steps", "20"),
        ("train.steps", True),
        ("train.steps", None),
        ("optimizer.clip", "1"),
        ("optimizer.clip", False),
        ("optimizer.clip", 2**1024),
        ("optimizer.learning_rate", None),
        ("model.tied", 1),
        ("model.layers.ssm.remat", "yes"),
        ("model.dtype", 32),
        ("model.schedule", ("ssm", "full")),
        (f"{LOCAL}.rope", "10000"),
        ("train", 3),
        ("train.steps", {"a": 1}),
        ("model.norm", "rms"),
        ("model.embedding", 1),
        ("model.layers", ["ssm"]),
        ("model.layers.local", "attention"),
        (LOCAL, "attention"),
        ("train.phases", {"long": 3}),
        ("train.phases", {"long": {"start": 3, "set": ["data.length=8"]}}),
        ("eval.also", {"long": ("data.length=8",)}),
    ],
)
def test_types(tiny_config, key, value):
    with rejects(ConfigError, key):
        configs.check(put(tiny_config, key, value))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.width", 0, "model.width"),
        ("model.dtype", "float16", "model.dtype"),
        ("model.norm.kind", "batch", "model.norm.kind"),
        ("model.schedule", "2x(ssm", "model.schedule"),
        ("model.schedule", "ssm locl", "model.schedule"),
        (f"{LOCAL}.kind", "mama", f"{LOCAL}.kind"),
        (f"{LOCAL}.kind", ["mamba"], f"{LOCAL}.kind"),
        (f"{LOCAL}.kv_heads", 3, f"{LOCAL}.heads"),
        (f"{LOCAL}.heads", 0, f"{LOCAL}.heads"),
        (f"{LOCAL}.head_width", 7, f"{LOCAL}.rope"),
        (f"{LOCAL}.rope.base", 1, f"{LOCAL}.rope.base"),
        (f"{LOCAL}.pattern", "causl", f"{LOCAL}.pattern"),
        (f"{LOCAL}.pattern", "per_head(causal, causal)", f"{LOCAL}.pattern"),
        (f"{LOCAL}.pattern", "window(3, 2)", f"{LOCAL}.pattern"),
        (f"{LOCAL}.impl", "dens", f"{LOCAL}.impl"),
        (f"{SSM}.conv", 0, f"{SSM}.conv"),
        (f"{SSM}.dt_max", 1e-4, f"{SSM}.dt_m"),
        ("model.norm.eps", -1.0, "model.norm.eps"),
        ("model.layers.full.norm_position", "mid", "model.layers.full.norm_position"),
        ("model.layers.full.mlp.kind", "glu", "model.layers.full.mlp.kind"),
        ("model.layers.full.mlp.activation", "tanh", "model.layers.full.mlp.activation"),
        ("model.layers.full.mlp.width", 0, "model.layers.full.mlp.width"),
        ("train.accumulate", 3, "train.batch"),
        ("train.bad_loss", "raise", "train.bad_loss"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate"),
        ("optimizer.beta2", 1.0, "optimizer.beta2"),
        ("optimizer.clip", 0.0, "optimizer.clip"),
        ("sharding.data", 0, "sharding.data"),
        ("data.task", "images", "data.task"),
        ("data.prefix", -1, "data.prefix"),
        ("checkpoint.every", 0, "checkpoint.every"),
        ("checkpoint.every", 15, "checkpoint.keep_best"),
        ("eval.batches", 0, "eval.batches"),
        ("eval.stride", 100, "eval.stride"),
        ("eval.also", {"a/b": {}}, "eval.also"),
    ],
)
def test_values(tiny_config, key, value, named):
    if key == "data.prefix":
        put(tiny_config, "data.objective", "prefix")
    with rejects(ConfigError, named):
        configs.check(put(tiny_config, key, value))


@pytest.mark.parametrize("pattern", ["full", "chunk(4)", "causal | sink(3)", "globals([-1])", "causal | globals(1)"])
def test_a_causal_model_rejects_a_pattern_that_attends_to_later_keys(tiny_config, pattern):
    reject(put(tiny_config, f"{LOCAL}.pattern", pattern), f"{LOCAL}.pattern")


@pytest.mark.parametrize(
    "pattern", ["window(4)", "window(4) | sink(1)", "causal & full", "per_head(causal, window(1), causal, causal)"]
)
def test_a_causal_model_accepts_causal_patterns(tiny_config, pattern):
    assert configs.check(put(tiny_config, f"{LOCAL}.pattern", pattern)).model.layers["local"].mixer.pattern == pattern


# Globals outside of the sequence, in every section that has a mixer.

OUTSIDE = "causal & globals([999])"


def attention(pattern):
    sizes = {"heads": 4, "kv_heads": 4, "head_width": 8}
    return {"kind": "attention", "pattern": pattern, "rope": None, "qk_norm": None, "impl": "auto"} | sizes


def test_a_pattern_that_does_not_fit_the_length_is_rejected(tiny_config):
    reject(put(tiny_config, f"{LOCAL}.pattern", OUTSIDE), f"{LOCAL}.pattern")


def test_a_branch_that_does_not_fit_the_length_is_rejected(tiny_config):
    branches = {"near": {"mixer": attention("causal")}, "far": {"mixer": attention(OUTSIDE)}}
    reject(put(tiny_config, LOCAL, {"kind": "parallel", "branches": branches}), f"{LOCAL}.branches.far.mixer.pattern")


def test_a_shared_block_that_does_not_fit_the_length_is_rejected(tiny_config):
    mlp = {"kind": "plain", "width": 16, "activation": "relu"}
    mixer = {name: value for name, value in attention(OUTSIDE).items() if name != "kind"}
    put(tiny_config, "model.shared", {"block": {"mixer": mixer, "mlp": mlp, "norm": None}})
    put(tiny_config, "model.layers.full.side", {"shared": "block"})
    reject(tiny_config, "model.shared.block.mixer.pattern")


# The probe of `data.task`.


@pytest.mark.parametrize(
    ("key", "value"),
    [("tied", True), ("head", {"activation": "gelu"}), ("head", {"norm": {"kind": "rms", "eps": 1e-6}})],
)
def test_the_head_of_a_reversible_model_reads_both_streams(tiny_config, key, value):
    put(tiny_config, "model.reversible", True)
    put(tiny_config, "model.tied", False)
    configs.check(tiny_config)
    put(tiny_config, f"model.{key}", value)
    reject(tiny_config, f"model.{key}" if key == "tied" else f"model.head.{next(iter(value))}")


def test_a_task_decides_the_keys_of_its_probe(tiny_config):
    put(tiny_config, "data.task", "mqar")
    put(tiny_config, "data.length", 32)
    put(tiny_config, "data.probe", {"length": 32, "vocab": 64})
    assert configs.check(tiny_config).data.probe == PROBES["mqar"](length=32, vocab=64)


def test_a_task_without_keys_has_the_defaults_of_its_probe(tiny_config):
    put(tiny_config, "data.task", "mqar")
    put(tiny_config, "model.vocab", 8192)
    assert configs.check(tiny_config).data.probe == PROBES["mqar"]()


@pytest.mark.parametrize(
    ("task", "probe", "key"),
    [
        ("mqar", {"pair": 2}, "data.probe.pair"),
        ("mqar", {"pairs": 0}, "data.probe.pairs"),
        ("mqar", {"length": 32}, "data.length"),
        ("mqar", {"length": 64, "vocab": 512}, "model.vocab"),
        ("mqar", 3, "data.probe"),
        ("text", {"pairs": 2}, "data.probe"),
        ("nothing", None, "data.task"),
    ],
)
def test_a_probe_that_does_not_fit_is_rejected(tiny_config, task, probe, key):
    put(tiny_config, "data.task", task)
    reject(put(tiny_config, "data.probe", probe), key)


@pytest.mark.parametrize(("old", "new"), [(True, "full"), (False, "none"), ("true", "full"), ("dots", "dots")])
def test_rematerialization_was_a_boolean(write, tiny_config, old, new):
    """In files, in records, which are completed, and in the sections that phases set."""
    config = tiny_config.to_dict()
    config["model"]["layers"]["ssm"]["remat"] = old
    config["train"]["phases"] = {"late": {"start": 3, "set": {"model": {"layers": {"local": {"remat": old}}}}}}
    completed = configs.complete(config)
    assert completed["model"]["layers"]["ssm"]["remat"] == new
    checked = configs.check(ConfigDict(config))
    assert checked.model.layers["ssm"].remat == new
    assert configs.check_phase(ConfigDict(config), "late").model.layers["local"].remat == new
    file = write(f"def get_config(): return {config}")
    loaded = configs.load(file, {"model.layers.full.remat": old})
    assert loaded.model.layers.ssm.remat == new
    assert configs.check(loaded).model.layers["full"].remat == new


def test_an_integer_is_a_float(tiny_config):
    rate = configs.check(put(tiny_config, "optimizer.learning_rate", 1)).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)


# Overrides.


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=30", 30),
        ("train.spike=2", 2.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("model.tied=False", False),
        ("model.tied=true", True),
        (f"{LOCAL}.rope=none", None),
        ("model.layers.local.mixer.rope.base=500000.0", 500_000.0),
        ("model.schedule=3x(ssm) full", "3x(ssm) full"),
        (f"{LOCAL}.pattern=causal & globals([0, 3])", "causal & globals([0, 3])"),
        ("data.files=7", "7"),
        ("data.files=a=b", "a=b"),
        ("data.files=", ""),
        ("data.files=none", "none"),
    ],
)
def test_overrides_set_one_key(tiny_config, override, expected):
    before = tiny_config.to_dict()
    (key,) = overrides = parse_overrides([override])
    configs.override(tiny_config, overrides)
    configs.check(tiny_config)
    value = flatten(tiny_config.to_dict()).get(key)
    assert (value, type(value)) == (expected, type(expected))
    difference = configs.difference(before, tiny_config.to_dict())
    assert difference is None or difference.startswith(f"{key} was ")


def test_overrides_are_values_or_their_texts():
    overrides = {"train.steps": 30, "optimizer.clip": None, "model.schedule": "2x(ssm)", "sharding.data": (1, 2)}
    texts = ["train.steps=30", "optimizer.clip=None", "model.schedule=2x(ssm)", "sharding.data=(1, 2)"]
    assert write_overrides(overrides) == texts
    assert write_overrides(parse_overrides(texts)) == texts


def test_a_text_without_a_value_is_rejected():
    with rejects(InputError, "train.steps"):
        parse_overrides(["train.steps"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.stepz=3", "train.stepz"),
        ("trian.steps=3", "trian"),
        ("model.layers.loca.remat=true", "model.layers.loca"),
        ("train.steps.x=3", "train.steps"),
        ("train.steps.x.y=3", "train.steps"),
        ("sharding=1", "sharding"),
        ("model.norm=rms", "model.norm"),
        ("train.phases=1", "train.phases"),
        ("eval.also.long.data.lenght=8", "eval.also.long.data.lenght"),
        ("train.phases.long.set.lenght=8", "train.phases.long.set.lenght"),
    ],
)
def test_overrides_of_unknown_keys_and_sections(write, tiny_config, override, key):
    path = write(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({tiny_config.to_dict()!r})"
    )
    with rejects(ConfigError, key) as caught:
        configs.load(path, parse_overrides([override]))
    assert caught.value.argument == key


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=many",
        "train.steps=3.5",
        "train.steps=1e400",
        "train.steps=none",
        "train.steps=(1, 2)",
        "train.steps={[]: 1}",
        "optimizer.clip=true",
        "optimizer.clip=1,5",
        "model.tied=1",
    ],
)
def test_overrides_of_the_wrong_type(tiny_config, override):
    (key,) = overrides = parse_overrides([override])
    configs.override(tiny_config, overrides)
    reject(tiny_config, key)


def test_a_task_is_set_before_the_keys_of_its_probe(write, tiny_config):
    path = write(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({tiny_config.to_dict()!r})"
    )
    config = configs.load(path, {"data.probe.pairs": "2", "data.task": "mqar"})
    assert (config.data.probe.pairs, config.data.probe.length) == (2, 64)
    with rejects(ConfigError, "data.probe"):
        configs.load(path, {"data.probe.pairs": 2})


# References, placeholders and scalars of NumPy.

REFERENCES = """
    from ml_collections import ConfigDict
    from ml_collections.config_dict import FieldReference, placeholder, required_placeholder

    def get_config():
        config = ConfigDict({tiny}, type_safe=False)
        config.model.width = width = FieldReference(32)
        for layer in config.model.layers.values():
            layer.mlp.width = width * 4
        {lines}
        return config
"""


@pytest.fixture
def references(write, tiny_config):
    """Writes the tiny configuration with `mlp.width = 4 * width` in every layer and other lines; returns its path."""
    return lambda *lines: write(REFERENCES.format(tiny=tiny_config.to_dict(), lines="\n        ".join(lines)))


def test_a_value_computed_from_a_reference_follows_an_override(references):
    path = references()
    for overrides, widths in (({}, (32, 128)), ({"model.width": "64"}, (64, 256))):
        config = configs.load(path, overrides)
        assert (config.model.width, config.model.layers.full.mlp.width) == widths
        configs.check(config)
    config = configs.load(path, {"model.layers.full.mlp.width": 48, "model.width": 64})
    assert [config.model.layers[name].mlp.width for name in ("ssm", "full")] == [256, 48]


@pytest.mark.parametrize("make", ["config.lock()", "config = FrozenConfigDict(config)", "config = config.to_dict()"])
def test_other_containers_of_a_configuration(references, make):
    path = references("from ml_collections import FrozenConfigDict", make)
    config = configs.load(path, {"train.steps": 7, "model.layers.ssm.mlp.width": 8})
    assert (config.train.steps, config.model.layers.ssm.mlp.width) == (7, 8)
    configs.check(config)


def test_references_in_phases_and_evaluations_follow(references):
    path = references(
        "config.data.length = length = FieldReference(64)",
        "config.eval.stride = length // 2",
        "config.train.phases = dict(long=dict(start=10, set=dict(data=dict(length=length * 2))))",
        "config.eval.also = dict(short=dict(data=dict(length=32)))",
    )
    config = configs.load(path, {"data.length": 40})
    assert config.eval.stride == 20
    assert config.train.phases.long.set.to_dict() == {"data": {"length": 80}, "eval": {"stride": 40}}
    assert config.eval.also.short.to_dict() == {"data": {"length": 32}, "eval": {"stride": 16}}
    assert configs.check_phase(config, "long").eval.stride == 40
    config = configs.load(path, {"train.phases.long.set.eval.stride": 8})
    assert config.train.phases.long.set.eval.stride == 8


def test_a_reference_that_a_phase_cannot_set_is_named(references):
    path = references(
        "config.data.length = length = FieldReference(64)",
        "config.train.log_every = length // 8",
        "config.train.phases = dict(long=dict(start=10, set=dict(data=dict(length=128))))",
    )
    with rejects(ConfigError, "train.log_every"):
        configs.load(path)


def test_placeholders(references):
    path = references(
        "config.train.steps = required_placeholder(int)",
        "config.train.log_every = placeholder(int)",
        "config.model.dropout = placeholder(float)",
        "config.data.files = placeholder(str)",
        "config.checkpoint.every = config.train.get_ref('log_every') * 2",
        "config.eval.every = config.checkpoint.get_ref('every')",
    )
    with rejects(ConfigError, "train.steps") as caught:
        configs.load(path)
    assert caught.value.argument == "train.steps"
    texts = {"train.steps": "40", "train.log_every": "10", "data.files": "7"}
    with rejects(ConfigError, "model.dropout"):
        configs.check(configs.load(path, texts))
    config = configs.load(path, texts | {"model.dropout": "0"})
    values = config.checkpoint.every, config.eval.every, config.data.files, config.model.dropout
    assert values == (20, 20, "7", 0.0)
    configs.check(config)


def test_a_reference_that_fails_is_named(references):
    path = references("config.eval.every = width // (width - 16)")
    assert configs.load(path, {"model.width": 48}).eval.every == 1
    with rejects(ConfigError, "eval.every"):
        configs.load(path, {"model.width": 16})


def test_scalars_of_numpy_are_python_values(references):
    path = references(
        "import numpy as np, pathlib",
        "config.train.steps = np.int64(30)",
        "config.model.dropout = np.float32(0.25)",
        "config.model.tied = np.bool_(False)",
        "config.model.dtype = np.str_('bfloat16')",
        "config.train.seed = np.array(3)",
        "config.optimizer.warmup = 3e0",
        "config.data.files = pathlib.Path('a.txt')",
        "config.model.embedding = dict(axial=dict(shape=(8, 8), widths=(np.int32(16), np.uint8(16))))",
    )
    config = configs.load(path, {"eval.sample": sys.modules["numpy"].int64(5), "train.batch": "4e0"})
    json.dumps(config.to_dict())
    values = flatten(config.to_dict())
    expected = {
        "train.steps": 30,
        "model.dropout": 0.25,
        "model.tied": False,
        "model.dtype": "bfloat16",
        "train.seed": 3,
        "optimizer.warmup": 3,
        "data.files": "a.txt",
        "eval.sample": 5,
        "train.batch": 4,
        "model.embedding.axial.widths": (16, 16),
    }
    for key, value in expected.items():
        assert (values[key], type(values[key])) == (value, type(value)), key
    configs.check(config)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("config.train.steps = np.arange(3)", "train.steps"),
        ("config.model.embedding = dict(axial=dict(shape=(np.ones(2), 1)))", "model.embedding.axial.shape[0]"),
        ("config.model = {1: 2}", "model"),
        ("config.model = {None: 2}", "model"),
        ("config.model = config.model.to_dict() | {'a.b': 1}", ""),
        ("config.train.steps = nested(100)", "train.steps"),
        ("config.train.steps = nested(5000)", ""),
        ("config.train.steps = nested(100, lambda x: {'a': x})", "train.steps.a"),
        ("config.train.steps = {'a': 1}", "train.steps"),
        ("config.train.steps = -(10**5000)", "train.steps"),
        ("config.optimizer.clip = 10**5000", ""),
        ("config.train.steps = [10**5000]", "train.steps"),
        ("config.model.layers.full.remat = {1, 2}", "model.layers.full.remat"),
        ("config.model.layers.full.remat = b'x' * 1000", "model.layers.full.remat"),
    ],
)
def test_values_that_no_configuration_holds(references, line, key):
    nested = "nested = lambda n, wrap=lambda x: [x]: wrap(nested(n - 1, wrap)) if n else []"
    path = references("import numpy as np", nested, line)
    with pytest.raises(ConfigError) as caught:
        configs.check(configs.load(path))
    message = str(caught.value).removeprefix(path)
    assert len(message) < 400
    assert key in message
    assert "\n" not in message


# Overrides of kinds and of sections that are none.


def test_a_new_kind_keeps_common_keys_and_drops_the_others(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    configs.override(config, {f"{LOCAL}.kind": "lightning", "model.layers.ssm.mlp.kind": "plain"})
    mixer = configs.check(config).model.layers["local"].mixer
    assert (type(mixer), mixer.heads, mixer.head_width) == (LightningConfig, 4, 8)
    assert configs.check(config).model.layers["ssm"].mlp.width == 64
    configs.override(config, parse_overrides([f"{LOCAL}.chunk=32", f"{LOCAL}.heads=2", f"{LOCAL}.kind=lightning"]))
    assert (config.model.layers.local.mixer.chunk, config.model.layers.local.mixer.heads) == (32, 2)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"{LOCAL}.kind=mamba"], f"{LOCAL}.kind"),
        ([f"{LOCAL}.kind=mamba", f"{LOCAL}.inner=64"], f"{LOCAL}.kind"),
        ([f"{LOCAL}.kind=mambo"], f"{LOCAL}.kind"),
        (["model.layers.ssm.mlp.kind=experts"], "model.layers.ssm.mlp.kind"),
        ([f"{LOCAL}.kind=lightning", f"{LOCAL}.kv_heads=2"], f"{LOCAL}.kv_heads"),
        ([f"{LOCAL}.kind=lightning", f"{LOCAL}.heads=0"], f"{LOCAL}.heads"),
        (["model.layers.ssm.mixer=none", f"{SSM}.heads=4"], SSM),
        (["data.probe.pairs=3"], "data.probe"),
    ],
)
def test_an_error_after_a_new_kind_names_a_key_that_was_set(tiny_config, overrides, named):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    with rejects(ConfigError, named) as caught:
        configs.override(config, parse_overrides(overrides))
        configs.check(config)
    assert caught.value.argument == named


def test_kinds_in_evaluations(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    texts = [f"eval.also.a.{LOCAL}.chunk=32", f"eval.also.a.{LOCAL}.kind=lightning"]
    configs.override(config, parse_overrides(texts))
    assert configs.check_evaluation(config, "a").model.layers["local"].mixer.chunk == 32


def test_a_key_of_a_section_that_is_none_adds_the_section(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    del config.train.steps
    overrides = [
        "model.layers.full.mixer.rope.base=100",
        "model.head.norm.kind=rms",
        "model.head.norm.eps=1e-5",
        "model.head.activation=gelu",
        "train.steps=30",
    ]
    configs.override(config, parse_overrides(overrides))
    checked = configs.check(config)
    assert checked.model.layers["full"].mixer.rope.base == 100
    assert (checked.model.head.norm.eps, checked.train.steps) == (1e-5, 30)
    configs.override(config, {"model.layers.ssm.mlp": "none"})
    overrides = [f"model.layers.ssm.mlp.{text}" for text in ("kind=gated", "width=16", "activation=silu")]
    configs.override(config, parse_overrides(overrides))
    assert configs.check(config).model.layers["ssm"].mlp.width == 16


def test_an_optional_value_is_turned_off(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    config.model.head.activation = "gelu"
    configs.override(config, parse_overrides(["optimizer.clip=none", "model.head.activation=None"]))
    checked = configs.check(config)
    assert (checked.optimizer.clip, checked.model.head.activation) == (None, None)


# Phases and evaluations.


def test_a_phase_is_added_by_its_keys(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    texts = [
        "train.phases.long.start=10",
        "train.phases.long.set.data.length=32",
        f"train.phases.long.set.{LOCAL}.impl=1",
    ]
    configs.override(config, parse_overrides(texts[:2]))
    (phase,) = configs.check(config).train.phases.values()
    assert (phase.start, phase.set) == (10, {"data.length": 32})
    assert configs.check_phase(config, "long").data.length == 32
    configs.override(config, parse_overrides(texts[2:]))
    with rejects(ConfigError, f"train.phases.long.set.{LOCAL}.impl"):
        configs.check(config)


def test_an_evaluation_is_added_by_its_keys_and_builds_on_the_last_phase(tiny_config):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    texts = ["train.phases.long.start=10", "train.phases.long.set.data.length=32", "eval.also.all.model.schedule=full"]
    configs.override(config, parse_overrides(texts))
    assert configs.check(config).eval.also == {"all": {"model.schedule": "full"}}
    evaluation = configs.check_evaluation(config, "all")
    assert (evaluation.data.length, evaluation.model.schedule) == (32, "full")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.phases.long.set.train.seed=1", "train.phases.long.set.train.seed"),
        ("train.phases.long.set.train.batch=0", "train.phases.long.set.train.batch"),
        ("train.phases.long.strat=0", "train.phases.long.strat"),
        ("train.phases.long.start=20", "train.phases.long.start"),
        ("train.phases.other.start=10", "train.phases"),
        ("train.phases.other.set.train.batch=2", "train.phases.other.start"),
        ("train.phases.base.start=1", "train.phases.base"),
        ("eval.also.a.train.seed=1", "eval.also.a.train.seed"),
        ("eval.also.a.eval.batch=0", "eval.also.a.eval.batch"),
        ("eval.also.a=1", "eval.also.a"),
    ],
)
def test_phases_and_evaluations_that_do_not_fit_are_rejected(tiny_config, override, key):
    config = ConfigDict(configs.complete(tiny_config.to_dict()))
    configs.override(config, {"train.phases.long.start": 10} | parse_overrides([override]))
    reject(config, key)


def test_an_override_leaves_equal_sections_elsewhere_alone(write):
    path = write("""
        from ml_collections import ConfigDict

        def get_config():
            norm = dict(kind="rms", eps=1e-6)
            return ConfigDict(dict(first=norm, second=norm, layers=dict(a=dict(norm=norm))))
    """)
    config = configs.load(path, {"first.eps": 0.5})
    assert (config.first.eps, config.second.eps, config.layers.a.norm.eps) == (0.5, 1e-6, 1e-6)


# Files.

SMALL = """
    from ml_collections import ConfigDict

    def get_config(size="3"):
        return ConfigDict(dict(train=dict(steps=int(size), rate=0.1)))
"""


def test_a_file_with_and_without_an_argument(write):
    path = write(SMALL)
    for source, overrides, values in ((path, {}, (3, 0.1)), (f"{path}:7", {"train.rate": 0.2}, (7, 0.2))):
        config = configs.load(source, overrides)
        assert (config.train.steps, config.train.rate) == values
    assert configs.load(path).train.steps == 3


@pytest.mark.parametrize(
    ("source", "resolved"),
    [
        ("recipe.py", "{folder}/recipe.py"),
        ("../recipe.py:tiny", "{parent}/recipe.py:tiny"),
        ("preset:jamba", "preset:jamba"),
        ("preset:jamba:tiny", "preset:jamba:tiny"),
    ],
)
def test_the_source_of_a_configuration_resolves_to_an_absolute_path(source, resolved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.resolve_source(source) == resolved.format(folder=tmp_path, parent=tmp_path.parent)


def load_error(source: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        configs.load(source)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_a_missing_file(tmp_path):
    for source in (f"{tmp_path}/recipe.py", f"{tmp_path}/recipe.py:argument", str(tmp_path), "jamba:tiny"):
        error = load_error(source)
        assert error.argument == "config"
        check_message(str(error))


# Of these errors the position is checked; the text is Python's.


def test_colons_in_the_path_of_a_file(write, tmp_path, monkeypatch):
    path = write(SMALL, "a:b.py")
    assert configs.split_source(path) == (path, "")
    assert configs.load(f"{path}:7").train.steps == 7
    (tmp_path / "c:d").mkdir()
    assert configs.load(f"{write(SMALL, 'c:d/recipe.py')}:4").train.steps == 4
    assert configs.split_source("C:\\runs\\recipe.py:mini:8") == ("C:\\runs\\recipe.py", "mini:8")
    assert configs.split_source("x" * 5000) == ("x" * 5000, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.split_source("~/a:b.py:7") == (path, "7")


def test_a_file_with_a_syntax_error(write):
    path = write("x = 1\ndef get_config(:\n    pass\n")
    assert load_error(path).argument == f"{path}: line 2"


def test_a_file_that_raises(write):
    path = write("import math\n\n\ndef get_config():\n    return math.sqrt(-1)\n")
    assert load_error(path).argument == f"{path}: line 5"
    path = write("import nothing_of_this_name\n")
    error = load_error(path)
    assert error.argument == f"{path}: line 1"
    assert "ModuleNotFoundError" in error.problem


def test_the_line_of_a_file_in_the_current_folder(write, tmp_path, monkeypatch):
    write("def get_config():\n    return 1 / 0\n", "own.py")
    monkeypatch.chdir(tmp_path)
    assert load_error("own.py").argument == "own.py: line 2"


def test_a_message_of_several_lines_becomes_one(write):
    path = write("def get_config():\n    raise ValueError('first\\nsecond')\n")
    error = load_error(path)
    assert (error.argument, error.problem) == (f"{path}: line 2", "ValueError: first second")


@pytest.mark.parametrize("name", ["recipe.py", "config.py"])  # the second is also the name of the package at work
def test_a_file_without_get_config(write, name):
    path = write("config = 1\n", name)
    error = load_error(path)
    assert error.argument == path  # without a line
    assert "get_config" in error.problem


@pytest.mark.parametrize("argument", ["", ":4"])
def test_a_get_config_with_another_signature(write, argument):
    parameter = "" if argument else "size"
    path = write(f"def get_config({parameter}): return None\n")
    error = load_error(path + argument)
    assert error.argument == path
    assert "get_config()" in error.problem


@pytest.mark.parametrize("returned", ["None", "[('train', {})]", "3"])
def test_a_get_config_that_returns_no_config_dict(write, returned):
    path = write(f"def get_config(): return {returned}\n")
    error = load_error(path)
    assert error.argument == path
    check_message(error.problem)


def test_a_file_that_is_not_python(write):
    path = write("{}", "recipe.json")
    assert load_error(path).argument == path


def test_a_file_imports_from_its_own_folder(tmp_path):
    for folder, steps in (("first", 1), ("second", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_steps.py").write_text(f"STEPS = {steps}\n")
        (tmp_path / folder / "recipe.py").write_text(
            "from ml_collections import ConfigDict\n"
            "from shared_steps import STEPS\n"
            "def get_config(): return ConfigDict({'steps': STEPS})\n"
        )
    assert [configs.load(f"{tmp_path}/{folder}/recipe.py").steps for folder in ("first", "second")] == [1, 2]


def test_loading_leaves_the_search_path_alone(write):
    before = list(sys.path)
    configs.load(write(SMALL))
    load_error(write("raise ValueError('no')\n"))
    assert sys.path == before


# Digests and differences.


def test_digest_is_the_same_for_the_same_configuration(tiny_config):
    def reverse(section):
        return {key: reverse(value) if isinstance(value, dict) else value for key, value in reversed(section.items())}

    digest = configs.digest(tiny_config)
    assert digest == configs.digest(ConfigDict(reverse(tiny_config.to_dict())))
    assert len(digest) == 12
    assert set(digest) <= set("0123456789abcdef")
    configs.override(tiny_config, {"train.seed": 1})
    assert configs.digest(tiny_config) != digest


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({}, {}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b was 2, is 3"),
        ({"a": {"b": {"c": "x"}}, "d": 1}, {"a": {"b": {"c": "y"}}, "d": 2}, "a.b.c was 'x', is 'y'"),
        ({"a": {"b": 1}}, {"a": {}}, "a.b is only in the old one"),
        ({"a": {}}, {"a": {"b": 1}}, "a.b is only in this config"),
        ({"a": {"b": 1}}, {"a": 2}, "a was {'b': 1}, is 2"),
        ({"b": 1, "a": 2}, {"a": 3, "b": 4}, "b was 1, is 4"),
        ({"a": None}, {"a": 0}, "a was None, is 0"),
        ({"a": {"b": 1}, "c": 1}, {"a": {"b": 1}, "c": {}}, "c was 1, is {}"),
    ],
)
def test_difference_names_the_first_key(old, new, expected):
    assert configs.difference(old, new) == expected
