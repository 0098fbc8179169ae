"""Functions with an efficient reverse mode that can be differentiated in every mode and order.

`jax.custom_vjp` excludes forward mode, and so `jax.jvp`, `jax.linearize` and `jax.hessian`. Here the rule of a function
is its tangent, a linear map with an explicit transpose: reverse mode transposes it, forward mode evaluates it.
`jax.custom_derivatives.linear_call` is such a map too, but cannot be differentiated in its residuals or batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from sparsejax.ops.residuals import MIXED, name_arrays

Arrays: TypeAlias = Sequence[Any]  # of arrays


def with_derivatives(
    forward: Callable[..., tuple[PyTree, PyTree]],
    backward: Callable[[Any, PyTree, PyTree], tuple[PyTree, ...]],
    plain: Callable[..., PyTree],
    name: str | None = MIXED,
) -> Callable[..., PyTree]:
    """Returns a function of a static argument and arrays.

    Args:
      forward: Maps `(static, *arrays)` to the outputs and the residuals of `backward`.
      backward: Maps `(static, residuals, cotangents)` to a cotangent per array, or None for a constant.
      plain: Maps `(static, *arrays)` to the outputs; JAX differentiates it in forward mode.
      name: Name of the outputs and of the residuals that are no arguments, see `sparsejax.ops.residuals`.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run(static: Any, *arrays: Any) -> PyTree:
        return forward(static, *arrays)[0]

    @run.defjvp
    def differentiate(static: Any, arrays: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        leaves, tree = jax.tree.flatten(arrays)
        outputs, residuals = _name_results(forward(static, *arrays), leaves, name)
        indices = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def push(saved: tuple[PyTree, Arrays], linear: Arrays) -> PyTree:
            def at(*moved: Array) -> PyTree:
                replaced = dict(zip(indices, moved, strict=True))
                return plain(static, *jax.tree.unflatten(tree, [replaced.get(i, x) for i, x in enumerate(saved[1])]))

            return jax.jvp(at, [saved[1][i] for i in indices], linear)[1]

        def pull(saved: tuple[PyTree, Arrays], cotangents: PyTree) -> Arrays:
            pulled: list[Array | None] = []
            for array, cotangent in zip(arrays, backward(static, saved[0], cotangents), strict=True):
                pulled += [None] * len(jax.tree.leaves(array)) if cotangent is None else jax.tree.leaves(cotangent)
            return [jnp.zeros_like(leaves[i]) if pulled[i] is None else pulled[i] for i in indices]

        moved = jax.tree.leaves(tangents)
        return outputs, linear_map(push, pull, (residuals, leaves), [moved[i] for i in indices], outputs)

    return run


def differentiate_as(plain: Callable[..., PyTree], function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns `function` with the derivatives of `plain`, in every mode; both map `(static, *arrays)` to the same."""

    def forward(static: Any, *arrays: Any) -> tuple[PyTree, PyTree]:
        return function(static, *arrays), arrays

    def backward(static: Any, arrays: tuple[Any, ...], cotangents: PyTree) -> tuple[PyTree, ...]:
        return jax.vjp(functools.partial(plain, static), *arrays)[1](cotangents)

    return with_derivatives(forward, backward, plain, name=None)


def _name_results(results: PyTree, arguments: Arrays, name: str | None) -> PyTree:
    """Names the arrays in the results of a forward pass that are not among its arguments, equal ones once."""
    if name is None:
        return results
    named = {id(x): x for x in arguments}
    for x in jax.tree.leaves(results):
        if id(x) not in named:
            named[id(x)] = name_arrays(x, name)
    return jax.tree.map(lambda x: named[id(x)], results)


def reject_forward_mode(arrays: PyTree, problem: str) -> PyTree:
    """Returns the arrays; raises TypeError with `problem` where forward mode evaluates their tangents."""

    def push(_: PyTree, linear: Arrays) -> Arrays:
        raise TypeError(problem)

    @jax.custom_jvp
    def guard(leaves: Arrays) -> Arrays:
        return leaves

    @guard.defjvp
    def differentiate(primals: tuple[Arrays], tangents: tuple[Arrays]) -> tuple[Arrays, Arrays]:
        return primals[0], linear_map(push, lambda _, cotangents: cotangents, (), tangents[0], primals[0])

    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, guard(leaves))


def linear_map(
    function: Callable[[PyTree, Arrays], PyTree],
    transpose: Callable[[PyTree, PyTree], Arrays],
    residuals: PyTree,
    linear: Arrays,
    outputs: PyTree,
) -> PyTree:
    """Returns `function(residuals, linear)`, whose transpose in `linear` is `transpose(residuals, cotangents)`.

    Args:
      function: Linear in its second argument.
      transpose: Its transpose.
      residuals: The first argument of both; they may be differentiated in it.
      linear: Arrays.
      outputs: Arrays with the types of the result.
    """
    saved, saved_tree = jax.tree.flatten(residuals)
    examples, tree = jax.tree.flatten(outputs)

    def push(*operands: Array) -> Arrays:
        results = function(jax.tree.unflatten(saved_tree, operands[: len(saved)]), list(operands[len(saved) :]))
        return jax.tree.leaves(results)

    def pull(*operands: Array) -> Arrays:
        cotangents = jax.tree.unflatten(tree, operands[len(saved) :])
        return transpose(jax.tree.unflatten(saved_tree, operands[: len(saved)]), cotangents)

    types = tuple(jax.typeof(example) for example in examples)
    results = _linear_map.bind(*saved, *linear, push=push, pull=pull, saved=len(saved), types=types)
    return jax.tree.unflatten(tree, results)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True


@_linear_map.def_impl
def _evaluate(*operands: Array, push: Callable[..., Arrays], **_: Any) -> Arrays:
    return push(*operands)


@_linear_map.def_abstract_eval
def _types(*_: Any, types: tuple[Any, ...], **__: Any) -> tuple[Any, ...]:
    return types


def _differentiate(primals: Arrays, tangents: Arrays, **parameters: Any) -> tuple[Arrays, Arrays]:
    """The map's own derivative: linear in its last operands, and differentiated as it is in its residuals."""
    moved = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def at(*values: Array) -> Arrays:
        replaced = dict(zip(moved, values, strict=True))
        return parameters["push"](*(replaced.get(i, primal) for i, primal in enumerate(primals)))

    return jax.jvp(at, [primals[i] for i in moved], [tangents[i] for i in moved])


def _transpose(cotangents: Arrays, *operands: Any, pull: Callable[..., Arrays], saved: int, **_: Any) -> list[Any]:
    filled = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    gradients = pull(*operands[:saved], *filled)
    linear = zip(operands[saved:], gradients, strict=True)
    return [None] * saved + [gradient if ad.is_undefined_primal(x) else None for x, gradient in linear]


def _batch(
    operands: Sequence[Array],
    axes: Sequence[Any],
    *,
    push: Callable[..., Arrays],
    pull: Callable[..., Arrays],
    saved: int,
    types: tuple[Any, ...],
) -> tuple[Arrays, Sequence[int]]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    operands = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    # A linear operand that is not batched becomes one, so that its transpose is the sum over the batch.
    operands[saved:] = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
        for x, axis in zip(operands[saved:], axes[saved:], strict=True)
    ]
    mapped = [None if axis is None else 0 for axis in axes[:saved]]
    push = jax.vmap(push, in_axes=[*mapped, *[0] * (len(operands) - saved)])
    pull = jax.vmap(pull, in_axes=[*mapped, *[0] * len(types)])
    types = tuple(map(jax.typeof, jax.eval_shape(push, *operands)))
    return _linear_map.bind(*operands, push=push, pull=pull, saved=saved, types=types), [0] * len(types)


ad.primitive_jvps[_linear_map] = _differentiate
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))
