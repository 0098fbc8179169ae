"""Mamba's selective scan on TPUs: Mosaic kernels that keep the state in vector memory.

The grid has one step per sequence, chunk of positions and block of channels, blocks innermost: the states of all blocks
stay in vector memory from chunk to chunk, what a chunk needs of B and C is laid out once for all blocks, and the
gradients of B and C are summed over the blocks there. Channels lie along lanes and the state along sublanes.

    forward    h[t] = exp(dt[t] A) h[t-1] + B[t] u[t]         u = dt x
               y[t] = sum over n of C[t] h[t]
    backward   g[t] = C[t] dy[t] + exp(dt[t+1] A) g[t+1]      the gradient of h[t]
               q[t] = g[t] exp(dt[t] A) h[t-1]                the gradient of dt[t] A
               du[t] = sum over n of B[t] g[t];  dx = dt du;  ddt[t] = x du + sum over n of A q[t]
               dA = sum over t of dt[t] q[t];  dB[t] = sum over d of u[t] g[t];  dC[t] = sum over d of dy[t] h[t]

The forward pass writes the state before each chunk. The backward pass visits the chunks from the last to the first and
recomputes the states of a chunk from the state before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.kernels.flash import LOG2E
from sparsejax.ops.kernels.tpu import LANES, Operand, Output, shape_like
from sparsejax.ops.sequence import DeviceAxes, device_axes

SUBLANES = 8
BLOCKS = 512, 256, 128  # channels per step
UNROLL = 8  # positions of the loops that are unrolled
MAX_BYTES = 12 * 2**20  # of vector memory: 16 MiB are the compiler's limit by default


class ScanInputs(NamedTuple):
    """Arrays of a selective scan. The long axis of A and of the state is the last."""

    x: Float[Array, "b t d"]
    dt: Float[Array, "b t d"]
    A: Float[Array, "n d"]
    B: Float[Array, "b t n"]
    C: Float[Array, "b t n"]
    state: Float[Array, "b n d"]


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """Static sizes of a scan, padded: whole chunks, blocks of channels, and sublanes of states."""

    chunk: int  # positions per chunk
    block: int  # channels per step
    channels: int
    states: int  # numbers per channel
    interpret: bool

    @classmethod
    def build(cls, inputs: ScanInputs, chunk: int, interpret: bool) -> ScanConfig:
        """The sizes with the widest blocks that divide the channels and leave enough vector memory."""
        (_, t, _), (n, d) = inputs.x.shape, inputs.A.shape
        channels, states = d + -d % LANES, n + -n % SUBLANES
        chunk = chunk if chunk < t else t + -t % SUBLANES
        configs = [cls(chunk, block, channels, states, interpret) for block in BLOCKS if channels % block == 0]
        return next((config for config in configs if config.bytes <= MAX_BYTES), configs[-1])

    @property
    def unroll(self) -> int:
        """Positions per iteration of the loops; one of an interpreter, which compiles each."""
        return 1 if self.interpret else UNROLL

    @property
    def rows(self) -> int:
        """Rows of an array with the states of all positions of a chunk."""
        return self.chunk * self.states

    @property
    def sums(self) -> tuple[int, int]:
        """Shape of eight sums per position and channel. A strided read needs an array of 128 lanes."""
        return self.block // LANES * SUBLANES * self.chunk, LANES

    @property
    def bytes(self) -> int:
        """Vector memory of the backward pass, the larger one."""
        lanes = 4 * self.rows + self.chunk  # B, C, their gradients, starts
        block = self.rows + self.states + 2 * SUBLANES * self.chunk + 3 * self.chunk  # states, sums, u, dt, dy
        buffers = 2 * (5 * self.chunk + 2 * self.states)  # x, dt, dy and two gradients; A and the state before
        return 4 * (lanes * LANES + (block + buffers) * self.block + 6 * self.states * self.channels)


def unsupported_reason(inputs: ScanInputs, chunk: int) -> str | None:
    """Why the kernels cannot compute a scan, or None. They pad the channels to a multiple of 128."""
    t, config = inputs.x.shape[1], ScanConfig.build(inputs, chunk, interpret=False)
    reasons = (
        (inputs.A.dtype != jnp.float32, f"kernels compute in float32, not in {inputs.A.dtype}"),
        (inputs.x.dtype == jnp.float16, "TPUs have no float16"),
        (t < SUBLANES, f"{t} positions are fewer than {SUBLANES}"),
        (config.chunk % SUBLANES, f"chunks of {chunk} positions are not a multiple of {SUBLANES}"),
        (config.bytes > MAX_BYTES, f"a state of {config.states} x {config.channels} exceeds the vector memory"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def scan(
    inputs: ScanInputs, starts: Bool[Array, "b t"] | None, chunk: int, interpret: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b chunks n d"]]:
    """The output in the dtype of x, the last state, and the states before the chunks."""
    run = functools.partial(_scan_locally, chunk=chunk, interpret=interpret)
    axes = device_axes(len(inputs.x), inputs.x.shape[2])
    if axes is None:
        return run(inputs, starts)
    specs = _input_specs(axes)
    outputs = specs.x, specs.state, PartitionSpec(axes.rows, None, None, axes.heads)
    rows = None if starts is None else PartitionSpec(axes.rows)
    return _map_devices(run, axes, (specs, rows), outputs)(inputs, starts)


def _scan_locally(
    inputs: ScanInputs, starts: Bool[Array, "b t"] | None, chunk: int, interpret: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b chunks n d"]]:
    config = ScanConfig.build(inputs, chunk, interpret)
    launch, (n, d), (b, t, _) = Launch.build(config, inputs, starts), inputs.A.shape, inputs.x.shape
    outputs = {
        "y": launch.by_position(inputs.x.dtype),
        "after": launch.by_sequence(),
        "before": launch.by_chunk(),
    }
    rows = config.chunk, config.block
    scratch = {"u": rows, "dt32": rows, "y_sums": config.sums}
    y, last, before = launch.run(_scan_kernel, "selective_scan", launch.inputs, outputs, scratch)
    return y.reshape(b, -1, config.channels)[:, :t, :d], last[:, :n, :d], before[:, :, :n, :d]


def differentiate(
    inputs: ScanInputs,
    starts: Bool[Array, "b t"] | None,
    before: Float[Array, "b chunks n d"],
    dy: Float[Array, "b t d"],
    dlast: Float[Array, "b n d"],
    chunk: int,
    interpret: bool,
) -> ScanInputs:
    """The gradients."""
    run = functools.partial(_differentiate_locally, chunk=chunk, interpret=interpret)
    axes = device_axes(len(inputs.x), inputs.x.shape[2])
    if axes is None:
        gradients = run(inputs, starts, before, dy, dlast)
    else:
        specs, rows = _input_specs(axes), None if starts is None else PartitionSpec(axes.rows)
        arguments = specs, rows, PartitionSpec(axes.rows, None, None, axes.heads), specs.x, specs.state
        by_channels = PartitionSpec(axes.heads, axes.rows)
        outputs = specs._replace(A=specs.state, B=by_channels, C=by_channels)
        gradients = _map_devices(run, axes, arguments, outputs)(inputs, starts, before, dy, dlast)
    dA, dB, dC = (gradient.sum(axis=0) for gradient in (gradients.A, gradients.B, gradients.C))
    return gradients._replace(A=dA, B=dB.astype(inputs.B.dtype), C=dC.astype(inputs.C.dtype))


def _differentiate_locally(
    inputs: ScanInputs,
    starts: Bool[Array, "b t"] | None,
    before: Float[Array, "b chunks n d"],
    dy: Float[Array, "b t d"],
    dlast: Float[Array, "b n d"],
    chunk: int,
    interpret: bool,
) -> ScanInputs:
    """The gradients: that of A by sequence, [b, n, d], those of B and C by part of the channels, [1, b, t, n]."""
    config = ScanConfig.build(inputs, chunk, interpret)
    launch, (n, d), (b, t, _) = Launch.build(config, inputs, starts, reverse=True), inputs.A.shape, inputs.x.shape
    operands = launch.inputs | {
        "state": launch.read(launch.pad_states(before), launch.by_chunk()),
        "dy": launch.read(launch.pad_positions(dy), launch.by_position(dy.dtype)),
        "after": launch.read(launch.pad_states(dlast), launch.by_sequence()),
    }
    outputs = {
        "dx": launch.by_position(inputs.x.dtype),
        "ddt": launch.by_position(inputs.dt.dtype),
        "A_gradient": launch.by_sequence(),
        "B_gradient": launch.by_row(config.rows),
        "C_gradient": launch.by_row(config.rows),
        "dstate": launch.by_sequence(),
    }
    rows = config.chunk, config.block
    scratch = {
        "u": rows,
        "dt32": rows,
        "dy32": rows,
        "h": (config.rows + config.states, config.block),
        "du_sums": config.sums,
        "ddt_sums": config.sums,
        "B_sums": (config.rows, LANES),
        "C_sums": (config.rows, LANES),
    }
    results = launch.run(_gradient_kernel, "selective_scan_gradient", operands, outputs, scratch)
    dx, ddt, dA, dB, dC, dstate = results
    dx, ddt = (array.reshape(b, -1, config.channels)[:, :t, :d] for array in (dx, ddt))
    dB, dC = (array.reshape(1, b, -1, config.states)[:, :, :t, :n] for array in (dB, dC))
    return ScanInputs(dx, ddt, dA[:, :n, :d], dB, dC, dstate[:, :n, :d])


def _input_specs(axes: DeviceAxes) -> Any:
    """How the inputs are sharded: rows, and channels."""
    by_sequence = PartitionSpec(axes.rows)
    of_positions = PartitionSpec(axes.rows, None, axes.heads)
    return ScanInputs(
        of_positions, of_positions, PartitionSpec(None, axes.heads), by_sequence, by_sequence, of_positions
    )


def _map_devices(function: Callable[..., Any], axes: DeviceAxes, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """Each device computes its rows and channels."""
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=axes.names, check_vma=False)


# Stages of the kernels. A row of a scratch array holds a position, or one of the n numbers of its state.


class Refs(NamedTuple):
    """What a kernel reads and writes at a step, and its scratch. None for what it does not have."""

    x: Any
    dt: Any
    A: Any
    B: Any  # [1, rows]
    C: Any
    state: Any  # before the first chunk, or before this chunk
    starts: Any = None  # [1, chunk]: 1 where a document starts, else 0
    dy: Any = None
    after: Any = None  # the state after the chunks so far; the gradient of the last state
    y: Any = None
    before: Any = None
    dx: Any = None
    ddt: Any = None
    A_gradient: Any = None
    B_gradient: Any = None
    C_gradient: Any = None
    dstate: Any = None  # the gradient of the state before the chunks so far
    u: Any = None  # dt x
    dt32: Any = None
    dy32: Any = None
    h: Any = None
    y_sums: Any = None
    du_sums: Any = None
    ddt_sums: Any = None
    B_sums: Any = None
    C_sums: Any = None
    B_lanes: Any = None
    C_lanes: Any = None
    start_lanes: Any = None


def _spread_lanes(refs: Refs) -> None:
    """Turns what all channels of a chunk share from rows into columns that are equal along the lanes."""

    @pl.when(pl.program_id(2) == 0)
    def spread():
        pairs = (refs.B, refs.B_lanes), (refs.C, refs.C_lanes), (refs.starts, refs.start_lanes)
        for row, lanes in pairs:
            if row is not None:
                lanes[...] = jnp.broadcast_to(row[...].T, lanes.shape)


def _widen_inputs(refs: Refs) -> None:
    """Computes in float32 what the loops read row by row: rows of narrower arrays share a sublane."""
    refs.dt32[...] = refs.dt[...].astype(jnp.float32)
    refs.u[...] = refs.dt32[...] * refs.x[...].astype(jnp.float32)
    if refs.dy is not None:
        refs.dy32[...] = refs.dy[...].astype(jnp.float32)


def _block(config: ScanConfig) -> tuple[slice, pl.Slice]:
    """Index of the channels of a step in an array [n, channels]."""
    return slice(None), pl.ds(pl.multiple_of(pl.program_id(2) * config.block, LANES), config.block)


def _decay(refs: Refs, A: Array, t: Any) -> Array:
    """exp(dt A); A in units of log 2."""
    return jnp.exp2(refs.dt32[pl.ds(t, 1), :] * A)


def _reset(refs: Refs, t: Any, state: Array) -> Array:
    """Zeros if a document starts at position t, else the state before it or the gradient of that."""
    if refs.start_lanes is None:
        return state
    return jnp.where(_widen(refs.start_lanes[pl.ds(t, 1), :], state) > 0, 0.0, state)


def _advance(config: ScanConfig, refs: Refs, A: Array, t: Any, state: Array) -> Array:
    """The state after position t."""
    added = _widen(_state_rows(config, refs.B_lanes, t), state) * refs.u[pl.ds(t, 1), :]
    return _decay(refs, A, t) * _reset(refs, t, state) + added


def _state_rows(config: ScanConfig, ref: Any, t: Any) -> Array:
    return ref[_rows(t, config.states), :]


def _rows(t: Any, size: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(t * size, SUBLANES), size)


def _widen(lanes: Array, state: Array) -> Array:
    """Repeats [rows, 128] to the lanes of a state."""
    return jnp.tile(lanes, (1, state.shape[1] // LANES))


def _fold_lanes(x: Array) -> Array:
    """Sums [rows, channels] to [rows, 128]."""
    return functools.reduce(jnp.add, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


def _store_sums(config: ScanConfig, sums: Any, t: Any, x: Array) -> None:
    """Stores the sum over n of position t, [n, channels], as sums over every eighth n."""
    x = functools.reduce(jnp.add, (x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)))
    for i in range(config.block // LANES):
        sums[_rows(i * config.chunk + t, SUBLANES), :] = x[:, i * LANES : (i + 1) * LANES]


def _load_sums(config: ScanConfig, sums: Any) -> Array:
    """The sums over n of all positions, [chunk, channels]: strided reads instead of a reduction per position."""

    def load(tile: int) -> Array:
        first = SUBLANES * config.chunk * tile
        return functools.reduce(jnp.add, (sums[pl.ds(first + i, config.chunk, SUBLANES), :] for i in range(SUBLANES)))

    return jnp.concatenate([load(tile) for tile in range(config.block // LANES)], axis=1)


def _sum_lanes(sums: Any) -> Array:
    """Sums [rows, 128] to [1, rows], by a product with ones: a row of sums is what it returns."""
    ones = jnp.ones((SUBLANES, LANES), jnp.float32)
    dims = ((1,), (1,)), ((), ())
    return lax.dot_general(ones, sums[...], dims, lax.Precision.HIGHEST, jnp.float32)[:1]


# The kernels.


def _scan_kernel(config: ScanConfig, refs: Refs) -> None:
    block = _block(config)
    _spread_lanes(refs)

    @pl.when(pl.program_id(1) == 0)
    def initialize():
        refs.after[block] = refs.state[block]

    refs.before[...] = refs.after[block]
    _widen_inputs(refs)
    A = refs.A[...] * LOG2E

    def step(t, state):
        state = _advance(config, refs, A, t, state)
        _store_sums(config, refs.y_sums, t, state * _widen(_state_rows(config, refs.C_lanes, t), state))
        return state

    refs.after[block] = lax.fori_loop(0, config.chunk, step, refs.before[...], unroll=config.unroll)
    refs.y[...] = _load_sums(config, refs.y_sums).astype(refs.y.dtype)


def _gradient_kernel(config: ScanConfig, refs: Refs) -> None:
    block = _block(config)
    _spread_lanes(refs)

    @pl.when(pl.program_id(1) == 0)
    def initialize():
        refs.dstate[block] = refs.after[block]
        refs.A_gradient[block] = jnp.zeros_like(refs.A)

    @pl.when(pl.program_id(2) == 0)
    def initialize_sums():
        refs.B_sums[...], refs.C_sums[...] = jnp.zeros_like(refs.B_sums), jnp.zeros_like(refs.C_sums)

    _widen_inputs(refs)
    A = refs.A[...] * LOG2E
    refs.h[_rows(0, config.states), :] = refs.state[...]

    def recompute(t, state):
        state = _advance(config, refs, A, t, state)
        refs.h[_rows(t + 1, config.states), :] = state
        return state

    lax.fori_loop(0, config.chunk, recompute, refs.state[...], unroll=config.unroll)

    def step(i, carry):
        t, (g, dA) = config.chunk - 1 - i, carry
        B, C = (_widen(_state_rows(config, lanes, t), g) for lanes in (refs.B_lanes, refs.C_lanes))
        dy = refs.dy32[pl.ds(t, 1), :]
        g += C * dy
        rows = _rows(t, config.states)
        refs.C_sums[rows, :] += _fold_lanes(_state_rows(config, refs.h, t + 1) * dy)
        refs.B_sums[rows, :] += _fold_lanes(g * refs.u[pl.ds(t, 1), :])
        _store_sums(config, refs.du_sums, t, g * B)
        g = g * _decay(refs, A, t)
        q = g * _reset(refs, t, _state_rows(config, refs.h, t))
        _store_sums(config, refs.ddt_sums, t, q * refs.A[...])
        return _reset(refs, t, g), dA + q * refs.dt32[pl.ds(t, 1), :]

    carry = refs.dstate[block], refs.A_gradient[block]
    refs.dstate[block], refs.A_gradient[block] = lax.fori_loop(0, config.chunk, step, carry, unroll=config.unroll)
    du = _load_sums(config, refs.du_sums)
    refs.dx[...] = (refs.dt32[...] * du).astype(refs.dx.dtype)
    refs.ddt[...] = (refs.x[...].astype(jnp.float32) * du + _load_sums(config, refs.ddt_sums)).astype(refs.ddt.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finalize():
        refs.B_gradient[...], refs.C_gradient[...] = _sum_lanes(refs.B_sums), _sum_lanes(refs.C_sums)


# The launches.


@dataclasses.dataclass(frozen=True)
class Launch:
    """The grid of a kernel: sequences, chunks in the order of the visits, blocks of channels."""

    config: ScanConfig
    like: Array
    chunks: int
    reverse: bool
    inputs: dict[str, Operand]

    @classmethod
    def build(
        cls, config: ScanConfig, inputs: ScanInputs, starts: Bool[Array, "b t"] | None, reverse: bool = False
    ) -> Launch:
        """The grid, and the operands that both kernels read."""
        launch = cls(config, inputs.x, -(-inputs.x.shape[1] // config.chunk), reverse, {})
        x, dt = (launch.read(launch.pad_positions(a), launch.by_position(a.dtype)) for a in (inputs.x, inputs.dt))
        A = Operand(launch.pad_states(inputs.A), pl.BlockSpec((config.states, config.block), lambda s, i, j: (0, j)))
        B, C = (pad_to_multiple(a.astype(jnp.float32), config.states, 2) for a in (inputs.B, inputs.C))
        operands = {"x": x, "dt": dt, "A": A, "B": launch.read_row(B), "C": launch.read_row(C)}
        operands["state"] = launch.read(launch.pad_states(inputs.state), launch.by_sequence())
        if starts is not None:
            operands["starts"] = launch.read_row(starts[..., None].astype(jnp.float32))
        return dataclasses.replace(launch, inputs=operands)

    def pad_positions(self, x: Float[Array, "b t d"]) -> Float[Array, "b chunks c channels"]:
        """Pads and splits into chunks. Padding is a step of size 0, which leaves the state unchanged."""
        x = pad_to_multiple(pad_to_multiple(x, self.config.chunk, 1), LANES, 2)
        return x.reshape(len(x), self.chunks, self.config.chunk, -1)

    def pad_states(self, x: Float[Array, "*b n d"]) -> Float[Array, "*b states channels"]:
        return pad_to_multiple(pad_to_multiple(x, SUBLANES, x.ndim - 2), LANES, x.ndim - 1)

    def read(self, x: Array, like: Output) -> Operand:
        """Reads an array as `like` would be written."""
        return Operand(x, like.block)

    def read_row(self, x: Float[Array, "b t n"]) -> Operand:
        """Reads what the channels share, as one row per chunk."""
        x = pad_to_multiple(x, self.config.chunk, 1)
        x = x.reshape(len(x), self.chunks, 1, -1)
        return self.read(x, self.by_row(x.shape[3]))

    def by_position(self, dtype: Any) -> Output:
        """An array of all positions and channels."""
        chunk, block, channels = self.config.chunk, self.config.block, self.config.channels
        shape, sizes = (len(self.like), self.chunks, chunk, channels), (None, None, chunk, block)
        return Output(shape, dtype, pl.BlockSpec(sizes, lambda s, i, j: (s, self._chunk(i), 0, j)))

    def by_chunk(self) -> Output:
        """An array with a state per chunk."""
        states, block, channels = self.config.states, self.config.block, self.config.channels
        shape, sizes = (len(self.like), self.chunks, states, channels), (None, None, states, block)
        return Output(shape, jnp.float32, pl.BlockSpec(sizes, lambda s, i, j: (s, self._chunk(i), 0, j)))

    def by_sequence(self) -> Output:
        """An array with a state per sequence, which stays in vector memory while the sequence is visited."""
        sizes = self.config.states, self.config.channels
        return Output((len(self.like), *sizes), jnp.float32, pl.BlockSpec((None, *sizes), lambda s, i, j: (s, 0, 0)))

    def by_row(self, size: int) -> Output:
        """An array with a row per chunk."""
        block = pl.BlockSpec((None, None, 1, size), lambda s, i, j: (s, self._chunk(i), 0, 0))
        return Output((len(self.like), self.chunks, 1, size), jnp.float32, block)

    def _chunk(self, i: Any) -> Any:
        return self.chunks - 1 - i if self.reverse else i

    def run(
        self,
        kernel: Callable[[ScanConfig, Refs], None],
        name: str,
        operands: dict[str, Operand],
        outputs: dict[str, Output],
        scratch: dict[str, tuple[int, ...]],
    ) -> Sequence[Array]:
        """Runs a kernel over the grid. `scratch`: shapes of its float32 arrays, by name."""
        config = self.config
        scratch = scratch | {"B_lanes": (config.rows, LANES), "C_lanes": (config.rows, LANES)}
        if "starts" in operands:
            scratch = scratch | {"start_lanes": (config.chunk, LANES)}
        names = *operands, *outputs, *scratch
        return pl.pallas_call(
            lambda *refs: kernel(config, Refs(**dict(zip(names, refs, strict=True)))),
            grid=(len(self.like), self.chunks, config.channels // config.block),
            in_specs=[operand.block for operand in operands.values()],
            out_specs=[output.block for output in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            out_shape=[shape_like(self.like, output.shape, output.dtype) for output in outputs.values()],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
            interpret=config.interpret,
            name=name,
        )(*(operand.array for operand in operands.values()))
