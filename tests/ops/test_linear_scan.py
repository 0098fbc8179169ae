"""The linear recurrence in chunks against a float64 loop, its gradients against those of the plain recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import linear_scan, linear_step
from tests.tolerances import assert_close

BATCH, WIDTH, CHUNK = 2, 5, 8
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
NAMES = ("x", "log_decay", "state")


def make_inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """x, log_decay and a state; decays from nearly nothing to nearly everything."""
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
    """One position after the other, in the dtype of the inputs; jnp, so that it can be differentiated."""
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = jnp.where(starts[:, t, None], 0, state)
        state = jnp.exp(log_decay[:, t]) * state + x[:, t]
        ys.append(state)
    return jnp.stack(ys, axis=1), state


def run(function, inputs):
    """Outputs, and gradients of a weighted sum of both."""
    random = np.random.default_rng(3)
    weights = [random.normal(size=shape) for shape in (inputs[0].shape, inputs[-1].shape)]
    outputs, vjp = jax.vjp(function, *inputs)
    return outputs, vjp(tuple(jnp.asarray(w, o.dtype) for w, o in zip(weights, outputs, strict=True)))


def compare(found, wanted, dtype: str):
    (outputs, gradients), (true_outputs, true_gradients) = found, wanted
    for name, one, other in zip(("y", "last"), outputs, true_outputs, strict=True):
        assert_close(name, one, other, dtype)
    for name, one, other in zip(NAMES, gradients, true_gradients, strict=True):
        scale = max(1.0, np.abs(other).max())
        assert_close(f"gradient of {name}", np.asarray(one) / scale, np.asarray(other) / scale, dtype)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence_and_so_do_their_gradients(length, documents):
    inputs, starts = make_inputs(length), make_starts(length) if documents else None
    chunks = functools.partial(linear_scan, starts=starts, chunk=CHUNK)
    with jax.enable_x64(True):
        wanted = run(functools.partial(recur, starts=starts), [jnp.asarray(a) for a in inputs])
        compare(run(chunks, [jnp.asarray(a) for a in inputs]), wanted, "float64")
    compare(run(chunks, [jnp.asarray(a, jnp.float32) for a in inputs]), wanted, "float32")


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunk_does_not_matter(chunk):
    inputs = [np.float32(a) for a in make_inputs(31)]
    for one, other in zip(linear_scan(*inputs, chunk=chunk), recur(*map(np.float64, inputs)), strict=True):
        assert_close(f"chunk {chunk}", one, other, "float32")


def test_steps_equal_the_chunks():
    x, log_decay, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(11))
    y, last = linear_scan(x, log_decay, state, chunk=CHUNK)
    for t in range(11):
        y_t, state = linear_step(x[:, t], log_decay[:, t], state)
        assert_close("y", y_t, y[:, t], "float32")
    assert_close("last", state, last, "float32")


def test_strong_decay_gives_no_nan_forward_or_backward():
    x, log_decay, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(40))
    outputs, gradients = run(functools.partial(linear_scan, chunk=CHUNK), [x, 1e4 * log_decay, state])
    assert all(np.isfinite(a).all() for a in (*outputs, *gradients))


def test_starts_from_zeros_by_default():
    x, log_decay, state = make_inputs(5)
    y, _ = linear_scan(np.float32(x), np.float32(log_decay))
    assert_close("y", y, recur(x, log_decay, np.zeros_like(state))[0], "float32")


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = [jnp.asarray(a, jnp.bfloat16) for a in make_inputs(29)]
    y, last = linear_scan(*inputs, chunk=CHUNK)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    true_y, true_last = recur(*(np.asarray(a, np.float64) for a in inputs))  # of the rounded inputs
    assert_close("last", last, true_last, "float32")
    assert_close("y", y.astype(jnp.float32), true_y, "bfloat16")


def test_the_backward_pass_keeps_decays_and_states_and_no_more():
    def kept(length: int) -> int:
        inputs = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in make_inputs(length)]
        _, vjp = jax.eval_shape(lambda *a: jax.vjp(linear_scan, *a), *inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    assert kept(128) - kept(64) <= 64 * BATCH * WIDTH * 3  # two here, and the decay for the gradient of its exponent
