"""State space duality in chunks against a float64 loop, its gradients against those of the plain recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import ssd
from tests.tolerances import assert_close

BATCH, HEADS, GROUPS, WIDTH, STATE, CHUNK = 2, 4, 2, 3, 5, 8
# One position, one whole chunk, and several with a remainder; the neighbours of a whole chunk are nightly.
LENGTHS = [
    1,
    CHUNK,
    3 * CHUNK + 7,
    *(pytest.param(length, marks=pytest.mark.nightly) for length in (CHUNK - 1, CHUNK + 1)),
]
NAMES = ("x", "dt", "A", "B", "C", "state")


def make_inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """x, dt, A, B, C and a state; decays from nearly 0 to nearly 1."""
    random = np.random.default_rng(seed)
    return [
        random.normal(size=(BATCH, length, HEADS, WIDTH)),
        np.exp(random.uniform(-4, 1, size=(BATCH, length, HEADS))),
        -np.exp(random.uniform(-1, 2, size=HEADS)),
        random.normal(size=(BATCH, length, GROUPS, STATE)),
        random.normal(size=(BATCH, length, GROUPS, STATE)),
        random.normal(size=(BATCH, HEADS, WIDTH, STATE)),
    ]


def make_starts(length: int) -> np.ndarray:
    starts = np.zeros((BATCH, length), bool)
    starts[0, [length // 3, length - 1]] = True
    starts[1, :: max(length // 4, 1)] = True
    return starts


def recur(x, dt, A, B, C, state, starts=None):
    """The recurrence position by position, in the dtype of the inputs; differentiable."""
    starts = np.zeros(x.shape[:2], bool) if starts is None else starts

    def advance(state, step):
        x, dt, B, C, start = step
        B, C = (jnp.repeat(a, HEADS // GROUPS, axis=1) for a in (B, C))
        state = jnp.where(start[:, None, None, None], 0, state)
        state = jnp.exp(dt * A)[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None]
        return state, (state * C[:, :, None]).sum(-1)

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(a, 0, 1) for a in (x, dt, B, C, starts)])
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


def check(length, starts, chunk):
    """Compares outputs and gradients in float32 and float64 with the recurrence in float64."""
    inputs = make_inputs(length)
    with jax.enable_x64(True):
        expected = run(functools.partial(recur, starts=starts), [jnp.asarray(a) for a in inputs])
        wide = run(functools.partial(ssd, starts=starts, chunk=chunk), [jnp.asarray(a) for a in inputs])
    actual = run(functools.partial(ssd, starts=starts, chunk=chunk), [jnp.asarray(a, jnp.float32) for a in inputs])
    for dtype, (outputs, gradients) in (("float32", actual), ("float64", wide)):
        for name, array, wanted in zip(("y", "last"), outputs, expected[0], strict=True):
            assert_close(name, array, wanted, dtype)
        for name, array, wanted in zip(NAMES, gradients, expected[1], strict=True):
            scale = max(1.0, np.abs(wanted).max())
            assert_close(f"gradient of {name}", np.asarray(array) / scale, np.asarray(wanted) / scale, dtype)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_ssd_and_its_gradients(length, documents):
    check(length, jnp.asarray(make_starts(length)) if documents else None, CHUNK)


@pytest.mark.parametrize(("chunk", "length"), [(48, 100), (100, 250), (320, 330)])
def test_chunks_of_several_blocks(chunk, length):
    """Chunks that blocks of 32 positions do not divide, and more blocks than are unrolled, with documents."""
    check(length, jnp.asarray(make_starts(length)), chunk)


def test_second_derivatives():
    def curvature(function, x, dt, *others):
        def slope(x):
            return jax.grad(lambda x: jnp.square(function(x, dt, *others)[0]).sum())(x)

        return jax.jvp(slope, (x,), (jnp.cos(x),))[1]

    inputs = make_inputs(70)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a) for a in inputs]
        expected = curvature(recur, *wide)
        assert_close("curvature", curvature(functools.partial(ssd, chunk=48), *wide), expected, "float64")


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunk_does_not_matter(chunk):
    inputs = [np.float32(a) for a in make_inputs(31)]
    actual = jax.jit(functools.partial(ssd, chunk=chunk))(*inputs)
    for name, *pair in zip(("y", "last"), actual, recur_wide(*inputs), strict=True):
        assert_close(name, *pair, "float32")


def test_calls_of_one_position_equal_the_chunks():
    *inputs, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(11))
    x, dt, A, B, C = inputs
    y, last = jax.jit(functools.partial(ssd, chunk=CHUNK))(*inputs, state)
    step = jax.jit(ssd)
    for t in range(11):
        x_t, dt_t, B_t, C_t = (a[:, t : t + 1] for a in (x, dt, B, C))
        y_t, state = step(x_t, dt_t, A, B_t, C_t, state)
        assert_close("y", y_t[:, 0], y[:, t], "float32")
    assert_close("last", state, last, "float32")


def test_strong_decay_gives_no_nan_forward_or_backward():
    x, dt, A, B, C, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(40))
    outputs, gradients = run(functools.partial(ssd, chunk=CHUNK), [x, dt + 100, 50 * A, B, C, state])
    assert all(np.isfinite(a).all() for a in (*outputs, *gradients))


@pytest.mark.parametrize("chunk", [8, 16, 32])
def test_the_backward_pass_keeps_one_state_per_chunk(chunk):
    inputs = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in make_inputs(128)]
    _, vjp = jax.eval_shape(lambda *a: jax.vjp(functools.partial(ssd, chunk=chunk), *a), *inputs)
    size = HEADS * WIDTH * STATE * BATCH
    assert sum(leaf.size for leaf in jax.tree.leaves(vjp) if leaf.size % size == 0) // size == 128 // chunk


def test_memory_of_the_backward_pass_when_compiled():
    def temporary(length: int) -> int:
        """Temporary bytes of forward and backward pass, with a state of 64 x 64."""
        shapes = [(1, length, 1, 64), (1, length, 1), (1,), (1, length, 1, 64), (1, length, 1, 64), (1, 1, 64, 64)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = lambda *a: sum(jnp.square(part).sum() for part in ssd(*a, chunk=32))  # noqa: E731
        run = jax.jit(jax.grad(loss, argnums=tuple(range(6))))
        return run.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    state, positions = 4 * 64 * 64, 4 * 3 * 64
    grown = temporary(2048) - temporary(1024)
    assert grown >= 1024 // 32 * state
    assert grown <= 1024 // 32 * state + 4 * 1024 * positions  # a state per position would be 1024 * state
