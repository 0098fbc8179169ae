"""Sequences in chunks, for recurrences whose backward pass keeps one state per chunk."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from sparsejax.errors import InputError
from sparsejax.ops.device import on_cpu
from sparsejax.ops.residuals import MIXED, STATE, name_arrays

CHUNK = 64  # positions per chunk of every recurrence, by default


def require_shapes(**arrays: tuple[Array | None, str]) -> None:
    """Raises InputError if axes of the same letter differ in size: `require_shapes(x=(x, "b t d"), A=(A, "d n"))`."""
    sizes: dict[str, int] = {}
    for name, (x, layout) in arrays.items():
        if x is None:
            continue
        axes = layout.split()
        expected = [f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes]
        if x.ndim != len(axes) or any(sizes.setdefault(*axis) != axis[1] for axis in zip(axes, x.shape, strict=True)):
            detail = f" with {', '.join(expected)}" if expected else ""
            raise InputError(name, f"shape {list(x.shape)} is not [{', '.join(axes)}]{detail}")


def scan_chunks(
    run: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    inputs: PyTree[Shaped[Array, "b t ..."]],
    chunk: int,
) -> tuple[PyTree, PyTree[Shaped[Array, "b t ..."]]]:
    """`jax.lax.scan` over the chunks of a sequence.

    Args:
      run: Maps the state before a chunk and the chunk's inputs [b, c, ...] to the state after it and its outputs
        [b, c, ...]. Inputs that are all zeros (or False) must leave the state unchanged: they pad the last chunk.
      state: The state before the first position.
      inputs: Arrays [b, t, ...], at least one.
      chunk: Positions per chunk. A shorter sequence is one chunk.

    Returns:
      The state after the last position, and the outputs of all positions. The backward pass keeps the inputs and the
      state before each chunk, and recomputes the rest.
    """
    t = jax.tree.leaves(inputs)[0].shape[1]
    chunk = min(chunk, t)

    def split(x: Array) -> Array:
        x = pad_to_multiple(x, chunk, 1)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]

    # XLA cannot merge the recomputation with the forward pass across a loop, so nothing has to prevent it.
    run = jax.checkpoint(run, prevent_cse=False)
    state, inputs = vary_alike((state, inputs))
    inputs = jax.tree.map(split, inputs)
    state, outputs = jax.lax.scan(lambda state, chunk: run(name_arrays(state, STATE), chunk), state, inputs)
    return name_arrays((state, jax.tree.map(join, outputs)), MIXED)


def broadcast_axis(x: Float[Array, " ..."], size: int, axis: int = -1) -> Float[Array, " ..."]:
    """Repeats `x` `size` times along a new axis, as a product with ones, whose transpose is a product too.

    The transpose of a broadcast is a sum, which XLA fuses with the preceding multiplication into a loop that on CPU
    takes several times as long as a matrix product.
    """
    ones = jnp.ones(size, x.dtype)
    return jnp.moveaxis(jnp.einsum("...,n->...n", x, ones, precision=jax.lax.Precision.HIGHEST), -1, axis)


def batch_matmul(x: Float[Array, "*b i j"], y: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """The matrix products of a batch.

    XLA's products for CPUs are slow with several batch axes, which are merged there. On other platforms separate axes
    keep their sharding.
    """
    if x.ndim == 3 or not on_cpu():
        return x @ y
    products = x.reshape(-1, *x.shape[-2:]) @ y.reshape(-1, *y.shape[-2:])
    return products.reshape(*x.shape[:-1], y.shape[-1])


def pad_to_multiple(x: Shaped[Array, "*shape"], multiple: int, axis: int) -> Shaped[Array, "*padded"]:
    """Appends zeros to an axis until its size is a multiple of `multiple`."""
    return jnp.pad(x, [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)])


def vary_alike(tree: PyTree) -> PyTree:
    """Returns the arrays as varying over the same mesh axes inside `jax.shard_map`, as the carry of a scan must.

    Outside, no axis is manual, and the arrays are unchanged.
    """
    axes: frozenset[str] = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree
