"""Products and sums of arrays that are broadcast, whose gradients are sums by matrix products.

The gradient of a broadcast array is a sum over its copies. On CPU, XLA compiles that sum and the product before it to
one loop, which takes several times as long as a product with ones.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import with_derivatives


def multiply(x: Float[Array, "*a"], y: Float[Array, "*b"]) -> Float[Array, "*c"]:
    """The product in the common dtype of `x` and `y`, whose shapes broadcast as in NumPy."""
    dtype = jnp.result_type(x, y)
    return _multiply(None, *vary_alike((x.astype(dtype), y.astype(dtype))))


def add(x: Float[Array, "*a"], y: Float[Array, "*b"]) -> Float[Array, "*c"]:
    """The sum in the common dtype of `x` and `y`, whose shapes broadcast as in NumPy."""
    dtype = jnp.result_type(x, y)
    return _add((x.shape, y.shape), *vary_alike((x.astype(dtype), y.astype(dtype))))


def sum_to(x: Float[Array, "*a"], shape: tuple[int, ...]) -> Float[Array, "*b"]:
    """The sum of the copies of an array of this shape that was broadcast to the shape of `x`."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    summed = [before != after for before, after in zip(x.shape, padded, strict=True)]
    last = next((i for i in range(x.ndim) if all(summed[i:])), x.ndim)  # first of the trailing axes of the sum
    if last < x.ndim:
        x = _contract(x, jnp.ones(x.shape[last:], x.dtype), range(last, x.ndim), range(x.ndim - last))
    first = next((i for i in range(last) if not summed[i]), last)  # number of leading axes of the sum
    if first:
        x = _contract(jnp.ones(x.shape[:first], x.dtype), x, range(first), range(first))
    middle = tuple(i - first for i in range(first, last) if summed[i])
    return _sum_middle(x, middle).reshape(shape)


def _sum_middle(x: Float[Array, "*a"], axes: tuple[int, ...]) -> Float[Array, "*b"]:
    """The sum over axes between others, as a batch of products if the axes are adjacent."""
    if not axes or axes[-1] - axes[0] >= len(axes):
        return x.sum(axis=axes)
    shape = x.shape[: axes[0]], x.shape[axes[-1] + 1 :]
    x = x.reshape(math.prod(shape[0]), -1, math.prod(shape[1]))
    ones = jnp.ones(x.shape[:2], x.dtype)
    sums = jax.lax.dot_general(ones, x, (((1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*shape[0], *shape[1])


def _contract(x: Array, y: Array, x_axes: range, y_axes: range) -> Array:
    axes = ((tuple(x_axes), tuple(y_axes)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=jax.lax.Precision.HIGHEST)


def _multiply_forward(_, x, y):
    return x * y, (x, y)


def _multiply_backward(_, residuals, g):
    x, y = residuals
    return sum_to(g * y, x.shape), sum_to(g * x, y.shape)


def _add_forward(_, x, y):
    return x + y, ()


def _add_backward(shapes, _, g):
    return tuple(sum_to(g, shape) for shape in shapes)


_multiply = with_derivatives(_multiply_forward, _multiply_backward, lambda _, x, y: x * y, name=None)
_add = with_derivatives(_add_forward, _add_backward, lambda _, x, y: x + y, name=None)
