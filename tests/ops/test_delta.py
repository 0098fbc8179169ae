"""The gated delta rule in chunks against a float64 loop, its gradients against those of the plain recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import delta_rule
from tests.tolerances import assert_close

BATCH, HEADS, GROUPS, KEY, VALUE, CHUNK = 2, 4, 2, 5, 3, 8
# One position, one whole chunk, and several with a remainder; the neighbours of a whole chunk are nightly.
LENGTHS = [
    1,
    CHUNK,
    3 * CHUNK + 7,
    *(pytest.param(length, marks=pytest.mark.nightly) for length in (CHUNK - 1, CHUNK + 1)),
]
NAMES = ("q", "k", "v", "log_decay", "beta", "state")
EACH_DECAY = pytest.mark.parametrize("channels", [False, True], ids=["per-head", "per-channel"])


def make_inputs(length: int, channels: bool, seed: int = 0) -> list[np.ndarray]:
    """q, k, v, log_decay, beta and a state; unit keys, and decays from nearly 0 to nearly 1."""
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(2, BATCH, length, GROUPS, KEY))
    return [
        q,
        k / np.linalg.norm(k, axis=-1, keepdims=True),
        random.normal(size=(BATCH, length, HEADS, VALUE)),
        -np.exp(random.uniform(-5, 2, size=(BATCH, length, HEADS, *[KEY] * channels))),
        random.uniform(0.05, 0.95, size=(BATCH, length, HEADS)),
        random.normal(size=(BATCH, HEADS, KEY, VALUE)),
    ]


def make_starts(length: int) -> np.ndarray:
    starts = np.zeros((BATCH, length), bool)
    starts[0, [length // 3, length - 1]] = True
    starts[1, :: max(length // 4, 1)] = True
    return starts


def recur(q, k, v, log_decay, beta, state, starts=None):
    """The recurrence position by position, in the dtype of the inputs; differentiable."""
    share = v.shape[2] // k.shape[2]
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    starts = jnp.zeros(v.shape[:2], bool) if starts is None else starts

    def advance(state, position):
        q, k, v, log_decay, beta, start = position
        query, key = (jnp.repeat(a, share, axis=1)[..., None] for a in (q, k))
        state = jnp.exp(log_decay)[..., None] * jnp.where(start[:, None, None, None], 0, state)
        change = beta[..., None] * (v - (state * key).sum(-2))
        state = state + key * change[:, :, None]
        return state, (state * query).sum(-2)

    positions = [jnp.swapaxes(a, 0, 1) for a in (q, k, v, log_decay, beta, starts)]
    state, y = jax.lax.scan(advance, state, positions)
    return jnp.swapaxes(y, 0, 1), state


@functools.partial(jax.jit, static_argnums=0)
def run(function, inputs, starts=None):
    """Outputs, and gradients of a weighted sum of them."""
    random = np.random.default_rng(3)
    weights = [random.normal(size=shape) for shape in (inputs[2].shape, inputs[-1].shape)]
    outputs, vjp = jax.vjp(functools.partial(function, starts=starts), *inputs)
    return outputs, vjp(tuple(jnp.asarray(w, o.dtype) for w, o in zip(weights, outputs, strict=True)))


def run_wide(function, inputs, starts=None):
    """`run` in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(function, [jnp.asarray(a, jnp.float64) for a in inputs], starts))


def compare(actual, expected, dtype: str):
    for name, array, wanted in zip(("y", "last"), actual[0], expected[0], strict=True):
        assert_close(name, array, wanted, dtype)
    for name, array, wanted in zip(NAMES, actual[1], expected[1], strict=True):
        scale = max(1.0, np.abs(wanted).max())
        assert_close(f"gradient of {name}", np.asarray(array) / scale, np.asarray(wanted) / scale, dtype)


CHUNKS = functools.partial(delta_rule, chunk=CHUNK)


@EACH_DECAY
@pytest.mark.parametrize("length", LENGTHS)
def test_delta_rule_and_its_gradients(length, channels):
    inputs = make_inputs(length, channels)
    for starts in (make_starts(length), np.zeros((BATCH, length), bool)):
        expected = run_wide(recur, inputs, starts)
        compare(run_wide(CHUNKS, inputs, starts), expected, "float64")
        if length > CHUNK:  # several chunks lose the most digits
            compare(run(CHUNKS, [np.float32(a) for a in inputs], starts), expected, "float32")


@EACH_DECAY
@pytest.mark.parametrize("chunk", [1, 6, 64])
def test_the_chunk_does_not_matter(chunk, channels):
    inputs = make_inputs(13, channels)
    actual = run(functools.partial(delta_rule, chunk=chunk), [np.float32(a) for a in inputs])
    compare(actual, run_wide(recur, inputs), "float32")


@EACH_DECAY
def test_calls_of_one_position_equal_the_chunks(channels):
    *inputs, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(11, channels))
    y, last = jax.jit(CHUNKS)(*inputs, state)
    step = jax.jit(delta_rule)
    for t in range(11):
        y_t, state = step(*(a[:, t : t + 1] for a in inputs), state)
        assert_close("y", y_t[:, 0], y[:, t], "float32")
    assert_close("last", state, last, "float32")


@pytest.mark.parametrize("cut", [CHUNK, 13])
def test_two_parts_equal_the_whole(cut):
    *inputs, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(29, channels=True))
    rule = jax.jit(CHUNKS)
    whole, last = rule(*inputs, state)
    first, state = rule(*(a[:, :cut] for a in inputs), state)
    second, state = rule(*(a[:, cut:] for a in inputs), state)
    assert_close("y", jnp.concatenate([first, second], axis=1), whole, "float32")
    assert_close("last", state, last, "float32")


def test_equal_decays_of_all_channels_are_a_decay_of_the_head():
    q, k, v, decay, beta, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(29, channels=False))
    channels = jnp.broadcast_to(decay[..., None], (*decay.shape, KEY))
    rule = jax.jit(CHUNKS)
    for name, *pair in zip(
        ("y", "last"), rule(q, k, v, channels, beta, state), rule(q, k, v, decay, beta, state), strict=True
    ):
        assert_close(name, *pair, "float32")


@EACH_DECAY
def test_strong_decay_gives_no_nan_forward_or_backward(channels):
    q, k, v, decay, beta, state = (np.float32(a) for a in make_inputs(31, channels))
    stronger = np.where(np.arange(31) % 3 == 0, 1e4, 30.0).reshape(1, 31, *[1] * (decay.ndim - 2))
    inputs = [q, k, v, np.float32(decay * stronger), beta, state]
    compare(run(CHUNKS, inputs), run_wide(recur, inputs), "float32")  # which fails at NaN


@EACH_DECAY
def test_equal_keys_without_decay_lose_no_digits(channels):
    q, k, v, decay, beta, state = (np.float32(a) for a in make_inputs(32, channels))
    inputs = [q, np.broadcast_to(k[:, :1], k.shape), v, 0 * decay, 0 * beta + np.float32(0.99), state]
    compare(run(delta_rule, inputs), run_wide(recur, inputs), "float32")


def test_a_full_step_stores_the_value_for_its_key():
    _, k, v, decay, beta, state = (np.float32(a) for a in make_inputs(9, channels=False))
    y, _ = jax.jit(CHUNKS)(k, k, v, decay, 0 * beta + 1, state)
    assert_close("the value of the key just stored", y, v, "float32")


def test_starts_from_zeros_by_default():
    *inputs, state = make_inputs(5, channels=True)
    y, _ = jax.jit(delta_rule)(*map(np.float32, inputs))
    assert_close("y", y, run_wide(recur, [*inputs, 0 * state])[0][0], "float32")


def test_bfloat16_inputs_are_computed_in_float32():
    *inputs, state = (jnp.asarray(a, jnp.bfloat16) for a in make_inputs(29, channels=True))
    y, last = jax.jit(CHUNKS)(*inputs, state)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    true_y, true_last = run_wide(recur, [*inputs, state])[0]  # of the rounded inputs
    assert_close("last", last, true_last, "float32")
    assert_close("y", y.astype(jnp.float32), true_y, "bfloat16")


@EACH_DECAY
def test_the_backward_pass_keeps_one_state_per_chunk(channels):
    def kept(length: int, chunk: int) -> int:
        inputs = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in make_inputs(length, channels)]
        _, vjp = jax.eval_shape(lambda *a: jax.vjp(functools.partial(delta_rule, chunk=chunk), *a), *inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    by_group, by_head = 2 * KEY + 1, VALUE + (KEY if channels else 1) + 1  # inputs and starts per position
    numbers = BATCH * (GROUPS * by_group + HEADS * by_head)
    states = BATCH * HEADS * KEY * VALUE
    assert kept(128, 16) - kept(64, 16) == pytest.approx(64 * numbers + 64 / 16 * states, rel=0.02)
