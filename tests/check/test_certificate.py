"""The certificate of small models, and of mixers that do not do what they state."""

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax import cli, layers, patterns
from sparsejax import config as configs
from sparsejax.check import CheckFailed, check_mixer, check_model
from sparsejax.check.reduce import MAX_PARAMETERS, choose_length, reduce
from sparsejax.errors import InputError
from sparsejax.model import Functional
from sparsejax.workdir import Workdir, write_json
from tests.check.models import EXPERTS, MIXERS, build

GOLDEN = Path(__file__).parents[1] / "golden"


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


def register(kind, mix, **members):
    """Registers a mixer `mix` of the stream, followed by a linear map; `members` are those of its config."""
    config = dataclasses.make_dataclass(f"{kind.title()}Config", [], bases=(layers.MixerConfig,), frozen=True)
    for name, value in members.items():
        setattr(config, name, value)

    class Mixer(layers.Mixer):
        def __init__(self, config, stream, rngs):
            super().__init__(config, stream, rngs)
            self.out = nnx.Param(jnp.eye(stream.width))

        def __call__(self, x, context=layers.EMPTY):
            return (mix(x) @ self.out[...]).astype(x.dtype)

    layers.register(kind, config)(Mixer)
    return config()


def round_off(x):
    """The input, rounded by the sum over all positions."""
    total = jax.lax.optimization_barrier(x.sum(axis=1, keepdims=True))
    return (x + total) - total


def average(x):
    return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]


def convolve(x):
    """A circular convolution over all positions."""
    taps = jnp.fft.rfft(jnp.asarray([0.0, 0.5, 1.0, 2.0]), n=x.shape[1])
    return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * taps[:, None], n=x.shape[1], axis=1)


FUTURE = r"causality: the logits at position 0 change by up to \d.* with the tokens from position \d+ on"
DOCUMENT = r"documents: other tokens in document 1 change the logits at position \d+ .*tokens\.segments"
OWN = patterns.Causal() & patterns.Window(0)  # each token attends to itself
LEAKS = {
    "circular": (lambda x: x + jnp.roll(x, 1, axis=1), FUTURE),
    "convolved": (convolve, FUTURE),
    "centered": (lambda x: x - x.mean(axis=1, keepdims=True), FUTURE),
    "faint": (lambda x: round_off(x) + 1e-9 * jnp.roll(x, -1, axis=1), FUTURE),
    "forgetful": (average, DOCUMENT),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leaking_mixer_is_refused_with_its_position(registries, kind):
    mix, message = LEAKS[kind]
    config = register(kind, mix)
    certificate = check_model(build({"kind": kind}), 24)
    with pytest.raises(CheckFailed, match=message):
        certificate.require()
    with pytest.raises(CheckFailed, match=message):
        check_mixer(config, 24)


def test_the_leaking_layer_is_named(registries):
    register("circular", LEAKS["circular"][0])
    layer = build("conv").layers["mix"]
    model = build({"kind": "circular"})
    layers_of_both = {"rolled": model.layers["mix"], "mix": layer}
    certificate = check_model(dataclasses.replace(model, schedule="2x(mix) rolled", layers=layers_of_both), 24)
    with pytest.raises(CheckFailed, match=f"{FUTURE}, through rolled$"):
        certificate.require()


@dataclasses.dataclass(frozen=True)
class Recent(patterns.Pattern):
    """A window whose bounds are those of its own position."""

    name: ClassVar[str] = "recent"
    left: int

    def allows(self, q, k, t=None, s=None):
        return (k >= q - self.left) & (k <= q)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        return patterns.from_ranges(grid, (first, last + 1), (last - self.left, first + 1))

    def last_query(self, k):
        return k + self.left

    def lookahead(self):
        return 0


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (24, r"pattern of mix: recent\(9\) at t=24, .*bounds.live_upper lacks live tiles: \[\(1, 0\)"),
        (150, "receptive field of mix: the output at 64 does not depend on the input at 55, inside"),
    ],
)
def test_a_pattern_with_narrow_bounds_is_refused(registries, length, message):
    patterns.register(Recent)
    certificate = check_model(build({**MIXERS["causal"], "pattern": "recent(9)"}), length)
    with pytest.raises(CheckFailed, match=message):
        certificate.require()


def test_keys_that_count_twice_are_scored_once():
    twice = build({**MIXERS["causal"], "pattern": "multiset(causal, causal & window(3))", "impl": "dense"})
    certificate = check_model(twice, 24)
    assert certificate.passed, list(certificate.failures)


def test_documents_in_hash_attention_do_not_interact():
    certificate = check_model(build("lsh", allow_leaks=True), 24)
    findings = {finding.name: finding for finding in certificate.findings}
    assert certificate.passed, list(certificate.failures)
    assert findings["documents"].passed
    assert findings["causality"].passed is None


def test_a_program_that_is_exact_but_not_bitwise_passes(registries):
    register("rounding", round_off, connectivity=patterns.Window(0))
    certificate = check_model(build({"kind": "rounding"}), 24)
    findings = {finding.name: finding for finding in certificate.findings}
    assert findings["causality"].passed
    assert "in float64 to 1e-12" in findings["causality"].detail


def test_depth_and_routing_may_amplify_rounding():
    model = build("conv", layer={"mlp": EXPERTS})
    deep = dataclasses.replace(model, schedule="24x(mix)", dtype="bfloat16")
    finding = next(finding for finding in check_model(deep, 24).findings if finding.name == "bfloat16")
    assert finding.passed
    assert re.search(r"logit, at most 5e-02, first at .*; on the same inputs layer \d+ \(mix\)", finding.detail)


def test_hashes_may_amplify_rounding():
    hashing = {"kind": "lsh", "heads": 4, "head_width": 8, "chunk": 8, "buckets": (16,), "hashes": 2, "seed": 0}
    model = build(hashing | {"causal": False, "after": 1}, causal=False, width=32, dtype="bfloat16")
    finding = next(finding for finding in check_model(model, 96).findings if finding.name == "bfloat16")
    assert finding.passed
    assert "; on the same inputs " in finding.detail


def test_a_layer_that_rounds_more_than_its_dtype_is_refused(registries):
    register("coarse", lambda x: x if x.dtype == jnp.float32 else x[..., ::-1], connectivity=OWN)
    model = dataclasses.replace(build({"kind": "coarse"}), dtype="bfloat16")
    finding = next(finding for finding in check_model(model, 24).failures if finding.name == "bfloat16")
    assert re.search(r"; on the same inputs layer \d+ \(mix\) differs most, by [1-9]", finding.detail)


def test_a_declared_leak_is_named(registries):
    register("sorted", average, leaks="later tokens move the borders")
    with pytest.raises(InputError, match="allow_leaks"):
        build({"kind": "sorted"})
    certificate = check_model(build({"kind": "sorted"}, allow_leaks=True), 24)
    finding = next(finding for finding in certificate.findings if finding.name == "causality")
    assert finding.passed is None
    assert finding.detail == "leaks allowed: layers.mix: later tokens move the borders"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"summary": ""}, "config.summary is not a text"),
        ({"cost": lambda self, length: 1.0}, "is not a Cost"),
        ({"__call__": lambda self, x, context=layers.EMPTY: x[:, 1:]}, r"the output is float32\[2, 24, 8\]|expected"),
        (
            {"extend": lambda self, x, cache, *_: (x, {"inputs": cache["inputs"][0]})},
            r"extend changes the cache from .*inputs.* to ",
        ),
    ],
    ids=["summary", "cost", "shape", "cache"],
)
def test_a_violated_contract_ends_the_check(registries, fault, message):
    config = register("faulty", average, **({"summary": ""} if "summary" in fault else {}))
    _, module = layers.MIXERS["faulty"]
    for name, value in fault.items():
        setattr(module, name, value)
    with pytest.raises(CheckFailed, match=f"mixer of mixer: .*({message})"):
        check_mixer(config, 24)


def test_check_mixer_returns_the_certificate():
    certificate = check_mixer(layers.ConvConfig(conv=3), 24)
    assert certificate.passed
    assert certificate.length == 24
    grid = build({**MIXERS["causal"], "pattern": "bigbird(8, 2, seed=0)"}, causal=False).layers["mix"].mixer
    with pytest.raises(InputError, match="pattern"):
        check_mixer(grid, 23)


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


@pytest.mark.parametrize("source", ["preset:minimax_m3", "configs/selection.py:paper"])
def test_a_copy_has_an_index_head_per_key_head(source):
    run = configs.check(configs.load(source, {}))
    copy, _ = reduce(run.model)
    copy.check(choose_length(copy, run.data.length))


@pytest.mark.parametrize(
    ("pattern", "edge"),
    [("causal & window(300)", 300), ("causal & chunk(500)", 500), ("causal & (window(20) | sink(4))", 20)],
)
def test_the_length_crosses_every_edge(pattern, edge):
    config = build(MIXERS["causal"] | {"pattern": pattern})
    assert choose_length(config) > max(edge + 64, 130)
    assert choose_length(config, 40) == 40


def test_the_length_fits_the_patterns_and_the_positions():
    grid = build(MIXERS["causal"] | {"pattern": "bigbird(8, 2, seed=0)"}, causal=False)
    with pytest.raises(InputError, match=r"layers\.mix\.mixer\.pattern"):
        choose_length(grid, 37)
    assert choose_length(build("conv", embedding={"positions": 20})) == 20


@pytest.mark.parametrize("length", [1, 6])
def test_a_short_sequence_is_checked(length):
    certificate = check_model(build("conv", "mix", vocab=2, width=8), length)
    assert certificate.passed, list(certificate.failures)
    assert certificate.length == length


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


def test_the_verb_ignores_keys_of_a_hugging_face_config(tmp_path, capsys):
    config = json.loads((GOLDEN / "mamba" / "config.json").read_text()) | {"unheard_of": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["check", f"--hf={tmp_path}"]) == cli.USAGE_ERROR
    assert "unheard_of" in capsys.readouterr().err
    assert cli.main(["check", f"--hf={tmp_path}", "--ignore=unheard_of", "--length=40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert cli.main(["check", "--config=preset:window", "--ignore=unheard_of"]) == cli.USAGE_ERROR
    assert "--hf" in capsys.readouterr().err
