"""Products and sums of broadcast arrays against those of NumPy in float64, with their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import causal_conv
from sparsejax.ops.broadcast import add, multiply
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

SHAPES = {
    "channels": ((3, 4, 5), (5,)),
    "vectors": ((3, 4, 5), (3, 4, 1)),
    "heads": ((3, 4, 5, 2), (5, 1)),
    "both": ((2, 1, 5), (1, 4, 5)),
    "middle": ((2, 3, 4, 5), (2, 1, 1, 5)),
    "apart": ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6)),
    "scalar": ((3,), ()),
    "equal": ((1, 4, 1), (1, 4, 1)),
    "ones": ((3, 4), (1, 1)),
    "empty": ((0, 4), (4,)),
}


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng()
    return [random.normal(size=shape) for shape in shapes]


def fold(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum of `x` over the copies of an array of this shape."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1 != x.shape[i]), keepdims=True)


@pytest.mark.parametrize("function", [multiply, add])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(function, shapes):
    x, y, g = draw(*shapes, np.broadcast_shapes(*shapes))
    output, vjp = jax.vjp(function, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    expected = (x * y, g * y, g * x) if function is multiply else (x + y, g, g)
    actual = output, *vjp(jnp.asarray(g, jnp.float32))
    for name, array, wanted in zip(("output", "x", "y"), actual, expected, strict=True):
        assert_close(name, array, fold(np.broadcast_to(wanted, g.shape), array.shape), "float32")


DERIVATIVES = {
    "second": jax.hessian,
    "forward over reverse": lambda function: jax.jacfwd(jax.grad(function)),
    "batch": lambda function: lambda y: jax.vmap(jax.grad(function))(jnp.stack([y, 2 * y])),
}


@pytest.mark.parametrize("function", [multiply, add])
@pytest.mark.parametrize("transform", DERIVATIVES.values(), ids=DERIVATIVES)
def test_other_derivatives(function, transform):
    x, y = (jnp.asarray(a, jnp.float32) for a in draw((2, 3, 4), (4,)))
    plain = jnp.multiply if function is multiply else jnp.add
    actual, expected = (transform(lambda y, f=f: jnp.sin(f(x, y) * y).sum())(y) for f in (function, plain))
    assert_close("derivative", actual, expected, "float32")


def test_dtypes_are_promoted_and_gradients_keep_theirs():
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones(3, jnp.float32)
    output, vjp = jax.vjp(multiply, x, y)
    assert output.dtype == jnp.float32
    assert [g.dtype for g in vjp(output)] == [jnp.bfloat16, jnp.float32]


def test_a_convolution_keeps_its_inputs_only():
    x, taps = jax.ShapeDtypeStruct((2, 50, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    _, vjp = jax.eval_shape(lambda *a: jax.vjp(causal_conv, *a), x, taps)
    sizes = [leaf.size for leaf in jax.tree.leaves(vjp) if leaf.size > 1]
    assert sum(sizes) == 2 * 53 * 8 + 4 * 8
