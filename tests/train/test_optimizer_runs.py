"""Runs with each optimizer resume bit for bit; frozen parameters stay, and averages are evaluated and loaded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax import config as configs
from sparsejax.config import OPTIMIZERS
from sparsejax.errors import InputError
from sparsejax.model import Functional
from sparsejax.runs import read_arrays
from sparsejax.signals import Interrupted
from sparsejax.train.losses import label_smoothing, z_loss
from sparsejax.workdir import Workdir, read_rows
from tests.messages import rejects
from tests.train import runs
from tests.train.test_step import Bench, draw

STEPS = 6
SMALL = {
    "model.schedule": "2x(local)",
    "train.steps": STEPS,
    "train.accumulate": 2,
    "train.bad_loss": "skip",
    "train.spike": 1.05,
    "optimizer.warmup": 2,
    "checkpoint.every": 3,
    "eval.every": 3,
    "optimizer.freeze": "embedding.*",
    "optimizer.groups": [{"match": "*.mlp.*", "rate": 0.5, "weight_decay": 0.0}],
}


def overrides(name):
    averaging = {"optimizer.schedule": "constant"} if name.startswith("schedule_free") else {"optimizer.ema": 0.9}
    return SMALL | {"optimizer.name": name} | averaging


def train_whole_and_interrupted(settings, folder, monkeypatch):
    """The workdir of a run, the arrays at its end, as after an interruption, and what it prints."""
    whole, parts = Workdir(folder / "whole"), Workdir(folder / "parts")
    printed = runs.train_here(settings, whole.path)
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 4)
        with pytest.raises(Interrupted):
            runs.train_here(settings, parts.path)
    runs.train_here(settings, parts.path)
    arrays, expected = (read_arrays(run.checkpoints, STEPS) for run in (parts, whole))
    runs.assert_same_bits(arrays, expected)
    assert parts.metrics.read_bytes() == whole.metrics.read_bytes()
    return whole, expected, printed


def test_a_run_in_bfloat16_resumes_with_the_same_bits(text, tmp_path, monkeypatch):
    half = dict.fromkeys(("model.param_dtype", "model.dtype", "optimizer.moments"), "bfloat16")
    settings = runs.load(text, SMALL | half | {"optimizer.freeze": "", "train.spike": 0.0})
    whole, arrays, printed = train_whole_and_interrupted(settings, tmp_path, monkeypatch)
    assert arrays["parameters.embedding.tokens"].dtype.name == "bfloat16"
    assert arrays["parameters.norm.scale"].dtype.name == "float32"
    count = sum(x.nbytes for path, x in arrays.items() if path.startswith("parameters."))
    assert f"{count:,} bytes of parameters" in printed
    for field, dtype in (("mu", "bfloat16"), ("nu", "float32")):
        assert {x.dtype.name for path, x in arrays.items() if f".{field}." in path} == {dtype}
    loaded = sparsejax.load(whole.path).parameters["embedding"]["tokens"]
    np.testing.assert_array_equal(loaded, arrays["parameters.embedding.tokens"].astype(np.float32))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_with_the_same_bits(text, tmp_path, monkeypatch, name):
    settings = runs.load(text, overrides(name))
    whole, expected, _ = train_whole_and_interrupted(settings, tmp_path, monkeypatch)

    model = Functional(configs.check(settings).model)
    key = jax.random.split(jax.random.key(0))[0]
    initial = jax.jit(model.init)(key)["embedding"]["tokens"]
    assert expected["parameters.embedding.tokens"].tobytes() == np.asarray(initial).tobytes()
    frozen = [path for path in expected if path.startswith("optimizer") and path.endswith("embedding.tokens")]
    assert frozen == [path for path in frozen if ".ema." in path]

    row = read_rows(whole.metrics)[-1]
    if name != "schedule_free_adamw":
        assert np.isfinite(row["eval/ema_loss"])
        loaded = sparsejax.load(whole.path, ema=True)
        [path] = [path for path in expected if path.endswith(".ema.norm.scale")]
        np.testing.assert_array_equal(loaded.parameters["norm"]["scale"], expected[path])
        plain = sparsejax.load(whole.path).parameters["norm"]["scale"]
        np.testing.assert_array_equal(plain, expected["parameters.norm.scale"])
        assert not np.array_equal(plain, loaded.parameters["norm"]["scale"])


def test_a_schedule_free_run_evaluates_and_loads_the_average(text, tmp_path):
    changes = overrides("schedule_free_adamw") | {"optimizer.freeze": "", "optimizer.groups": []}
    runs.train_here(runs.load(text, changes), tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    arrays, loaded = read_arrays(workdir.checkpoints, STEPS), sparsejax.load(tmp_path / "run")
    [z] = [path for path in arrays if path.endswith("z.norm.scale")]
    point, base = arrays["parameters.norm.scale"], arrays[z]
    np.testing.assert_allclose(loaded.parameters["norm"]["scale"], (point - 0.1 * base) / 0.9, rtol=1e-6)
    evaluated = loaded.evaluate().evaluation
    assert evaluated.loss == pytest.approx(read_rows(workdir.metrics)[-1]["eval/loss"], rel=1e-5)
    with rejects(InputError, "ema"):
        sparsejax.load(tmp_path / "run", ema=True)


def test_losses_of_logits_in_float64():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 5, 7)) * 3, rng.integers(0, 7, (2, 5))
    normalizer = np.log(np.exp(logits).sum(-1))
    single = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(z_loss(single), normalizer**2, rtol=1e-5)
    likelihood = logits - normalizer[..., None]
    smoothed = 0.9 * np.eye(7)[targets] + 0.1 / 7
    plain = -np.take_along_axis(likelihood, targets[..., None], -1)[..., 0]
    actual = plain + 0.1 * np.asarray(label_smoothing(single, jnp.asarray(targets)))
    np.testing.assert_allclose(actual, -(smoothed * likelihood).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_losses_of_logits_are_means_over_scored_tokens(microbatches):
    bench = Bench(accumulate=microbatches, z_loss=0.3, label_smoothing=0.2)
    batch = draw(0)
    batch["weights"][0, :7] = 0
    logits = jax.jit(lambda p, x: bench.model.bind(p)(x))(bench.state().parameters, batch["inputs"])
    mean = functools.partial(np.average, weights=batch["weights"])
    _, metrics = bench.step(bench.state(), batch)
    expected = {
        "z_loss": 0.3 * z_loss(logits),
        "label_smoothing": 0.2 * label_smoothing(logits, jnp.asarray(batch["targets"])),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(metrics["details"][f"aux/{name}"], mean(np.asarray(values)), rtol=1e-4)
    likelihood = bench.negative_log_likelihood(batch)
    np.testing.assert_allclose(metrics["loss"], mean(likelihood), rtol=1e-5)
