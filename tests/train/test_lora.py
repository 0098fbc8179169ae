"""Low-rank updates: the first step starts from the model, only the factors train, and loaded weights are merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import config as configs
from sparsejax.errors import InputError
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, read_arrays
from sparsejax.runs.groups import find_frozen
from sparsejax.runs.lora import LORA, adapt
from sparsejax.signals import Interrupted
from sparsejax.workdir import Workdir, read_rows
from tests.messages import rejects
from tests.train import runs

STEPS, RANK, ALPHA = 6, 2, 6.0
MATCH = "*.query.weight, *.mlp.up.weight"
LOW_RANK = {
    "model.schedule": "2x(local) full",
    "optimizer.lora.match": MATCH,
    "optimizer.lora.rank": RANK,
    "optimizer.lora.alpha": ALPHA,
    "train.steps": STEPS,
    "checkpoint.every": 3,
    "eval.every": 3,
}
IDS = jnp.arange(24).reshape(2, 12)


def build(**lora):
    config = configs.check(runs.load("", {key: value for key, value in LOW_RANK.items() if "lora" not in key}))
    section = configs.LoraConfig(**{"match": MATCH, "rank": RANK, "alpha": ALPHA} | lora)
    optimizer = dataclasses.replace(config.optimizer, lora=section)
    return adapt(Functional(config.model), optimizer), optimizer


def perturb(model):
    """Parameters whose factors are all random."""
    parameters = model.init(jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), parameters[LORA])
    return parameters | {LORA: factors}


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    output = runs.train_here(runs.load(text, LOW_RANK), folder)
    return Workdir(folder), output


def test_the_first_step_starts_from_the_model():
    model, _ = build()
    parameters, expected = model.init(jax.random.key(3)), model.base.init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in parameters.items() if k != LORA}, expected)
    np.testing.assert_array_equal(model.bind(parameters)(IDS), model.base.bind(expected)(IDS))
    factors = parameters[LORA]["period"][0]["mlp"]["up"]["weight"]
    assert factors["a"].shape == (2, 16, RANK)
    assert factors["b"].shape == (2, RANK, 16)
    assert factors["a"].std() == pytest.approx(16**-0.5, rel=0.3)


def test_merged_logits_equal_unmerged_ones():
    model, _ = build()
    parameters = perturb(model)
    merged = model.merge(parameters)
    np.testing.assert_array_equal(model.base.bind(merged)(IDS), model.bind(parameters)(IDS))
    weight, factors = (tree["period"][0]["mixer"]["query"]["weight"] for tree in (parameters, parameters[LORA]))
    for layer in range(2):
        expected = weight[layer] + ALPHA / RANK * factors["a"][layer] @ factors["b"][layer]
        np.testing.assert_allclose(
            merged["period"][0]["mixer"]["query"]["weight"][layer], expected, rtol=1e-5, atol=1e-7
        )


def test_updates_are_those_of_plain_optax():
    model, config = build()
    parameters = perturb(model)
    optimizer = build_optimizer(config, STEPS, decay=model.decay, axes=model.axes)
    frozen = find_frozen(config, model.shapes)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, STEPS, config.learning_rate * config.final_rate
    )
    adamw = optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
    plain = optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    base, factors = {k: v for k, v in parameters.items() if k != LORA}, parameters[LORA]

    def differentiate(parameters):
        gradient = jax.grad(lambda x: loss_of(model.bind(x)(IDS)))(parameters)
        return jax.tree.map(lambda keep, x: jnp.zeros_like(x) if keep else x, frozen, gradient)

    @jax.jit
    def step(parameters, state):
        updates, state = optimizer.update(differentiate(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    def merge(factors):
        """The update of each matrix, written by hand."""
        merged = jax.tree.map(lambda x: x, base)
        for part in ("period", "after"):
            for branch, name in (("mixer", "query"), ("mlp", "up")):
                linear, pair = merged[part][0][branch][name], factors[part][0][branch][name]["weight"]
                product = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"])
                linear["weight"] = linear["weight"] + ALPHA / RANK * product
        return merged

    @jax.jit
    def step_plainly(factors, state):
        gradient = jax.grad(lambda x: loss_of(model.base.bind(merge(x))(IDS)))(factors)
        updates, state = plain.update(gradient, state, factors)
        return optax.apply_updates(factors, updates), state

    state, plain_state = optimizer.init(parameters), plain.init(factors)
    for _ in range(4):
        parameters, state = step(parameters, state)
        factors, plain_state = step_plainly(factors, plain_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), parameters[LORA], factors)
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in parameters.items() if k != LORA}, base)
    assert count(state) <= count(plain_state) + 64  # counters
    assert count(state) < count(parameters) / 2


def count(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_other_parameters_train_if_they_are_named():
    model, config = build(also="*norm*, embedding.*")
    frozen = find_frozen(config, model.shapes)
    trained = {jax.tree_util.keystr(path) for path, keep in jax.tree.leaves_with_path(frozen) if not keep}
    assert "['embedding']['tokens']" in trained
    assert "['norm']['scale']" in trained
    assert "['period'][0]['mixer']['query']['weight']" not in trained
    assert "['lora']['period'][0]['mixer']['query']['weight']['a']" in trained


# Runs


def test_a_run_trains_the_factors_only(trained):
    workdir, output = trained
    first, last = (read_arrays(workdir.checkpoints, step) for step in (3, STEPS))
    changed = {name for name in first if name.startswith("parameters.") and not np.array_equal(first[name], last[name])}
    assert changed
    assert all(name.startswith("parameters.lora.") for name in changed)
    factors = sum(first[name].nbytes for name in first if name.startswith("parameters.lora."))
    state = sum(first[name].nbytes for name in first if name.startswith("optimizer."))
    assert 2 * factors <= state <= 2 * factors + 64
    assert f"{factors // 4:,} of " in output
    assert f"{state:,} bytes of state" in output


def test_loaded_weights_are_merged(trained):
    workdir, _ = trained
    arrays, model = read_arrays(workdir.checkpoints, STEPS), sparsejax.load(workdir.path)
    assert LORA not in model.parameters
    name = "period.0.mixer.query.weight"
    a, b = arrays[f"parameters.lora.{name}.a"], arrays[f"parameters.lora.{name}.b"]
    expected = arrays[f"parameters.{name}"] + ALPHA / RANK * a @ b
    np.testing.assert_allclose(
        model.parameters["period"][0]["mixer"]["query"]["weight"], expected, rtol=1e-6, atol=1e-7
    )
    half = sparsejax.load(workdir.path, dtype="bfloat16").parameters["period"][0]["mixer"]["query"]["weight"]
    np.testing.assert_array_equal(half, jnp.asarray(expected, jnp.bfloat16))


def test_a_run_resumes_with_the_same_bits(trained, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 4)
        with pytest.raises(Interrupted):
            runs.train_here(runs.load(text, LOW_RANK), tmp_path / "parts")
    runs.train_here(runs.load(text, LOW_RANK), tmp_path / "parts")
    runs.assert_same_bits(
        *(read_arrays(path, STEPS) for path in (Workdir(tmp_path / "parts").checkpoints, trained[0].checkpoints))
    )


def test_a_run_starts_from_merged_weights(trained, text, tmp_path):
    from sparsejax.config import ModelSource
    from sparsejax.init.weights import open_weights

    weights, model = open_weights(ModelSource.parse(f"run:{trained[0].path}")), sparsejax.load(trained[0].path)
    stack = model.parameters["period"][0]["mixer"]["query"]["weight"]
    for layer in range(2):
        read = weights.read(f"layers.{layer}.mixer.query.weight")
        np.testing.assert_allclose(read, stack[layer], rtol=1e-6, atol=1e-7)


def test_four_devices_train_like_one(trained, text, tmp_path):
    arguments = [f"--config.{key}={value}" for key, value in (LOW_RANK | {"data.files": text}).items()]
    mesh = ("--config.sharding.data=1", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")
    workdir = Workdir(tmp_path / "run")
    code, _, err = runs.finish(
        runs.start("train", f"--config={runs.RECIPE}", *arguments, *mesh, f"--workdir={workdir.path}", devices=4)
    )
    assert code == 0, err
    single, four = ([row["train/loss"] for row in read_rows(run.metrics)] for run in (trained[0], workdir))
    assert four == pytest.approx(single, abs=1e-4)
    # One device reads the factors that four devices saved.
    expected, merged = (sparsejax.load(run.path).parameters for run in (trained[0], workdir))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), merged, expected)


# Errors


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("optimizer.lora.match", {"match": "*.quarry.weight"}),
        ("optimizer.lora.match", {"match": "*.mixer_residual.*"}),
        ("optimizer.lora.match", {"match": "embedding.tokens"}),
        ("optimizer.lora.rank", {"rank": 17}),
    ],
)
def test_what_matches_no_matrix(key, changes):
    with rejects(InputError, key):
        build(**changes)


@pytest.mark.parametrize(
    ("key", "value"), [("also", "*.nothing"), ("match", ""), ("rank", 0), ("alpha", 0.0), ("match", "*.nothing")]
)
def test_an_invalid_section(text, key, value, tmp_path):
    with rejects(InputError, f"optimizer.lora.{key}"):
        runs.train_here(runs.load(text, LOW_RANK | {f"optimizer.lora.{key}": value}), tmp_path / "run")
