"""The linear recurrence in chunks against a float64 loop, its gradients against those of the plain recurrence."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import linear_scan
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

BATCH, WIDTH, CHUNK = 2, 5, 8
# One position, one whole chunk, and several with a remainder; the neighbours of a whole chunk are nightly.
LENGTHS = [
    1,
    CHUNK,
    3 * CHUNK + 7,
    *(pytest.param(length, marks=pytest.mark.nightly) for length in (CHUNK - 1, CHUNK + 1)),
]
NAMES = ("x", "log_decay", "state")


def make_inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """x, log_decay and a state; decays from nearly 0 to nearly 1."""
    random = np.random.default_rng(seed)
    return [
        random.normal(size=(BATCH, length, WIDTH)),
        -np.exp(random.uniform(-5, 2, size=(BATCH, length, WIDTH))),
        random.normal(size=(BATCH, WIDTH)),
    ]


def make_starts(length: int) -> np.ndarray:
    starts = np.zeros((BATCH, length), bool)
    starts[0, [length // 3, length - 1]] = True
    starts[1, :: max(length // 4, 1)] = True
    return starts


def recur(x, log_decay, state, starts=None):
    """The recurrence position by position, in the dtype of the inputs; differentiable."""
    starts = jnp.zeros(x.shape[:2], bool) if starts is None else starts

    def advance(state, step):
        x, log_decay, start = step
        state = jnp.exp(log_decay) * jnp.where(start[:, None], 0, state) + x
        return state, state

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(a, 0, 1) for a in (x, log_decay, starts)])
    return jnp.swapaxes(y, 0, 1), state


def recur_wide(*inputs):
    """`recur` in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, recur(*(jnp.asarray(a, jnp.float64) for a in inputs)))


def run(function, inputs):
    """Outputs, and gradients of a weighted sum of them."""
    random = np.random.default_rng(3)
    weights = [random.normal(size=shape) for shape in (inputs[0].shape, inputs[-1].shape)]

    def differentiate(*inputs):
        outputs, vjp = jax.vjp(function, *inputs)
        return outputs, vjp(tuple(jnp.asarray(w, o.dtype) for w, o in zip(weights, outputs, strict=True)))

    return jax.jit(differentiate)(*inputs)


def compare(actual, expected, dtype: str):
    for name, array, wanted in zip(("y", "last"), actual[0], expected[0], strict=True):
        assert_close(name, array, wanted, dtype)
    for name, array, wanted in zip(NAMES, actual[1], expected[1], strict=True):
        scale = max(1.0, np.abs(wanted).max())
        assert_close(f"gradient of {name}", np.asarray(array) / scale, np.asarray(wanted) / scale, dtype)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_linear_scan_and_its_gradients(length, documents):
    inputs, starts = make_inputs(length), jnp.asarray(make_starts(length)) if documents else None
    chunks = functools.partial(linear_scan, starts=starts, chunk=CHUNK)
    with jax.enable_x64(True):
        expected = run(functools.partial(recur, starts=starts), [jnp.asarray(a) for a in inputs])
        compare(run(chunks, [jnp.asarray(a) for a in inputs]), expected, "float64")
    compare(run(chunks, [jnp.asarray(a, jnp.float32) for a in inputs]), expected, "float32")


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunk_does_not_matter(chunk):
    inputs = [np.float32(a) for a in make_inputs(31)]
    actual = jax.jit(functools.partial(linear_scan, chunk=chunk))(*inputs)
    for name, *pair in zip(("y", "last"), actual, recur_wide(*inputs), strict=True):
        assert_close(name, *pair, "float32")


def test_calls_with_the_state_of_the_call_before_equal_one_call():
    x, log_decay, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(11))
    y, last = linear_scan(x, log_decay, state, chunk=CHUNK)
    for start, stop in itertools.pairwise((0, 1, 2, 9, 11)):
        part, state = linear_scan(x[:, start:stop], log_decay[:, start:stop], state, chunk=CHUNK)
        assert_close("y", part, y[:, start:stop], "float32")
    assert_close("last", state, last, "float32")


def test_strong_decay_gives_no_nan_forward_or_backward():
    x, log_decay, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(40))
    outputs, gradients = run(functools.partial(linear_scan, chunk=CHUNK), [x, 1e4 * log_decay, state])
    assert all(np.isfinite(a).all() for a in (*outputs, *gradients))


def test_starts_from_zeros_by_default():
    x, log_decay, state = make_inputs(5)
    y, _ = jax.jit(linear_scan)(np.float32(x), np.float32(log_decay))
    assert_close("y", y, recur_wide(x, log_decay, 0 * state)[0], "float32")


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = [jnp.asarray(a, jnp.bfloat16) for a in make_inputs(29)]
    y, last = linear_scan(*inputs, chunk=CHUNK)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    true_y, true_last = recur_wide(*inputs)  # of the rounded inputs
    assert_close("last", last, true_last, "float32")
    assert_close("y", y.astype(jnp.float32), true_y, "bfloat16")


def test_the_backward_pass_keeps_decays_and_states_only():
    def kept(length: int) -> int:
        inputs = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in make_inputs(length)]
        _, vjp = jax.eval_shape(lambda *a: jax.vjp(linear_scan, *a), *inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    assert kept(128) - kept(64) <= 64 * BATCH * WIDTH * 3  # two, and the decay for the gradient of its exponent
