"""The certificate of small models, and of mixers that do not do what they state."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax import cli, layers
from sparsejax import config as configs
from sparsejax.check import CheckFailed, check_model
from sparsejax.check.reduce import MAX_PARAMETERS, choose_length, reduce
from sparsejax.model import Functional
from sparsejax.workdir import Workdir, write_json
from tests.check.models import MIXERS, build


@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=() if name == "pinned" else pytest.mark.nightly) for name in MIXERS]
)
def test_no_false_alarm(mixer):
    certificate = check_model(build(mixer), 150)
    assert certificate.passed, list(certificate.failures)
    assert not certificate.reduced
    assert {finding.name for finding in certificate.findings if finding.passed} >= {
        "causality",
        "receptive field of mix",
        "documents",
        "decoding",
        "scan",
        "parameters",
        "cache bytes",
    }


class Stateless(layers.Mixer):
    """A mixer of users: a mean over positions that `weigh` selects."""

    def __init__(self, config, stream, rngs):
        super().__init__(config, stream, rngs)
        self.out = nnx.Param(jnp.eye(stream.width))

    def __call__(self, x, context=layers.EMPTY):
        return self.mix(x) @ self.out[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircularConfig(layers.MixerConfig):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetfulConfig(layers.MixerConfig):
    pass


@pytest.fixture
def leaking(registries):
    @layers.register("circular", CircularConfig)
    class Circular(Stateless):
        def mix(self, x):
            return x + jnp.roll(x, 1, axis=1)

    @layers.register("forgetful", ForgetfulConfig)
    class Forgetful(Stateless):
        def mix(self, x):
            return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("circular", r"causality: the logits at position 0 change by up to \d.* with the tokens from position \d+ on"),
        ("forgetful", r"documents: other tokens in document 1 change the logits at position \d+ .*tokens\.segments"),
    ],
)
def test_a_leaking_mixer_is_refused_with_its_position(leaking, kind, message):
    certificate = check_model(build({"kind": kind}), 24)
    with pytest.raises(CheckFailed, match=message):
        certificate.require()


def test_a_large_model_is_checked_in_a_copy():
    released = configs.check(configs.load("preset:jamba", {})).model
    copy, note = reduce(released)
    assert "parameters" in note
    assert Functional(copy).size < MAX_PARAMETERS < Functional(released).size
    assert copy.names == released.names
    assert copy.connectivity == released.connectivity
    assert [type(layer.mixer) for layer in copy.layers.values()] == [
        type(layer.mixer) for layer in released.layers.values()
    ]


@pytest.mark.parametrize(
    ("pattern", "edge"),
    [("causal & window(300)", 300), ("causal & chunk(500)", 500), ("causal & (window(20) | sink(4))", 20)],
)
def test_the_length_crosses_every_edge(pattern, edge):
    config = build(MIXERS["causal"] | {"pattern": pattern})
    assert choose_length(config) > max(edge + 64, 130)
    assert choose_length(config, 40) == 40


LEAK = (
    "import dataclasses\n"
    "import jax.numpy as jnp\n"
    "from sparsejax import config, layers\n"
    "from sparsejax.presets import recipe\n"
    "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
    "class RollConfig(layers.MixerConfig):\n"
    "    pass\n"
    '@layers.register("roll", RollConfig)\n'
    "class Roll(layers.Mixer):\n"
    "    def __call__(self, x, context=layers.EMPTY):\n"
    "        return jnp.roll(x, -1, axis=1)\n"
    "def get_config(argument=''):\n"
    "    norm = recipe.rms(1e-6)\n"
    "    mixer = dict(kind='conv', conv=2) if argument == 'conv' else dict(kind='roll')\n"
    "    layer = recipe.layer(mixer, None, norm)\n"
    "    model = recipe.model(32, 16, '2x(a)', dict(a=layer), norm, tied=True)\n"
    "    return recipe.make_run(model, length=24, steps=4, batch=2, learning_rate=1e-3, warmup=1)\n"
)


def test_the_verb_reports_and_fails(registries, tmp_path, capsys):
    file = tmp_path / "leak.py"
    file.write_text(LEAK)
    assert cli.main(["check", f"--config={file}:conv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert cli.main(["check", f"--config={file}"]) == 5
    output = capsys.readouterr()
    assert "causality" in output.err
    assert "FAILED" in output.out


def test_the_verb_reads_a_workdir(registries, tmp_path, monkeypatch, capsys):
    (tmp_path / "leak.py").write_text(LEAK)
    settings = configs.load(f"{tmp_path / 'leak.py'}:conv", {})
    (tmp_path / "run").mkdir()
    write_json(Workdir(tmp_path / "run").config, settings.to_dict())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["check", "~/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 24
    assert cli.main(["check", "~/other"]) == cli.USAGE_ERROR
    assert "other is not the workdir of a run" in capsys.readouterr().err
