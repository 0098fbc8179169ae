"""The training step: sums over microbatches, keeps its state in float32, and skips an update that diverged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.inference import build_evaluation
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, build_schedule, init_state
from sparsejax.train import build_step
from tests.train import recipe

SCHEDULE = "local"
STEPS = 20


def is_fifth(step):
    return step == 5


class Bench:
    """A model of one layer and all that a step needs; the step is compiled once."""

    def __init__(self, **train):
        settings = recipe.get_config()
        settings.model.schedule = SCHEDULE
        settings.model.dtype = train.pop("dtype", "float32")
        settings.model.dropout = train.pop("dropout", 0.0)
        settings.model.vocab = train.pop("vocab", settings.model.vocab)
        settings.model.param_dtype = train.pop("param_dtype", "float32")
        first = train.pop("first", 0)
        settings.train.update(train)
        config = configs.check(settings)
        self.config, self.model, self.mesh = config, Functional(config.model), sharding.make_mesh(config.sharding)
        self.optimizer = build_optimizer(config.optimizer, STEPS, decay=self.model.decay)
        self.schedule = build_schedule(config.optimizer, STEPS)
        self.step = build_step(
            self.model, self.optimizer, self.schedule, config.train, self.mesh, first=first, ends_row=is_fifth
        )
        self._start = init_state(self.model, self.optimizer, 0, self.mesh)

    def state(self):
        """A copy of the first state, to be donated to the step."""
        return jax.tree.map(lambda x: x.copy(), self._start)

    def negative_log_likelihood(self, batch):
        """Negative log-likelihoods of the targets in the first state."""
        logits = jax.jit(lambda p, tokens: self.model.bind(p)(tokens))(self._start.parameters, batch["inputs"])
        assert logits.dtype == jnp.float32
        likelihood = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        return -np.take_along_axis(np.asarray(likelihood), batch["targets"][..., None], -1)[..., 0]


def draw(seed, rows=4, length=32):
    tokens = np.random.default_rng(seed).integers(97, 123, (rows, length + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32)}


def poisoned(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def host(tree):
    """A copy that outlives the step to which the state is donated."""
    return jax.tree.map(np.array, dataclasses.replace(tree, key=jax.random.key_data(tree.key)))


def assert_same_bits(arrays, expected):
    for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(expected), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def plain():
    return Bench()


@pytest.fixture(scope="module")
def spiky():
    return Bench(spike=2.0)


def test_loss_is_the_mean_over_weights(plain):
    batch = draw(0)
    batch["weights"][:, 10:] = 0
    batch["weights"][1] = 0
    _, metrics = plain.step(plain.state(), batch)
    assert float(metrics["loss"]) == pytest.approx(
        plain.negative_log_likelihood(batch)[[0, 2, 3], :10].mean(), rel=1e-5
    )


def test_microbatches_add_up(plain):
    accumulated = Bench(accumulate=2)
    batch = draw(1)
    batch["weights"][0] = 0  # the weights of the microbatches differ
    batch["weights"][1, 5:] = 0
    whole, summed = (bench.step(bench.state(), batch) for bench in (plain, accumulated))
    for name in ("loss", "grad_norm", "loss_mean"):
        assert float(summed[1][name]) == pytest.approx(float(whole[1][name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(summed[0].optimizer), jax.tree.leaves(whole[0].optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 16, 13, 100])
def test_the_loss_in_chunks_of_tokens(chunk):
    """Also with chunks that do not divide the row or are longer than it, every loss of the logits, and zero weights."""
    losses = {"z_loss": 1e-2, "label_smoothing": 0.1}
    whole, chunked = Bench(**losses), Bench(loss_chunk=chunk, **losses)
    batch = draw(2)
    batch["weights"][0, 5:] = 0
    (state, metrics), (other, others) = (bench.step(bench.state(), batch) for bench in (whole, chunked))
    for name in ("loss", "grad_norm"):
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-6)
    for name, value in metrics["details"].items():
        assert float(others["details"][name]) == pytest.approx(float(value), rel=1e-6)
    for a, b in zip(jax.tree.leaves(other.optimizer), jax.tree.leaves(state.optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_chunk_of_the_loss_bounds_its_memory():
    """All logits of 8,192 tokens and 4,096 ids take 128 MiB in float32; those of 256 tokens take 4."""
    peaks = {}
    for chunk in (8192, 256):
        bench = Bench(vocab=4096, loss_chunk=chunk)
        compiled = bench.step.lower(bench.state(), draw(0, rows=1, length=8192)).compile()
        peaks[chunk] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    assert peaks[8192] > 128
    assert peaks[256] < 64


def test_dropout_differs_by_step_and_microbatch_and_is_not_evaluated(plain):
    dropped = Bench(accumulate=2, dropout=0.5)
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), draw(3))  # rows that are all the same
    _, first = dropped.step(dropped.state(), batch)
    again = dropped.step(dropped.state(), batch)[1]
    later = dropped.step(dataclasses.replace(dropped.state(), step=jnp.asarray(5)), batch)[1]
    assert float(again["loss"]) == float(first["loss"])
    assert abs(float(plain.step(plain.state(), batch)[1]["loss"]) - float(first["loss"])) > 1e-4
    assert abs(float(later["loss"]) - float(first["loss"])) > 1e-4
    sums = [build_evaluation(bench.model, bench.mesh)(plain.state().parameters, batch) for bench in (plain, dropped)]
    np.testing.assert_array_equal(sums[0][0], sums[1][0])
    # Each microbatch alone, the even or the odd rows: only the masks differ.
    weights = np.indices((4, 32))[0] % 2
    parts = [batch | {"weights": (weights == part).astype(np.float32)} for part in range(2)]
    even, odd = (float(dropped.step(dropped.state(), part)[1]["loss"]) for part in parts)
    assert abs(even - odd) > 1e-4


def test_without_dropout_the_step_draws_nothing(plain):
    texts = [bench.step.lower(bench.state(), draw(0)).as_text() for bench in (plain, Bench(dropout=0.5))]
    assert ["threefry" in text for text in texts] == [False, True]


def test_learning_rate_is_that_of_the_update(plain):
    state = plain.state()
    for step in range(6):
        state, metrics = plain.step(state, draw(step))
        assert float(metrics["learning_rate"]) == pytest.approx(float(plain.schedule(step)), rel=1e-6)
    assert int(state.step) == 6


def test_bfloat16_computes_only(plain):
    half = Bench(dtype="bfloat16")
    state, losses = half.state(), []
    for _ in range(15):
        state, metrics = half.step(state, draw(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    for leaf in jax.tree.leaves((state.parameters, state.optimizer)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    _, exact = plain.step(plain.state(), draw(0))
    assert 0 < abs(losses[0] - float(exact["loss"])) < 0.05


def test_a_loss_that_is_not_finite_changes_no_parameter(plain):
    state, _ = plain.step(plain.state(), draw(0))
    before = host(state)
    state, metrics = plain.step(state, poisoned(draw(1)))
    assert metrics["diverged"]
    assert np.isnan(metrics["loss"])
    after = host(state)
    assert_same_bits((after.parameters, after.optimizer), (before.parameters, before.optimizer))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert after.losses[2:] == (*before.losses[2:4], 1)
    state, metrics = plain.step(state, draw(2))  # the next update has the rate of the skipped one
    assert not metrics["diverged"]
    assert float(metrics["learning_rate"]) == pytest.approx(float(plain.schedule(1)), rel=1e-6)


def test_a_batch_that_diverges_changes_nothing(plain):
    state = plain.state()
    for batch in (poisoned(draw(8)), draw(0), poisoned(draw(9)), draw(1)):
        state, _ = plain.step(state, batch)
    expected = plain.state()
    for batch in (draw(0), draw(1)):
        expected, _ = plain.step(expected, batch)
    state, expected = host(state), host(expected)
    assert_same_bits(
        (state.parameters, state.optimizer, state.losses.reference_loss),
        (expected.parameters, expected.optimizer, expected.losses.reference_loss),
    )


def scaled(losses, factor):
    """Statistics whose reference of spikes is multiplied by a factor."""
    return losses._replace(reference_loss=losses.reference_loss * factor)


def test_the_mean_is_weighted_by_tokens_and_starts_again_after_a_row(plain):
    state, losses, weights, means = plain.state(), [], [], []
    for seed in range(8):
        batch = draw(seed)
        batch["weights"][:, seed + 2 :] = 0
        batch = poisoned(batch) if seed in (1, 6) else batch
        state, metrics = plain.step(state, batch)
        losses.append(float(metrics["loss"]))
        weights.append(batch["weights"].sum())
        means.append(float(metrics["loss_mean"]))

    def mean(*steps):
        return np.average([losses[i] for i in steps], weights=[weights[i] for i in steps])

    # A row follows step 5, and the two steps that diverged: numbers 1 and 6, counted from 0.
    expected = [mean(0), mean(0), mean(2), mean(2, 3), mean(2, 3, 4), mean(5), mean(5), mean(7)]
    assert means == pytest.approx(expected, rel=1e-6)
    assert float(state.losses.row_weight) == weights[7]


def test_a_row_without_a_step_has_no_mean(plain):
    state, _ = plain.step(plain.state(), poisoned(draw(0)))
    _, metrics = plain.step(state, poisoned(draw(1)))
    assert np.isnan(metrics["loss_mean"])


def test_a_spike_is_a_multiple_of_the_mean_of_the_phase(spiky):
    state, values = spiky.state(), []
    for seed in range(3):
        state, metrics = spiky.step(state, draw(seed))
        assert not metrics["diverged"]
        values.append(float(metrics["loss"]))
    weights = 0.99 ** np.arange(3)[::-1]
    reference = float(state.losses.reference_loss / state.losses.reference_weight)
    assert reference == pytest.approx(np.average(values, weights=weights), rel=1e-5)  # without a bias to the first loss
    before = host(state)
    state, metrics = spiky.step(dataclasses.replace(state, losses=scaled(state.losses, 1 / 2.5)), draw(3))
    assert metrics["diverged"]
    assert np.isfinite(metrics["loss"])
    assert_same_bits(host(state).parameters, before.parameters)
    assert int(state.skipped) == 1


def test_after_a_first_loss_that_diverges_others_are_no_spikes(spiky):
    state, metrics = spiky.step(spiky.state(), poisoned(draw(0)))
    assert metrics["diverged"]
    state, metrics = spiky.step(state, draw(1))
    assert not metrics["diverged"]
    assert float(metrics["loss_mean"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert int(state.skipped) == 1


def test_the_reference_follows_a_loss_that_stays_higher(spiky):
    state, _ = spiky.step(spiky.state(), draw(0))
    state = dataclasses.replace(state, losses=scaled(state.losses, 1 / 2.1))
    diverged = []
    for _ in range(8):  # a skipped loss counts as twice the reference
        state, metrics = spiky.step(state, draw(0))
        diverged.append(bool(metrics["diverged"]))
    assert diverged[0]
    assert not diverged[-1]


def test_the_reference_starts_again_with_a_phase():
    later = Bench(spike=2.0, first=3)
    state = later.state()
    for step in range(3):
        state, _ = later.step(state, draw(step))
    state, metrics = later.step(dataclasses.replace(state, losses=scaled(state.losses, 0.1)), draw(3))
    assert not metrics["diverged"]
    assert float(state.losses.reference_loss / state.losses.reference_weight) == pytest.approx(float(metrics["loss"]))


@pytest.mark.parametrize(("train", "limit"), [({"bad_loss": "skip", "max_skips": 3}, 3), ({"bad_loss": "stop"}, 1)])
def test_consecutive_skips_are_limited(train, limit):
    bench = Bench(**train)
    state, _ = bench.step(bench.state(), poisoned(draw(0)))
    state, metrics = bench.step(state, draw(0))  # an update between two skips
    assert not metrics["stops"]
    for count in range(1, limit + 1):
        state, metrics = bench.step(state, poisoned(draw(count)))
        assert bool(metrics["stops"]) == (count == limit)
    assert int(state.skipped) == limit + 1


def test_evaluation_sums_by_position(plain):
    batch = draw(0)
    batch["weights"][2:, 7:] = 0
    losses, weights, _ = build_evaluation(plain.model, plain.mesh)(plain.state().parameters, batch)
    np.testing.assert_array_equal(weights, batch["weights"].sum(0))
    np.testing.assert_allclose(losses, (plain.negative_log_likelihood(batch) * batch["weights"]).sum(0), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_in_bfloat16_have_gradients_in_float32(plain, accumulate):
    """A step equals that of float32 parameters of the same values."""
    half = Bench(param_dtype="bfloat16", accumulate=accumulate)
    state, batch = half.state(), draw(4)
    widened = jax.tree.map(lambda x: jnp.array(x, jnp.float32), state.parameters)
    expected, metrics = plain.step(dataclasses.replace(plain.state(), parameters=widened), batch)
    after, actual = half.step(state, batch)
    for name in ("loss", "grad_norm"):
        assert float(actual[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(after.optimizer), jax.tree.leaves(expected.optimizer), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert jax.tree.map(lambda x: x.dtype, after.parameters) == jax.tree.map(lambda x: x.dtype, half.model.shapes)
    assert after.parameters["embedding"]["tokens"].dtype == jnp.bfloat16
