"""The selective scan of Mamba (arXiv:2312.00752, algorithm 2), in chunks.

Per channel d, with a state of n numbers:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]
    y[t] = C[t] h[t]

B is discretised by Euler's rule, as in the released code, instead of zero-order hold. Chunks run sequentially. The
positions of a chunk run sequentially, too (`sequential`), or as a parallel prefix over pairs of decay and input
(`chunked`, Blelloch 1990), or in a kernel for TPUs (`tpu`). The backward pass keeps one state per chunk, from which it
recomputes the states of the chunk, and from these the rest. All forms keep the same states, so that the platform for
which a program is lowered chooses between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from sparsejax.errors import InputError
from sparsejax.ops.chunks import CHUNK, broadcast_axis, pad_to_multiple, require_shapes, vary_alike
from sparsejax.ops.derivatives import differentiate_as, with_derivatives
from sparsejax.ops.kernels import tpu_scan
from sparsejax.ops.kernels.tpu_scan import ScanInputs
from sparsejax.ops.sequence import carry_state, divides, map_shards

IMPLEMENTATIONS = "auto", "sequential", "chunked", "tpu"

# Several times faster on CPU than broadcasts and sums; see `broadcast_axis`.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    state: Float[Array, "b d n"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
    impl: str = "auto",
    interpret: bool = False,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """Mamba's recurrence, computed in float32.

    Args:
      x: Input.
      dt: Step sizes, positive.
      A: Decay rates, negative.
      B: Input weights.
      C: Output weights.
      state: The state before the first position; defaults to zeros.
      starts: True where a document begins; the state before it counts as zeros.
      chunk: Positions per chunk; does not change the result.
      impl: "sequential" visits one position at a time. "chunked" visits one chunk at a time, and needs the memory of
        all states of a chunk. "tpu" is a kernel, for chunks of a multiple of 8 positions; channels are padded to a
        multiple of 128. "auto" is, on the platform for which the program is lowered, "sequential" on a CPU, "tpu" on a
        TPU if the kernel supports the call, and else "chunked".
      interpret: Whether "tpu" interprets the kernel, on any platform.

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32. The backward pass keeps
      `t / chunk` states instead of `t`. Forward mode and derivatives of derivatives do not use the kernel.

    Raises:
      InputError: Shapes do not fit, `impl` is unknown, or the kernel does not support the call.
    """
    weights = {"A": (A, "d n"), "B": (B, "b t n"), "C": (C, "b t n")}
    require_shapes(x=(x, "b t d"), dt=(dt, "b t d"), **weights, state=(state, "b d n"), starts=(starts, "b t"))
    if impl not in IMPLEMENTATIONS:
        raise InputError("impl", f"{impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    b, t, d = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    A, state = A.astype(dtype), jnp.zeros((b, d, A.shape[1]), dtype) if state is None else state.astype(dtype)
    if divides(t):
        run = functools.partial(_scan_shard, chunk=chunk, impl=impl, interpret=interpret)
        y, states = map_shards(run, (x, dt, B, C, starts), (A, state), outputs=(1, 0))
        return y, states[-b:]
    inputs, starts = vary_alike((ScanInputs(x, dt, A.T, B, C, state.swapaxes(1, 2)), starts))
    chunk = min(chunk, t)
    reason = tpu_scan.unsupported_reason(inputs, chunk)
    if impl == "tpu" and reason is not None:
        raise InputError("impl", f"the kernel for TPUs does not support this call: {reason}")
    y, state = _scan(_Config(chunk, impl, interpret, reason is None), inputs, starts)
    return y, state.swapaxes(1, 2)


def _scan_shard(
    inputs: tuple[Array, Array, Array, Array, Array | None], replicated: tuple[Array, Array], **options: Any
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """The output of a shard, and the state after it. The states of a shard are computed twice."""
    (x, dt, B, C, starts), (A, state) = inputs, replicated
    _, added = selective_scan(x, dt, A, B, jax.lax.stop_gradient(C), starts=starts, **options)
    decay = jnp.exp(dt.astype(A.dtype).sum(axis=1)[..., None] * A)
    decay = decay if starts is None else jnp.where(starts.any(axis=1)[:, None, None], 0, decay)
    before, after = carry_state(decay, added, state)
    return selective_scan(x, dt, A, B, C, before, starts, **options)[0], after


# A chunk: the state after it, and its outputs in the dtype of x.

_Chunk: TypeAlias = tuple[Array, Array, Array, Array, Array | None]  # x, dt, B, C, starts


def _run_sequentially(
    A: Float[Array, "n d"], state: Float[Array, "b n d"], chunk: _Chunk
) -> tuple[Float[Array, "b n d"], Float[Array, "b c d"]]:
    """One position at a time."""
    *inputs, starts = chunk
    inputs = [x.astype(A.dtype) for x in inputs], starts
    advance = jax.checkpoint(functools.partial(_advance, A), prevent_cse=False)
    state, y = jax.lax.scan(advance, state, jax.tree.map(lambda x: x.swapaxes(0, 1), inputs))
    return state, y.swapaxes(0, 1).astype(chunk[0].dtype)


def _advance(
    A: Float[Array, "n d"], state: Float[Array, "b n d"], position: tuple[list[Array], Array | None]
) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """One step, with the long axis of the state contiguous."""
    (x, dt, B, C), start = position
    if start is not None:
        state = jnp.where(start[:, None, None], 0, state)
    decay = jnp.exp(broadcast_axis(dt, A.shape[0], axis=1) * A)
    state = decay * state + _einsum("bn,bd->bnd", B, dt * x)
    return state, _einsum("bn,bnd->bd", C, state)


def _run_in_parallel(
    A: Float[Array, "n d"], state: Float[Array, "b n d"], chunk: _Chunk
) -> tuple[Float[Array, "b n d"], Float[Array, "b c d"]]:
    """All positions at once. Broadcasts and sums instead of products, for the compiler to fuse."""
    x, dt, B, C = (x.astype(A.dtype) for x in chunk[:4])
    decay = jnp.exp(dt[:, :, None] * A)
    if chunk[4] is not None:
        decay = jnp.where(chunk[4][:, :, None, None], 0, decay)
    added = B[..., None] * (dt * x)[:, :, None]
    states = _compose_positions(None, decay, added.at[:, 0].add(decay[:, 0] * state))
    y = (C[..., None] * states).sum(axis=2)
    return states[:, -1], y.astype(chunk[0].dtype)


def _compose_plain(
    _: None, decay: Float[Array, "b c n d"], added: Float[Array, "b c n d"], reverse: bool = False
) -> Float[Array, "b c n d"]:
    """h[t] = decay[t] h[t-1] + added[t] from zeros."""

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (decay, added), reverse, axis=1)[1]


def _compose_forward(_, decay, added):
    states = _compose_plain(_, decay, added)
    return states, (decay, states)


def _compose_backward(_, residuals, g):
    """The same recurrence from the end."""
    decay, states = residuals
    following = jnp.pad(decay[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    g = _compose_plain(_, following, g, reverse=True)
    return g * jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))), g


_compose_positions = with_derivatives(_compose_forward, _compose_backward, _compose_plain, name=None)


# All chunks, with the rules of their derivatives.


class _Config(NamedTuple):
    chunk: int
    impl: str
    interpret: bool
    supported: bool  # by the kernel


_RUNS = {"sequential": _run_sequentially, "chunked": _run_in_parallel}


def _by_platform(config: _Config, forms: dict[str, Callable[..., Any]], *arrays: Any) -> Any:
    """Calls the form that `config` names, or that of the platform for which the program is lowered."""
    bound = {name: functools.partial(form, config) for name, form in forms.items()}
    if config.impl != "auto":
        return bound[config.impl](*arrays)
    tpu = bound["tpu" if config.supported else "chunked"]
    return jax.lax.platform_dependent(*arrays, cpu=bound["sequential"], tpu=tpu, default=bound["chunked"])


def _scan_chunks(
    form: str, config: _Config, inputs: ScanInputs, starts: Bool[Array, "b t"] | None
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b chunks n d"]]:
    """The output, the last state, and the states before the chunks."""
    x, dt, A, B, C, state = inputs
    run = jax.checkpoint(functools.partial(_RUNS[form], A), prevent_cse=False)  # for derivatives of derivatives

    def step(state: Float[Array, "b n d"], chunk: _Chunk) -> tuple[Array, tuple[Array, Array]]:
        after, y = run(state, chunk)
        return after, (y, state)

    last, (y, before) = jax.lax.scan(step, state, _split(config.chunk, (x, dt, B, C, starts)))
    return _join(x.shape[1], y), last, jnp.moveaxis(before, 0, 1)


def _differentiate_chunks(
    form: str,
    config: _Config,
    inputs: ScanInputs,
    starts: Bool[Array, "b t"] | None,
    before: Float[Array, "b chunks n d"],
    dy: Float[Array, "b t d"],
    dlast: Float[Array, "b n d"],
) -> ScanInputs:
    """The gradients, from the last chunk to the first."""
    x, dt, A, B, C, _ = inputs

    def step(carry: tuple[Array, Array], saved: tuple[Any, ...]) -> tuple[Any, Any]:
        (dstate, dA), (state, dy, arrays, starts) = carry, saved
        _, pull = jax.vjp(lambda A, state, *arrays: _RUNS[form](A, state, (*arrays, starts)), A, state, *arrays)
        added, dstate, *gradients = pull((dstate, dy))
        return (dstate, dA + added), gradients

    saved = jnp.moveaxis(before, 1, 0), *_split(config.chunk, (dy, (x, dt, B, C), starts))
    carry, saved = vary_alike(((dlast, jnp.zeros_like(A)), saved))
    (dstate, dA), gradients = jax.lax.scan(step, carry, saved, reverse=True)
    dx, ddt, dB, dC = (_join(x.shape[1], gradient) for gradient in gradients)
    return ScanInputs(dx, ddt, dA, dB, dC, dstate)


def _split(chunk: int, arrays: PyTree[Shaped[Array, "b t ..."]]) -> PyTree[Shaped[Array, "chunks b c ..."]]:
    """Splits into chunks. Padding is a step of size 0, which leaves the state unchanged."""

    def split(x: Array) -> Array:
        x = pad_to_multiple(x, chunk, 1)
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _join(t: int, x: Float[Array, "chunks b c d"]) -> Float[Array, "b t d"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, x.shape[-1])[:, :t]


def _scan_in_kernel(config, inputs, starts):
    return tpu_scan.scan(inputs, starts, config.chunk, config.interpret)


def _differentiate_in_kernel(config, *arrays):
    return tpu_scan.differentiate(*arrays, config.chunk, config.interpret)


_SCANS = {
    "sequential": functools.partial(_scan_chunks, "sequential"),
    "chunked": functools.partial(_scan_chunks, "chunked"),
    "tpu": differentiate_as(functools.partial(_scan_chunks, "chunked"), _scan_in_kernel),
}
_GRADIENTS = {
    "sequential": functools.partial(_differentiate_chunks, "sequential"),
    "chunked": functools.partial(_differentiate_chunks, "chunked"),
    "tpu": differentiate_as(functools.partial(_differentiate_chunks, "chunked"), _differentiate_in_kernel),
}


def _scan_forward(config, inputs, starts):
    y, last, before = _by_platform(config, _SCANS, inputs, starts)
    return (y, last), (inputs, starts, before)


def _scan_backward(config, residuals, cotangents):
    return _by_platform(config, _GRADIENTS, *residuals, *cotangents), None


def _scan_plain(config, inputs, starts):
    form = "chunked" if config.impl == "tpu" else config.impl
    return _by_platform(config._replace(impl=form, supported=False), _SCANS, inputs, starts)[:2]


_scan = with_derivatives(_scan_forward, _scan_backward, _scan_plain)
