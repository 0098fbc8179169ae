"""Configurations: what cannot be used is refused in one line that names the key."""

import sys
import textwrap

import pytest
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.data.probes import PROBES
from sparsejax.layers import FEEDFORWARDS, MIXERS, AttentionConfig, MambaConfig

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


def refusal(config: ConfigDict) -> str:
    with pytest.raises(ConfigError) as caught:
        configs.check(config)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str, name: str = "recipe.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def test_becomes_frozen_dataclasses(tiny_config):
    config = configs.check(tiny_config)
    assert config.model.names == ("ssm", "local", "ssm", "local", "full")
    assert isinstance(config.model.layers["ssm"].mixer, MambaConfig)
    assert isinstance(config.model.layers["local"].mixer, AttentionConfig)
    assert config.model.layers["full"].mixer.rope is None
    assert (config.train.steps, config.data.length, config.sharding.data) == (20, 64, -1)
    with pytest.raises(AttributeError):
        config.train.steps = 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trian", "trian: unknown key, did you mean 'train'?"),
        ("train.step", "train.step: unknown key, did you mean 'steps'?"),
        ("model.layer", "model.layer: unknown key, did you mean 'layers'?"),
        ("model.norm.epsilon", "model.norm.epsilon: unknown key, did you mean 'eps'?"),
        ("model.layers.ssm.remit", "model.layers.ssm.remit: unknown key, did you mean 'remat'?"),
        (f"{LOCAL}.head", f"{LOCAL}.head: unknown key, did you mean 'heads'?"),
        (f"{LOCAL}.qk_norm.kid", f"{LOCAL}.qk_norm.kid: unknown key, did you mean 'kind'?"),
        (f"{SSM}.heads", None),
    ],
)
def test_unknown_keys_at_every_depth(tiny_config, key, message):
    found = refusal(put(tiny_config, key, 1))
    assert found == message or (message is None and found.startswith(f"{key}: unknown key, did you mean "))


@pytest.mark.parametrize(
    "key",
    ["eval", "train.seed", "model.tied", "model.layers", "model.layers.ssm.mlp", "model.norm.eps", f"{SSM}.dt_min"],
)
def test_every_key_must_be_there(tiny_config, key):
    *sections, name = key.split(".")
    section = tiny_config
    for part in sections:
        section = section[part]
    del section[name]
    assert refusal(tiny_config) == f"{key}: missing"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.steps", 20.0, "an integer, got 20.0"),
        ("train.steps", "20", "an integer, got '20'"),
        ("train.steps", True, "an integer, got True"),
        ("train.steps", None, "an integer, got None"),
        ("optimizer.clip", "1", "a number, got '1'"),
        ("optimizer.clip", False, "a number, got False"),
        ("optimizer.clip", None, "a number, got None"),
        ("model.tied", 1, "true or false, got 1"),
        ("model.layers.ssm.remat", "yes", "true or false, got 'yes'"),
        ("model.dtype", 32, "text, got 32"),
        ("model.schedule", ("ssm", "full"), "text, got ('ssm', 'full')"),
        (f"{LOCAL}.rope", "10000", "a section, got '10000'"),
        ("train", 3, "a section, got 3"),
        ("train.steps", {"a": 1}, "an integer, got a section"),
        ("model.norm", "rms", "a section, got 'rms'"),
        ("model.embedding", 1, "a section, got 1"),
        ("model.layers", ["ssm"], "a section, got ['ssm']"),
        ("model.layers.local", "attention", "a section, got 'attention'"),
        (LOCAL, "attention", "a section, got 'attention'"),
    ],
)
def test_types(tiny_config, key, value, expected):
    assert refusal(put(tiny_config, key, value)) == f"{key}: expected {expected}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.width", 0, "model: width must be at least 1, got 0"),
        ("model.dtype", "float16", "model: dtype must be one of float32, bfloat16, got 'float16'"),
        ("model.norm.kind", "batch", "model.norm: kind must be one of rms, layer, none, got 'batch'"),
        ("model.schedule", "2x(ssm", "model: schedule '2x(ssm': column 1: the parenthesis opened here is never closed"),
        (
            "model.schedule",
            "ssm locl",
            "model: schedule 'ssm locl': column 5: layer 'locl' is not defined, did you mean 'local'?",
        ),
        (f"{LOCAL}.kind", "mama", f"{LOCAL}.kind: must be one of {', '.join(MIXERS)}, got 'mama'"),
        (f"{LOCAL}.kv_heads", 3, f"{LOCAL}: heads = 4 is not divisible by kv_heads = 3"),
        (f"{LOCAL}.heads", 0, f"{LOCAL}: heads, kv_heads and head_width must be at least 1"),
        (f"{LOCAL}.head_width", 7, f"{LOCAL}: rotary positions turn pairs; 1 of head_width = 7 is 7"),
        (f"{LOCAL}.rope.base", 1, f"{LOCAL}.rope: base must be above 1, got 1.0"),
        (
            f"{LOCAL}.pattern",
            "causl",
            f"{LOCAL}: pattern 'causl': column 1: unknown pattern 'causl', did you mean 'causal'?",
        ),
        (
            f"{LOCAL}.pattern",
            "per_head(causal, causal)",
            f"{LOCAL}: pattern is for 2 heads, heads = 4: 'per_head(causal, causal)'",
        ),
        (
            f"{LOCAL}.pattern",
            "window(3, 2)",
            "model: layers.local.mixer.pattern: 'window(3, 2)' sees 2 positions ahead; a model that predicts the next"
            " token needs 'causal & ...'",
        ),
        (f"{SSM}.conv", 0, f"{SSM}: inner, state, conv and dt_rank must be at least 1"),
        (f"{SSM}.dt_max", 1e-4, f"{SSM}: needs 0 < dt_min <= dt_max, got 0.001 and 0.0001"),
        (
            "model.layers.full.norm_position",
            "mid",
            "model.layers.full: norm_position must be pre, post or both, got 'mid'",
        ),
        (
            "model.layers.full.mlp.kind",
            "glu",
            f"model.layers.full.mlp.kind: must be one of {', '.join(FEEDFORWARDS)}, got 'glu'",
        ),
        (
            "model.layers.full.mlp.activation",
            "tanh",
            "model.layers.full.mlp: activation must be one of silu, gelu, gelu_tanh, relu, relu2, got 'tanh'",
        ),
        ("model.layers.full.mlp.width", 0, "model.layers.full.mlp: width must be at least 1, got 0"),
        ("train.accumulate", 3, "train: batch = 4 is not divisible by accumulate = 3"),
        ("train.bad_loss", "raise", "train: bad_loss must be one of stop, skip, got 'raise'"),
        ("optimizer.beta2", 1.0, "optimizer: needs 0 <= beta1, beta2 < 1, eps > 0 and clip > 0"),
        ("sharding.data", 0, "sharding: data must be at least 1, or -1 for all remaining devices"),
        ("data.task", "images", f"data: task must be one of text, {', '.join(PROBES)}, got 'images'"),
        ("checkpoint.every", 0, "checkpoint: every must be at least 1, got 0"),
        ("eval.batches", 0, "eval: batches must be at least 1, got 0"),
    ],
)
def test_values(tiny_config, key, value, message):
    assert refusal(put(tiny_config, key, value)) == message


@pytest.mark.parametrize("pattern", ["full", "chunk(4)", "causal | sink(3)", "globals([-1])", "causal | globals(1)"])
def test_patterns_that_see_ahead_are_refused(tiny_config, pattern):
    assert "needs 'causal & ...'" in refusal(put(tiny_config, f"{LOCAL}.pattern", pattern))


@pytest.mark.parametrize(
    "pattern", ["window(4)", "window(4) | sink(1)", "causal & full", "per_head(causal, window(1), causal, causal)"]
)
def test_patterns_that_do_not_are_fine(tiny_config, pattern):
    assert configs.check(put(tiny_config, f"{LOCAL}.pattern", pattern)).model.layers["local"].mixer.pattern == pattern


@pytest.mark.parametrize(
    ("key", "value"),
    [(f"{LOCAL}.impl", "dens"), ("model.norm.eps", -1.0), ("optimizer.learning_rate", float("nan"))],
)
def test_values_that_would_only_fail_in_the_run(tiny_config, key, value):
    assert refusal(put(tiny_config, key, value)).startswith(key.rpartition(".")[0])


def test_a_whole_number_serves_as_a_float(tiny_config):
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
    key, _, text = override.partition("=")
    configs.override(tiny_config, key, text)
    configs.check(tiny_config)
    section, *rest = key.split(".")
    value = tiny_config[section]
    for part in rest:
        value = value[part]
    assert (value, type(value)) == (expected, type(expected))
    difference = configs.difference(before, tiny_config.to_dict())
    assert difference is None or difference.startswith(f"{key} was ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "train.stepz: unknown key, did you mean 'steps'?"),
        ("trian.steps=3", "trian: unknown key, did you mean 'train'?"),
        ("model.layers.loca.remat=true", "model.layers.loca: unknown key, did you mean 'local'?"),
        ("train.steps.x=3", "train.steps: is a value, not a section"),
        ("train.steps.x.y=3", "train.steps: is a value, not a section"),
        ("sharding=1", "sharding: is a section; set one of its keys: data, fsdp, tensor"),
        ("model.norm=rms", "model.norm: is a section; set one of its keys: bias, eps, kind, offset"),
        ("train.steps", "--config.train.steps: write --config.train.steps=VALUE"),
    ],
)
def test_overrides_that_cannot_be(write, tiny_config, override, message):
    path = write(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({tiny_config.to_dict()!r})"
    )
    with pytest.raises(ConfigError) as caught:
        configs.load(path, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "train.steps: expected an integer, got 'many'"),
        ("train.steps=3.5", "train.steps: expected an integer, got 3.5"),
        ("train.steps=none", "train.steps: expected an integer, got None"),
        ("train.steps=(1, 2)", "train.steps: expected an integer, got (1, 2)"),
        ("train.steps={[]: 1}", "train.steps: expected an integer, got '{[]: 1}'"),
        ("optimizer.clip=true", "optimizer.clip: expected a number, got True"),
        ("optimizer.clip=1,5", "optimizer.clip: expected a number, got (1, 5)"),
        ("model.tied=1", "model.tied: expected true or false, got 1"),
    ],
)
def test_overrides_of_the_wrong_type(tiny_config, override, message):
    def apply():
        configs.override(tiny_config, *override.split("=", 1))
        configs.check(tiny_config)

    with pytest.raises(ConfigError) as caught:
        apply()
    assert str(caught.value) == message


def test_an_override_leaves_equal_sections_elsewhere_alone(write):
    path = write("""
        from ml_collections import ConfigDict

        def get_config():
            norm = dict(kind="rms", eps=1e-6)
            return ConfigDict(dict(first=norm, second=norm, layers=dict(a=dict(norm=norm))))
    """)
    config = configs.load(path, ["first.eps=0.5"])
    assert (config.first.eps, config.second.eps, config.layers.a.norm.eps) == (0.5, 1e-6, 1e-6)


# Files.

SMALL = """
    from ml_collections import ConfigDict

    def get_config(size="3"):
        return ConfigDict(dict(train=dict(steps=int(size), rate=0.1)))
"""


def test_a_file_with_and_without_an_argument(write):
    path = write(SMALL)
    assert configs.load(path).to_dict() == {"train": {"steps": 3, "rate": 0.1, "phases": {}}}
    assert configs.load(f"{path}:7", ["train.rate=0.2"]).to_dict() == {"train": {"steps": 7, "rate": 0.2, "phases": {}}}
    assert configs.load(path).train.steps == 3


def load_refusal(place: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configs.load(place)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    path = f"{tmp_path}/recipe.py"
    assert load_refusal(path) == f"--config: no file {path!r}"
    assert load_refusal(f"{path}:arg") == f"--config: no file {path!r}"
    assert load_refusal(str(tmp_path)) == f"--config: no file {str(tmp_path)!r}"


def test_a_file_with_a_syntax_error(write):
    path = write("x = 1\ndef get_config(:\n    pass\n")
    assert load_refusal(path).startswith(f"{path}: line 2: SyntaxError: ")


def test_a_file_that_raises(write):
    path = write("import math\n\n\ndef get_config():\n    return math.sqrt(-1)\n")
    assert load_refusal(path).startswith(f"{path}: line 5: ValueError: ")
    path = write("import nothing_of_this_name\n")
    assert load_refusal(path) == f"{path}: line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"


def test_a_message_of_several_lines_becomes_one(write):
    path = write("def get_config():\n    raise ValueError('first\\nsecond')\n")
    assert load_refusal(path).startswith(f"{path}: line 2: ValueError: first")


@pytest.mark.parametrize("name", ["recipe.py", "config.py"])  # the second is also the name of the module at work
def test_a_file_without_get_config(write, name):
    path = write("config = 1\n", name)
    assert load_refusal(path).startswith(f"{path}: ")
    assert "get_config" in load_refusal(path)
    assert not load_refusal(path).startswith(f"{path}: line")  # there is none to point at


@pytest.mark.parametrize("argument", ["", ":4"])
def test_a_get_config_with_another_signature(write, argument):
    parameter = "" if argument else "size"
    path = write(f"def get_config({parameter}): return None\n")
    assert load_refusal(path + argument).startswith(f"{path}: ")
    assert "get_config()" in load_refusal(path + argument)


@pytest.mark.parametrize("returned", ["None", "{'train': {}}", "3"])
def test_a_get_config_that_returns_no_config_dict(write, returned):
    path = write(f"def get_config(): return {returned}\n")
    assert load_refusal(path).startswith(f"{path}: ")
    assert "ConfigDict" in load_refusal(path)


def test_a_file_that_is_no_python(write):
    path = write("{}", "recipe.json")
    assert load_refusal(path).startswith(f"{path}: ")


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
    load_refusal(write("raise ValueError('no')\n"))
    assert sys.path == before


# Digests and differences.


def test_digest_is_the_same_for_the_same_configuration(tiny_config):
    def reverse(section):
        return {key: reverse(value) if isinstance(value, dict) else value for key, value in reversed(section.items())}

    digest = configs.digest(tiny_config)
    assert digest == configs.digest(ConfigDict(reverse(tiny_config.to_dict())))
    assert len(digest) == 12
    assert set(digest) <= set("0123456789abcdef")
    configs.override(tiny_config, "train.seed", "1")
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
