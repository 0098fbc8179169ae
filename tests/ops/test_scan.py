"""The selective scan against a float64 loop, and its gradients against those of a plain scan."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import selective_scan
from tests.devices import simulate
from tests.messages import rejects
from tests.tolerances import assert_close

BATCH, WIDTH, STATE, CHUNK = 2, 3, 4, 8
# One position, one whole chunk, and several with a remainder; the neighbours of a whole chunk are nightly.
LENGTHS = [
    1,
    CHUNK,
    3 * CHUNK + 7,
    *(pytest.param(length, marks=pytest.mark.nightly) for length in (CHUNK - 1, CHUNK + 1)),
]
NAMES = ("x", "dt", "A", "B", "C", "state")


FORMS = {
    "sequential": {"impl": "sequential"},
    "chunked": {"impl": "chunked"},
    "tpu": {"impl": "tpu", "interpret": True},
}
by_form = pytest.mark.parametrize("form", FORMS)


def make_inputs(
    length: int, seed: int = 0, batch: int = BATCH, width: int = WIDTH, state: int = STATE
) -> tuple[np.ndarray, ...]:
    """x, dt, A, B, C and a state; decays from nearly 0 to nearly 1."""
    random = np.random.default_rng(seed)
    return tuple(
        array.astype(np.float32)
        for array in (
            random.normal(size=(batch, length, width)),
            np.exp(random.uniform(-4, 1, size=(batch, length, width))),
            -np.exp(random.uniform(-1, 1, size=(width, state))),
            random.normal(size=(batch, length, state)),
            random.normal(size=(batch, length, state)),
            random.normal(size=(batch, width, state)),
        )
    )


def make_starts(length: int) -> np.ndarray:
    starts = np.zeros((BATCH, length), bool)
    starts[0, [length // 3, length - 1]] = True
    starts[1, :: max(length // 4, 1)] = True
    return starts


def loop(x, dt, A, B, C, state, starts=None):
    """h[t] = exp(dt A) h[t-1] + dt x B, y = C h, position by position; h is reset where a document starts."""
    x, dt, A, B, C, state = (np.asarray(array, np.float64) for array in (x, dt, A, B, C, state))
    starts = None if starts is None else np.asarray(starts)
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        if starts is not None:
            state = np.where(starts[:, t, None, None], 0, state)
        decay = np.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y[:, t] = (state * C[:, t, None, :]).sum(axis=-1)
    return y, state


def plain_scan(x, dt, A, B, C, state, starts=None):
    """`loop` as one `lax.scan`; differentiable."""
    starts = np.zeros(x.shape[:2], bool) if starts is None else starts

    def advance(state, step):
        x, dt, B, C, start = step
        state = jnp.where(start[:, None, None], 0, state)
        state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
        return state, (state * C[:, None]).sum(axis=-1)

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(array, 0, 1) for array in (x, dt, B, C, starts)])
    return jnp.swapaxes(y, 0, 1), state


def differentiate(scan, inputs):
    """The outputs, and the gradients of both outputs together and of the last state alone."""
    random = np.random.default_rng(9)
    dy, d_state = (random.normal(size=(2, *shape)) for shape in (inputs[0].shape, inputs[-1].shape))
    dy[1] = 0
    outputs, vjp = jax.vjp(scan, *inputs)
    cotangents = (jnp.asarray(dy, outputs[0].dtype), jnp.asarray(d_state, outputs[1].dtype))
    return outputs, jax.vmap(vjp)(cotangents)


@by_form
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_and_its_gradients(length, documents, form):
    if form == "tpu" and length < 8:
        pytest.skip("the kernel needs 8 positions")
    inputs, starts = make_inputs(length), jnp.asarray(make_starts(length)) if documents else None
    check_values_and_gradients(inputs, starts, chunk=CHUNK, **FORMS[form])


@pytest.mark.nightly
@pytest.mark.parametrize(("width", "state", "chunk"), [(130, 17, 16), (384, 8, 32), (640, 3, 24)])
def test_blocks_of_channels_and_padded_states_of_the_kernel(width, state, chunk):
    inputs, starts = (
        make_inputs(2 * chunk + 3, 1, 1, width, state),
        jnp.zeros((1, 2 * chunk + 3), bool).at[0, 9].set(True),
    )
    check_values_and_gradients(inputs, starts, chunk=chunk, **FORMS["tpu"])


def check_values_and_gradients(inputs, starts, **options):
    scan = functools.partial(selective_scan, starts=starts, **options)
    outputs, gradients = jax.jit(functools.partial(differentiate, scan))(inputs)
    for name, *pair in zip(("y", "last"), outputs, loop(*inputs, starts), strict=True):
        assert_close(name, *pair, "float32")
    plain = functools.partial(differentiate, functools.partial(plain_scan, starts=starts))
    with jax.enable_x64(True):
        expected_gradients = jax.tree.map(np.asarray, jax.jit(plain)([np.float64(array) for array in inputs])[1])
    for name, gradient, expected in zip(NAMES, gradients, expected_gradients, strict=True):
        scale = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True)
        scale = np.where(scale > 0, scale, 1)
        assert_close(name, np.asarray(gradient) / scale, expected / scale, "float32")
    if starts is None:
        reached = [np.abs(expected[1]).max() > 0 for expected in expected_gradients]  # by the last state alone
        assert reached == [name != "C" for name in NAMES]


@pytest.mark.parametrize(
    ("chunk", "form"), [(1, "sequential"), (3, "sequential"), (3, "chunked"), (64, "sequential"), (64, "tpu")]
)
def test_the_chunk_does_not_matter(chunk, form):
    inputs = make_inputs(31)
    actual = jax.jit(functools.partial(selective_scan, chunk=chunk, **FORMS[form]))(*inputs)
    for name, *pair in zip(("y", "last"), actual, loop(*inputs), strict=True):
        assert_close(name, *pair, "float32")


@pytest.mark.parametrize("length", [9, pytest.param(33, marks=pytest.mark.nightly), 103])
def test_documents_do_not_affect_each_other(length):
    inputs = make_inputs(length)
    starts = np.zeros((BATCH, length), bool)
    starts[0, [0, 4, length - 1]] = starts[1, length // 2] = True
    scan = jax.jit(functools.partial(scan_documents, jnp.asarray(starts)))
    (y, last), d_inputs = jax.jit(functools.partial(differentiate, scan))(inputs)
    x, dt, A, B, C, state = inputs
    for row in range(BATCH):
        borders = [0, *np.flatnonzero(starts[row]), length]
        for number, (a, b) in enumerate(itertools.pairwise(borders)):
            first = state[row : row + 1] * (number == 0)
            cut = (x[row : row + 1, a:b], dt[row : row + 1, a:b], A, B[row : row + 1, a:b], C[row : row + 1, a:b])
            expected, end = loop(*cut, first)
            assert_close("y", y[row : row + 1, a:b], expected, "float32")
        assert_close("last", last[row : row + 1], end, "float32")
    assert not np.abs(d_inputs[-1][:, 0]).any() or not starts[0, 0]  # the incoming state is erased at once
    step = 1e-3
    direction = [np.random.default_rng(5).normal(size=a.shape) for a in inputs]
    random = np.random.default_rng(9)
    dy, d_state = (random.normal(size=(2, *shape))[0] for shape in (x.shape, state.shape))

    def total(sign: float) -> float:
        moved = [np.float64(a) + sign * step * d for a, d in zip(inputs, direction, strict=True)]
        with jax.enable_x64(True):
            y, end = scan(*map(jnp.asarray, moved))
        return float((y * dy).sum() + (end * d_state).sum())

    slope = sum((np.float64(g[0]) * d).sum() for g, d in zip(d_inputs, direction, strict=True))
    assert slope == pytest.approx((total(1) - total(-1)) / (2 * step), rel=2e-4)


def scan_documents(starts, *inputs):
    return selective_scan(*inputs, starts=starts)


def test_starts_from_zeros_by_default():
    *inputs, state = make_inputs(5)
    y, _ = jax.jit(selective_scan)(*inputs)
    assert_close("y", y, loop(*inputs, np.zeros_like(state))[0], "float32")


def test_gradients_are_finite_where_the_decay_underflows():
    x, dt, A, B, C, state = make_inputs(33)
    inputs = x, 0 * dt + 60, 5 * A, B, C, state  # exp(dt A) underflows to 0
    _, gradients = jax.jit(functools.partial(differentiate, selective_scan))(inputs)
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert np.isfinite(gradient).all(), name


def test_calls_of_one_position_equal_the_scan():
    *inputs, A, B, C, state = make_inputs(33)
    inputs = (*inputs, B, C)
    y, last = jax.jit(selective_scan)(*inputs[:2], A, *inputs[2:], state)
    step = jax.jit(selective_scan)
    for t in range(33):
        x, dt, b, c = (array[:, t : t + 1] for array in inputs)
        y_t, state = step(x, dt, A, b, c, state)
        assert_close("y", y_t[:, 0], y[:, t], "float32")
    assert_close("last", state, last, "float32")


@pytest.mark.parametrize("cut", [1, 45])
def test_two_parts_equal_the_whole(cut):
    x, dt, A, B, C, state = make_inputs(70)
    scan = jax.jit(selective_scan)
    whole, last = scan(x, dt, A, B, C, state)
    parts = []
    for part in (slice(None, cut), slice(cut, None)):
        y, state = scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        parts.append(y)
    assert_close("y", jnp.concatenate(parts, axis=1), whole, "float32")
    assert_close("last", state, last, "float32")


@by_form
def test_bfloat16_inputs_are_computed_in_float32(form):
    inputs = [jnp.asarray(array, jnp.bfloat16) for array in make_inputs(70)]
    y, state = jax.jit(functools.partial(selective_scan, **FORMS[form]))(*inputs)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected_y, expected_state = loop(*inputs)  # of the rounded inputs; only the output is rounded again
    assert_close("last", state, expected_state, "float32")
    np.testing.assert_allclose(y.astype(np.float32), expected_y, rtol=2**-8, atol=1e-5)


@by_form
def test_gradients_have_the_dtypes_of_the_inputs(form):
    x, dt, A, B, C, state = make_inputs(9)
    inputs = jnp.asarray(x, jnp.bfloat16), dt, A, jnp.asarray(B, jnp.bfloat16), C, state
    scan = functools.partial(selective_scan, **FORMS[form])
    _, gradients = jax.eval_shape(functools.partial(differentiate, scan), inputs)
    assert [gradient.dtype for gradient in gradients] == [array.dtype for array in inputs]


def test_vmap_with_its_gradients():
    x, dt, A, B, C, state = (np.stack(pair) for pair in zip(make_inputs(33, 0), make_inputs(33, 1), strict=True))
    run = functools.partial(differentiate, selective_scan)
    actual = jax.jit(jax.vmap(lambda x, dt, B, C, state: run([x, dt, A[0], B, C, state])))(x, dt, B, C, state)
    single = jax.jit(run)
    for i in range(2):
        expected = single([x[i], dt[i], A[0], B[i], C[i], state[i]])
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close("output or gradient", a[i], b, "float32")


@pytest.mark.parametrize("chunk", [8, 32])
def test_memory_of_the_backward_pass_grows_with_chunks(chunk):
    def kept(length: int) -> int:
        """Bytes that the backward pass keeps."""
        inputs = make_inputs(length)
        scan = functools.partial(selective_scan, chunk=chunk)
        _, vjp = jax.eval_shape(lambda *inputs: jax.vjp(scan, *inputs), *inputs)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))

    states = (kept(3200) - kept(1600)) / (1600 * 4 * BATCH)
    # Per position x, dt, B, C and its part of the chunk's state of WIDTH * STATE numbers.
    assert states == pytest.approx(2 * WIDTH + 2 * STATE + WIDTH * STATE / chunk, rel=0.01)


def test_memory_of_the_backward_pass_when_compiled():
    def temporary(length: int) -> int:
        """Temporary bytes of forward and backward pass."""
        shapes = [(1, length, 64), (1, length, 64), (64, 256), (1, length, 256), (1, length, 256), (1, 64, 256)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = jax.jit(functools.partial(differentiate_alone, functools.partial(selective_scan, chunk=32)))
        return run.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    state, positions = 4 * 64 * 256, 4 * (64 + 64 + 256 + 256)
    grown = temporary(2048) - temporary(1024)
    assert grown >= 1024 // 32 * state
    assert grown <= 1024 // 32 * state + 4 * 1024 * positions  # a state per position would be 1024 * state


def differentiate_alone(scan, *inputs):
    return jax.grad(lambda *a: sum(jnp.square(part).sum() for part in scan(*a)), argnums=tuple(range(6)))(*inputs)


def test_gradients_of_bfloat16_inputs():
    """Each form rounds the gradients of the same inputs once."""
    x, dt, A, B, C, state = make_inputs(19)
    inputs = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dt, jnp.bfloat16), A, jnp.asarray(B, jnp.bfloat16), C, state

    def gradients(form):
        scan = functools.partial(selective_scan, chunk=8, **FORMS[form])
        return jax.jit(functools.partial(differentiate, scan))(inputs)[1]

    expected = gradients("sequential")
    for form in ("chunked", "tpu"):
        for name, actual, gradient in zip(NAMES, gradients(form), expected, strict=True):
            assert_close(name, actual, gradient, "bfloat16")


@by_form
def test_derivatives_of_derivatives(form):
    """Forward over reverse and reverse over reverse against those of a plain scan in float64."""
    inputs, tangents = make_inputs(13), make_inputs(13, seed=1)

    def products(scan, dtype):
        gradient = jax.grad(lambda *a: sum(jnp.sin(part).sum() for part in scan(*a)), argnums=range(6))
        arrays, directions = ([jnp.asarray(a, dtype) for a in group] for group in (inputs, tangents))
        return jax.jvp(gradient, arrays, directions)[1], jax.vjp(gradient, *arrays)[1](tuple(directions))

    with jax.enable_x64(True):
        expected = jax.jit(lambda: products(plain_scan, jnp.float64))()[0]
    scan = functools.partial(selective_scan, chunk=8, **FORMS[form])
    for product in jax.jit(lambda: products(scan, jnp.float32))():
        for name, actual, array in zip(NAMES, product, expected, strict=True):
            scale = np.abs(array).max()
            assert_close(name, actual / scale, array / scale, "float32")


# The choice of a form


def lower(platform: str, width: int = 130, differentiated: bool = True, **options) -> str:
    """The program of a scan and its gradients for a platform, and of its vmap and remat."""
    x, state = jnp.zeros((1, 70, width)), jnp.zeros((1, 70, 4))
    scan = functools.partial(selective_scan, **options)
    loss = lambda x, A: jnp.square(scan(x, x, A, state, state)[0]).sum()  # noqa: E731
    function = jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None)) if differentiated else loss
    x = x[None] if differentiated else x
    return jax.jit(function).trace(x, jnp.ones((width, 4))).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_platform_chooses_the_form(platform):
    program = lower(platform)
    assert ("tpu_custom_call" in program) == (platform == "tpu")
    # Loops over chunks of 64 positions, and over the positions of a chunk.
    loops = {"cpu": True, "cuda": True, "rocm": True, "tpu": False}
    assert ("stablehlo.while" in program) == loops[platform]
    assert ("dense<64> : tensor<i32>" in program) == (platform == "cpu")
    single = lower(platform, differentiated=False)
    assert single.count("stablehlo.while") == {"cpu": 2, "cuda": 1, "rocm": 1, "tpu": 0}[platform]


def test_a_call_that_the_kernel_does_not_support_is_chunked_on_a_tpu():
    assert lower("tpu", differentiated=False, chunk=12).count("stablehlo.while") == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("impl", {"impl": "fast"}, id="unknown"),
        pytest.param("impl", {"impl": "tpu", "chunk": 4}, id="chunk"),
    ],
)
def test_forms_that_cannot_be_used(name, options):
    with rejects(InputError, name):
        selective_scan(*map(jnp.asarray, make_inputs(19)), **options)


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sparsejax.ops import selective_scan
from tests.ops.test_scan import make_inputs, make_starts

mesh = jax.make_mesh((2, 2, 1, 2), ("data", "fsdp", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 4)
rows = ("data", "fsdp")
specs = [P(rows, None, "tensor")] * 2 + [P("tensor")] + [P(rows)] * 2 + [P(rows, "tensor")]
inputs = make_inputs(19, batch=4, width=6)
starts = jnp.zeros((4, 19), bool).at[:, 7].set(True)

def gradients(scan, *inputs):
    loss = lambda *a: sum(jnp.sin(part).sum() for part in scan(*a, starts=starts, chunk=8))
    return jax.value_and_grad(loss, range(6))(*inputs)

expected = jax.jit(functools.partial(gradients, selective_scan))(*inputs)
shardings = [NamedSharding(mesh, spec) for spec in specs]
with jax.set_mesh(mesh):
    kernel = functools.partial(selective_scan, impl="tpu", interpret=True)
    step = jax.jit(functools.partial(gradients, kernel), in_shardings=shardings)
    results = step(*(jax.device_put(x, y) for x, y in zip(inputs, shardings)))
    # Mosaic refuses a kernel unless all axes are manual, those of size 1 and those of a sharded sequence included.
    traced = jax.jit(functools.partial(gradients, selective_scan), in_shardings=shardings).trace(*inputs)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
"""


def test_each_device_of_a_mesh_computes_its_sequences_and_channels():
    run = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | simulate(8), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
