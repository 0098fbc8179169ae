"""Distillation: values and gradients against float64, the recipe of phases, and the start and the resume of runs."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy.special import log_softmax, logsumexp

from sparsejax import config as configs
from sparsejax import report, sharding
from sparsejax.account import AccountCache, account_model, account_teacher
from sparsejax.budget import QUANTITIES
from sparsejax.config import ConfigError, GroupConfig, OptimizerConfig, TeacherConfig
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import read_context
from sparsejax.loaded import LoadedModel
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, init_state, list_steps, plan_phases, read_arrays
from sparsejax.runs.optimizer import find_ema
from sparsejax.runs.state import regroup_state
from sparsejax.show import show_teacher
from sparsejax.signals import Interrupted
from sparsejax.train.step import build_gradient
from sparsejax.train.teacher import (
    Distillation,
    Teacher,
    digest_parameters,
    keep_top,
    kl_divergence,
    relative_error,
)
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import recipe, runs

LLAMA = Path(__file__).parents[1] / "golden" / "llama"
LOCAL = "model.layers.local.mixer.pattern"
NARROW = "causal & window(1)"
CONVERTED = (1, 3)  # the layers "local" of the schedule 2x(ssm local) full


def draw(*shape, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def differentiate(function, x, *arguments):
    """Value [b, t] and gradient of its sum, in float32."""
    value = function(jnp.asarray(x, jnp.float32), *arguments)
    return value, jax.grad(lambda x: function(x, *arguments).sum())(jnp.asarray(x, jnp.float32))


# Losses.


def test_the_divergence_is_that_of_float64():
    model, teacher = draw(2, 5, 7), draw(2, 5, 7, seed=1)
    value, gradient = differentiate(kl_divergence, model, jnp.asarray(teacher, jnp.float32))
    log_q, log_p = log_softmax(model, axis=-1), log_softmax(teacher, axis=-1)
    np.testing.assert_allclose(value, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(log_q) - np.exp(log_p), atol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 30.0])  # at 30 the other tokens have next to no probability
def test_the_divergence_of_the_top_tokens_has_one_outcome_for_the_others(scale):
    model, teacher, count = draw(2, 5, 7, scale=scale), draw(2, 5, 7, seed=1, scale=scale), 3
    value, gradient = differentiate(kl_divergence, model, keep_top(jnp.asarray(teacher, jnp.float32), count))
    log_q, log_p = log_softmax(model, axis=-1), log_softmax(teacher, axis=-1)
    is_top = teacher >= np.sort(teacher, axis=-1)[..., -count, None]
    rest_q, rest_p = (logsumexp(np.where(is_top, -np.inf, x), axis=-1, keepdims=True) for x in (log_q, log_p))
    top = np.where(is_top, np.exp(log_p) * (log_p - log_q), 0).sum(-1)
    np.testing.assert_allclose(value, top + (np.exp(rest_p) * (rest_p - rest_q))[..., 0], rtol=1e-5, atol=1e-5)
    expected = np.exp(log_q) - np.where(is_top, np.exp(log_p), np.exp(rest_p + log_q - rest_q))
    np.testing.assert_allclose(gradient, expected, atol=2e-6)
    whole, _ = differentiate(kl_divergence, model, jnp.asarray(teacher, jnp.float32))
    assert (np.asarray(value) <= np.asarray(whole) + 1e-5).all()


def test_the_error_is_relative_to_the_mean_square_of_the_teacher():
    output, target = draw(2, 5, 8), draw(2, 5, 8, seed=1)
    value, gradient = differentiate(relative_error, output, jnp.asarray(target, jnp.float32))
    norm = (target**2).mean(-1) + 1e-6
    np.testing.assert_allclose(value, ((output - target) ** 2).mean(-1) / norm, rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * (output - target) / 8 / norm[..., None], rtol=1e-5, atol=1e-7)
    assert np.isfinite(relative_error(jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 8)))).all()


# The gradient of a step.


class Pair:
    """A model with narrow windows, and the teacher that it differs from."""

    def __init__(self, narrow=True, accumulate=1, loss_chunk=None, **teacher):
        settings = recipe.get_config()
        self.teacher = Functional(configs.check(settings).model)
        self.teacher_parameters = self.teacher.init(jax.random.key(1))
        if narrow:
            settings.model.layers.local.mixer.pattern = NARROW
        teacher = {"source": "run:teacher", **teacher}
        settings.train.update(teacher=teacher, accumulate=accumulate, loss_chunk=loss_chunk)
        settings = configs.complete(settings.to_dict())
        config = configs.build(configs.Config, settings)
        self.model, self.config = Functional(config.model), config.train.teacher
        self.parameters = self.model.init(jax.random.key(0))
        self.distillation = Distillation(
            self.config,
            self.teacher,
            hidden=self.config.pair_streams(config.model, self.teacher.config),
            attention=self.config.pair_mixers(config.model, self.teacher.config),
        )
        frozen = jax.tree.map(lambda _: False, self.model.shapes)
        mesh = sharding.single_device_mesh()
        gradient = build_gradient(self.model, config.train, mesh, frozen, self.distillation)
        self.gradient = jax.jit(lambda p, batch, teacher: gradient(p, batch, None, teacher))

    def __call__(self, batch, parameters=None):
        return self.gradient(self.parameters if parameters is None else parameters, batch, self.teacher_parameters)


@pytest.fixture(scope="module")
def batch():
    """Packed documents with padding, some of whose tokens are not scored."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 256, (4, 33)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 14 + [0] * 8, [1] * 32], 2, axis=0).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange((row == i).sum()) for i in (1, 2, 0)]) for row in segments])
    weights = (segments > 0) * (draw.random((4, 32)) < 0.7)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights.astype(np.float32),
        "segments": segments,
        "positions": positions.astype(np.int32),
    }
    return jax.tree.map(jnp.asarray, arrays)


@pytest.fixture(scope="module")
def whole():
    return Pair(kl=0.5, temperature=2.0, hidden=0.25, attention_output=2.0, loss=0.3)


def run_traced(model, parameters, batch):
    context = read_context(batch).with_extras(traced=True)
    return jax.jit(lambda p: model.bind(p).forward(batch["inputs"], context))(parameters)


def test_the_auxiliary_losses_are_means_over_tokens(whole, batch):
    objective, _ = whole(batch)
    pairs = (whole.model, whole.parameters), (whole.teacher, whole.teacher_parameters)
    output, expected = (run_traced(model, parameters, batch) for model, parameters in pairs)
    logits = [jax.jit(model.bind(parameters))(batch["inputs"], read_context(batch)) for model, parameters in pairs]
    log_q, log_p = (log_softmax(np.asarray(x, np.float64) / 2, axis=-1) for x in logits)
    weights, mask = np.asarray(batch["weights"]), np.asarray(batch["segments"]) > 0
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)

    def error(y, x):
        y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
        return (((y - x) ** 2).mean(-1) / ((x**2).mean(-1) + 1e-6))[mask].mean()

    streams = [error(y.stream, x.stream) for y, x in zip(output.traces, expected.traces, strict=True)]
    context = read_context(batch)
    layers = list(whole.model.bind(whole.parameters).unroll())
    mixers = [
        error(layers[i].mixer(expected.traces[i].mixer_input, context), expected.traces[i].mixer_output)
        for i in CONVERTED
    ]
    assert whole.distillation.attention == dict(zip(CONVERTED, CONVERTED, strict=True))
    values = {
        "kl": 0.5 * 4 * (divergence * weights).sum() / weights.sum(),
        "hidden": 0.25 * np.mean(streams),
        "attention_output": 2.0 * np.mean(mixers),
    }
    assert {name: float(value) for name, value in objective.auxiliary.items()} == pytest.approx(values, rel=1e-4)
    assert float(objective.total) == pytest.approx(0.3 * float(objective.loss) + sum(values.values()), rel=1e-4)


def test_microbatches_add_up(whole, batch):
    split = Pair(accumulate=2, kl=0.5, temperature=2.0, hidden=0.25, attention_output=2.0, loss=0.3)
    (first, gradient), (second, other) = whole(batch), split(batch)
    for name, value in first.auxiliary.items():
        assert float(second.auxiliary[name]) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, other)


@pytest.mark.parametrize("top_k", [0, 4])
def test_the_divergence_in_chunks_of_tokens(batch, top_k):
    """One that divides the row, and one that does not."""
    objectives = [Pair(kl=0.5, top_k=top_k, temperature=2.0, loss_chunk=chunk)(batch) for chunk in (None, 8, 7)]
    (whole, gradient), *others = objectives
    for objective, other in others:
        assert float(objective.auxiliary["kl"]) == pytest.approx(float(whole.auxiliary["kl"]), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradient, other)


def test_padding_does_not_change_the_losses(whole, batch):
    other = batch | {"inputs": jnp.where(batch["segments"] > 0, batch["inputs"], 7)}
    assert not np.array_equal(other["inputs"], batch["inputs"])
    (first, gradient), (second, same) = whole(batch), whole(other)
    assert float(first.total) == pytest.approx(float(second.total), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradient, same)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_model_does_not_diverge_from_itself(batch, top_k):
    pair = Pair(narrow=False, kl=1.0, top_k=top_k, hidden=1.0, loss=0.0)
    objective, gradient = pair(batch, pair.teacher_parameters)
    assert {name: float(value) for name, value in objective.auxiliary.items()} == pytest.approx(
        {"kl": 0.0, "hidden": 0.0}, abs=1e-6
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-6


def test_as_many_top_tokens_as_there_are_give_the_whole_divergence(batch):
    values = [float(Pair(kl=1.0, top_k=count)(batch)[0].auxiliary["kl"]) for count in (0, 256, 255, 8)]
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=1e-5)
    assert 0 < values[3] < values[0]


def test_the_alignment_of_mixers_trains_nothing_else(batch):
    _, gradient = Pair(attention_output=1.0, loss=0.0)(batch)
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree.leaves_with_path(gradient)
    }
    trained = {path for path, norm in norms.items() if norm}
    assert trained == {path for path in norms if path.startswith("period.1.mixer.")}
    _, gradient = Pair(attention_output=1.0, attention_layers="3, 4:1", loss=0.0)(batch)
    query = gradient["period"][1]["mixer"]["query"]["weight"]
    assert not query[0].any()  # layer 1 is not compared
    assert query[1].any()
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient["after"][0]["mixer"]))


def test_no_logits_of_the_teacher_are_kept(batch):
    pair = Pair(kl=1.0)
    targets = jax.eval_shape(lambda p: pair.distillation.run_teacher(p, batch), pair.teacher_parameters)
    assert max(leaf.size for leaf in jax.tree.leaves(targets)) == 4 * 32 * pair.distillation.teacher.config.width


# The state at the start of a phase that trains other parameters.


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_parameters_that_stay_trained_keep_their_moments(name):
    model, mesh = Functional(configs.check(recipe.get_config()).model), sharding.single_device_mesh()
    momentum = 0.9 if name in ("sgd", "adafactor") else None
    base = OptimizerConfig(1e-2, 0.1, 4, 0.1, 1.0, name=name, momentum=momentum, ema=0.9)

    def build(**groups):
        return build_optimizer(dataclasses.replace(base, **groups), 20, decay=model.decay, axes=model.axes)

    settings = ({"freeze": "embedding.*, *.mlp.*"}, {"groups": (GroupConfig("*.mlp.*", rate=0.5),)}, {})
    optimizers = [build(**groups) for groups in settings]
    state = init_state(model, optimizers[2], 0, mesh)
    whole = state  # trains everything
    for _ in range(2):
        gradient = jax.tree.map(jnp.ones_like, state.parameters)
        _, moments = jax.jit(optimizers[2].update)(gradient, whole.optimizer, state.parameters)
        whole = dataclasses.replace(whole, optimizer=moments)
    partial = regroup_state(whole, model, optimizers[0], mesh)
    size = [sum(leaf.size for leaf in jax.tree.leaves(tree.optimizer)) for tree in (whole, partial)]
    assert size[1] < size[0]
    back = regroup_state(regroup_state(partial, model, optimizers[1], mesh), model, optimizers[2], mesh)
    fresh = optimizers[2].init(state.parameters)
    assert jax.tree.structure(back.optimizer) == jax.tree.structure(whole.optimizer)
    kinds, averages = set(), set(map(id, jax.tree.leaves(find_ema(back.optimizer))))
    for (path, leaf), kept, first in zip(
        jax.tree.leaves_with_path(back.optimizer), *map(jax.tree.leaves, (whole.optimizer, fresh)), strict=True
    ):
        text = jax.tree_util.keystr(path)
        is_new = ("'embedding'" in text or "'mlp'" in text) and id(leaf) not in averages
        kinds.add(is_new)
        np.testing.assert_array_equal(leaf, first if is_new else kept, err_msg=text)
    assert kinds == {True, False}


# Runs.


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """The workdir of a run of 8 steps."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    runs.train_here(runs.load(text, {"train.steps": 8, "checkpoint.every": 4, "eval.every": 4}), workdir)
    return workdir


def distil(teacher, **overrides):
    return {"train.teacher.source": f"run:{teacher}", LOCAL: NARROW, "train.steps": 12} | {
        f"train.teacher.{name}": value for name, value in overrides.items()
    }


def recipe_of(teacher):
    """Aligns the mixers, then distils, then trains as usual."""
    phases = {
        "align": (0, {"attention_output": 1.0, "loss": 0.0}),
        "distil": (4, {"kl": 1.0, "top_k": 16, "hidden": 0.5}),
        "plain": (9, {}),
    }
    overrides = distil(teacher) | {"checkpoint.every": 4, "eval.every": 4}
    for name, (start, weights) in phases.items():
        overrides[f"train.phases.{name}.start"] = start
        overrides |= {f"train.phases.{name}.set.train.teacher.{key}": value for key, value in weights.items()}
    groups = [{"match": "*.mixer.*"}, {"match": "*", "freeze": True}]
    return overrides | {"train.phases.align.set.optimizer.groups": groups}


@pytest.fixture(scope="module")
def distilled(text, teacher, tmp_path_factory):
    """The workdir of the recipe, and what it printed."""
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    return workdir, runs.train_here(runs.load(text, recipe_of(teacher)), workdir)


def test_the_recipe_is_one_run(text, teacher, distilled):
    workdir, printed = Workdir(distilled[0]), distilled[1]
    rows = read_rows(workdir.metrics)
    names = [{name.removeprefix("train/aux/") for name in row if name.startswith("train/aux/")} for row in rows]
    assert names == [{"attention_output"}] * 4 + [{"kl", "hidden"}] * 5 + [set()] * 3
    assert rows[3]["train/aux/attention_output"] < rows[0]["train/aux/attention_output"]
    assert rows[8]["train/aux/hidden"] < rows[4]["train/aux/hidden"]
    lines = [line for line in printed.splitlines() if f"teacher run:{teacher}: " in line]
    assert [line.partition(":")[0] for line in lines] == ["phase align", "phase distil"]
    record = read_json(workdir.teacher)
    assert (record["source"], record["step"]) == (f"run:{teacher}", 8)
    console = Console(file=io.StringIO(), width=200)
    show_teacher(plan_phases(runs.load(text, recipe_of(teacher))), console)
    assert console.file.getvalue().splitlines() == lines


def init_parameters(settings, seed):
    model = Functional(configs.check(settings).model)
    state = init_state(
        model,
        build_optimizer(configs.check(settings).optimizer, 1, decay=model.decay),
        seed,
        sharding.single_device_mesh(),
    )
    return {
        "parameters." + jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state.parameters)
    }


@pytest.mark.parametrize("step", [2, 4, 6])  # in the first phase, at its end, and in the second
def test_a_run_that_is_stopped_ends_the_same(text, teacher, distilled, tmp_path, monkeypatch, step):
    stopped, settings = Workdir(tmp_path / "run"), runs.load(text, recipe_of(teacher))
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, step)
        with pytest.raises(Interrupted):
            runs.train_here(settings, stopped.path)
    saved = list_steps(stopped.checkpoints)[-1]
    assert saved in (step, step + 1)
    if step == 2:  # the mixers alone have changed
        start, after = init_parameters(settings, 0), read_arrays(stopped.checkpoints, saved)
        changed = {path for path, leaf in start.items() if leaf.tobytes() != after[path].tobytes()}
        assert changed
        assert all(".mixer." in path for path in changed)
        moments = [path for path in after if path.startswith("optimizer.") and ".mu." in path]
        assert moments
        assert all(".mixer." in path for path in moments)
    runs.train_here(settings, stopped.path)
    whole = Workdir(distilled[0])
    runs.assert_same_bits(read_arrays(stopped.checkpoints, 12), read_arrays(whole.checkpoints, 12))
    for name in ("metrics", "result", "teacher"):
        assert getattr(stopped, name).read_bytes() == getattr(whole, name).read_bytes()


def test_a_changed_teacher_is_rejected_and_a_missing_one_only_if_it_is_needed(text, teacher, tmp_path, monkeypatch):
    copy, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, copy)
    settings = runs.load(text, recipe_of(copy))
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 5)
        with pytest.raises(Interrupted):
            runs.train_here(settings, run)
    shutil.rmtree(Workdir(copy).checkpoints / "8")
    before = Workdir(run).metrics.read_bytes()
    with rejects(ConfigError, "train.teacher.source"):
        runs.train_here(settings, run)
    shutil.move(copy, tmp_path / "moved")
    with rejects(ConfigError, "train.teacher.source"):
        runs.train_here(settings, run)
    assert Workdir(run).metrics.read_bytes() == before
    # The same teacher from another folder changes no number.
    moved = runs.load(text, recipe_of(teacher) | {"train.teacher.source": f"run:{teacher}@8"})
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 10)
        with pytest.raises(Interrupted):
            printed = runs.train_here(moved, run)
    printed = runs.train_here(settings, run)  # the phase in progress has no teacher
    assert "at step 1" in printed
    assert read_rows(Workdir(run).metrics)[-1]["step"] == 12


def test_a_hugging_face_folder_teaches_a_run_that_starts_from_it(tmp_path):
    overrides = {
        "train.teacher.source": f"hf:{LLAMA}",
        "train.teacher.kl": 1.0,
        "train.teacher.hidden": 1.0,
        "train.teacher.attention_output": 1.0,
        "data.task": "duplication",
        "data.length": 16,
        "train.steps": 2,
        "train.batch": 2,
        "train.log_every": 1,
        "train.check": False,
        "eval.every": 2,
        "eval.batches": 1,
        "eval.sample": 0,
        "checkpoint.every": 2,
    }
    settings = configs.load(f"hf:{LLAMA}", overrides | probe_overrides())
    with rejects(ConfigError, "train.teacher.attention_layers"):  # no mixer differs
        runs.train_here(settings, tmp_path / "same")
    settings.train.teacher.attention_layers = "0, 2"
    runs.train_here(settings, tmp_path / "run")
    row = read_rows(Workdir(tmp_path / "run").metrics)[0]
    losses = {name: row[f"train/aux/{name}"] for name in ("kl", "hidden", "attention_output")}
    assert losses == pytest.approx(dict.fromkeys(losses, 0.0), abs=1e-6)
    assert row["train/loss"] > 1


def probe_overrides():
    return {"data.probe.length": 16, "data.probe.vocab": 64}


def test_devices_share_the_teacher(text, teacher, distilled, tmp_path):
    overrides = {"data.files": text} | recipe_of(teacher)
    groups = overrides.pop("train.phases.align.set.optimizer.groups")
    overrides["train.phases.align.set.optimizer.groups"] = json.dumps(groups).replace("true", "True")
    mesh = {"sharding.data": 2, "sharding.fsdp": 2}
    arguments = [f"--config.{key}={value}" for key, value in (overrides | mesh).items()]
    code, _, err = runs.finish(
        runs.start("train", f"--config={runs.RECIPE}", *arguments, f"--workdir={tmp_path / 'run'}", devices=4)
    )
    assert code == 0, err
    first, second = (read_rows(Workdir(workdir).metrics) for workdir in (distilled[0], tmp_path / "run"))
    for row, other in zip(first, second, strict=True):
        for name, value in row.items():
            if name == "train/loss" or name.startswith("train/aux/"):
                assert other[name] == pytest.approx(value, abs=2e-4), (row["step"], name)
    digests = [read_json(Workdir(workdir).teacher)["digest"] for workdir in (distilled[0], tmp_path / "run")]
    assert digests[0] == digests[1]


def test_the_teacher_is_counted():
    settings = recipe.get_config()
    settings.train.teacher = {"source": "run:teacher", "attention_output": 1.0}
    settings.model.layers.local.mixer.pattern = NARROW
    config = configs.build(configs.Config, configs.complete(settings.to_dict()))
    model = configs.check(recipe.get_config()).model
    cost = account_teacher(config, model)
    layers, ends = account_model(model, 32)
    assert cost.parameters == Functional(model).size
    assert cost.parameter_bytes == 4 * cost.parameters
    assert cost.forward_flops == 4 * 32 * sum(layer.flops for layer in layers)  # the head is not needed
    pairs = 2 * (32 * 2 - 1)  # heads, of which each scores itself and the token before
    projections = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16)  # query, key and value, output
    per_token = projections + 2 * pairs * (8 + 8) / 32
    assert cost.mixer_flops == pytest.approx(3 * len(CONVERTED) * 4 * 32 * per_token)
    predicting = dataclasses.replace(config.train.teacher, kl=1.0, dtype="bfloat16")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, teacher=predicting))
    predicted = account_teacher(config, model)
    assert predicted.forward_flops == cost.forward_flops + 4 * 32 * ends.flops
    assert predicted.parameter_bytes < 0.7 * cost.parameter_bytes


def test_budgets_and_reports_count_the_teacher(text, teacher, distilled):
    phases = plan_phases(runs.load(text, recipe_of(teacher)))
    model, expected = configs.check(recipe.get_config()).model, 0.0
    for phase, length in zip(phases, (4, 5, 3), strict=True):
        section = phase.config.train.active_teacher
        cost = account_teacher(phase.config, model) if section else None
        added = cost.forward_flops + cost.mixer_flops if cost else 0.0
        expected += length * (4 * 32 * AccountCache()(phase.config).training_flops + added)
    assert QUANTITIES["flops"](phases, AccountCache()) == pytest.approx(expected)
    (row,) = report.read([distilled[0]]).runs.to_dict("records")
    assert row["training_flops"] == pytest.approx(expected)


def test_a_digest_depends_on_every_bit():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4, jnp.bfloat16)}}
    digests = {
        digest_parameters(changed)
        for changed in (
            tree,
            tree | {"a": tree["a"].at[1, 2].add(1e-6)},
            tree | {"a": tree["a"][:, ::-1]},
            tree | {"a": tree["a"][::-1]},
            tree | {"b": {"c": jnp.ones(4)}},
            tree | {"d": tree["a"]},
        )
    }
    assert len(digests) == 6
    assert digest_parameters(jax.tree.map(lambda x: x + 0, tree)) in digests


# Errors.


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        pytest.param({"source": "teacher"}, "train.teacher.source", id="source"),
        pytest.param({}, "train.teacher", id="all weights are 0"),
        pytest.param({"loss": 0.0}, "train.teacher.loss", id="nothing is trained"),
        pytest.param({"kl": -1.0}, "train.teacher.kl", id="negative"),
        pytest.param({"kl": 1.0, "temperature": 0.0}, "train.teacher.temperature", id="temperature"),
        pytest.param({"kl": 1.0, "top_k": 257}, "train.teacher.top_k", id="top_k"),
        pytest.param({"kl": 1.0, "dtype": "float16"}, "train.teacher.dtype", id="dtype"),
        pytest.param({"hidden": 1.0, "hidden_layers": "0-0"}, "train.teacher.hidden_layers", id="map"),
        pytest.param({"hidden": 1.0, "hidden_layers": "1:2, 1:3"}, "train.teacher.hidden_layers", id="twice"),
    ],
)
def test_an_invalid_section_is_named(overrides, key):
    with rejects(ConfigError, key):
        plan_phases(runs.load("", distil("teacher", **overrides)))


@pytest.mark.parametrize(
    ("changes", "overrides", "key"),
    [
        pytest.param({"vocab": 300}, {"kl": 1.0}, "train.teacher.source", id="vocabulary"),
        pytest.param({"causal": False}, {"kl": 1.0}, "train.teacher.source", id="causal"),
        pytest.param({"width": 8}, {"hidden": 1.0}, "train.teacher.hidden", id="width"),
        pytest.param({"schedule": "full"}, {"hidden": 1.0}, "train.teacher.hidden_layers", id="depth"),
        pytest.param({}, {"hidden": 1.0, "hidden_layers": "0:5"}, "train.teacher.hidden_layers", id="no such layer"),
        pytest.param({}, {"hidden": 1.0, "hidden_layers": "5:0"}, "train.teacher.hidden_layers", id="no layer"),
        pytest.param({"reversible": True, "tied": False}, {"hidden": 1.0}, "train.teacher.hidden", id="reversible"),
    ],
)
def test_a_teacher_that_does_not_fit_is_rejected(changes, overrides, key):
    config = configs.check(runs.load("", distil("teacher", **overrides)))
    model = dataclasses.replace(config.model, **changes)

    with rejects(ConfigError, key):
        Teacher(LoadedModel(model, {}), {}).distil(config)


def test_a_missing_teacher_is_one_line(text, tmp_path):
    with rejects(ConfigError, "train.teacher.source"):
        runs.train_here(runs.load(text, distil(tmp_path / "none", kl=1.0)), tmp_path / "run")
    with rejects(InputError, "train.teacher.source"):
        plan = plan_phases(runs.load(text, distil(tmp_path / "none", kl=1.0)))
        show_teacher(plan, Console(file=io.StringIO()))
    assert not Workdir(tmp_path / "run").exists()


def test_averaged_parameters_are_trained_alike_in_all_phases():
    overrides = {
        "optimizer.name": "schedule_free_adamw",
        "optimizer.schedule": "constant",
        "train.phases.late.start": 5,
        "train.phases.late.set.optimizer.freeze": "embedding.*",
    }
    with rejects(ConfigError, "optimizer.name"):
        plan_phases(runs.load("", overrides))
    with rejects(Exception, "train.phases.late.set.optimizer.freeze"):
        plan_phases(
            runs.load("", {"train.phases.late.start": 5, "train.phases.late.set.optimizer.freeze": "nothing.*"})
        )


def test_the_section_lists_the_layers():
    section = TeacherConfig("run:teacher", hidden=1.0, hidden_layers=" 0, 3:7 ")
    assert section.layers("hidden_layers") == {0: 0, 3: 7}
    assert section.layers("attention_layers") == {}
