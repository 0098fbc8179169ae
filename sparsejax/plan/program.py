"""A traced program on a mesh: the shape of every value on a device, FLOPs and collectives.

A traced program has global shapes. `shard_program` propagates the sharding of its inputs through every operation, as
the partitioner of the compiler does: the axes of an output are those of its inputs, a product that contracts a sharded
axis ends in an all-reduce, and a parameter that shares a mesh axis with the tokens is gathered before it is used.
Collectives that a program states itself, in `jax.shard_map`, count as they are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.plan.memory import Memory, Node, Value, measure_memory
from sparsejax.traffic import COLLECTIVES

Spec = tuple[tuple[str, ...], ...]  # mesh axes per axis of an array
OUTSIDE = "embedding, head, optimizer"  # operations of no layer
LAYER = re.compile(r"layer_[^/()]*/([^/()]+)")  # in a name stack, see `Model._scopes`
# Of an array of equal numbers, which takes no memory, these operations make another one.
UNIFORM = frozenset(("broadcast_in_dim", "convert_element_type", "pad", "reshape", "slice", "squeeze", "transpose"))
PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of a call that hold its program


@dataclasses.dataclass
class Work:
    """What the operations of a part of the program take on a device.

    Attributes:
      flops: FLOPs of the matrix products.
      moved: Bytes that are read from and written to memory.
      received: Bytes that arrive from other devices, by collective.
    """

    flops: float = 0.0
    moved: float = 0.0
    received: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class ShardedProgram:
    """A program for one device of a mesh.

    Attributes:
      memory: Its memory, without that of its inputs.
      work: What it takes, by name of the layer and `OUTSIDE`.
    """

    memory: Memory
    work: Mapping[str, Work]

    @property
    def received(self) -> Counter[str]:
        """Bytes that arrive from other devices, by collective."""
        return sum_received(self.work)


def sum_received(work: Mapping[str, Work]) -> Counter[str]:
    """Bytes that arrive from other devices, by collective, of all parts of a program."""
    return sum((part.received for part in work.values()), Counter())


def shard_program(
    jaxpr: ClosedJaxpr,
    shardings: Sequence[NamedSharding],
    parameters: Sequence[tuple[tuple[int, ...], NamedSharding]],
    donated: int = 0,
    platform: str = "",
) -> ShardedProgram:
    """Returns the program of a device.

    Args:
      jaxpr: The traced program.
      shardings: The sharding of each input.
      parameters: Shape and sharding of the parameters; their gradients are sharded like them.
      donated: Number of outputs, the first ones, that are written to the memory of inputs.
      platform: The platform, such as "tpu", whose forms of operations are counted. The compiler for "cpu" copies
        transposed inputs of products, and sums a gradient on all devices before it is split.
    """
    mesh = shardings[0].mesh
    gradients: dict[tuple[int, ...], Spec] = {}
    for shape, sharding in parameters:
        spec = _to_spec(sharding.spec, len(shape))
        for i in (0, 1):  # the gradient of the layer of a stack has no leading axis
            gradients.setdefault(shape[i:], spec[i:])
            gradients.setdefault(shape[i:][::-1], spec[i:][::-1])
    builder = _Builder(dict(mesh.shape), gradients, defaultdict(Work), platform)
    inputs = [
        builder.make(variable.aval, _to_spec(sharding.spec, len(variable.aval.shape)))
        for variable, sharding in zip(jaxpr.jaxpr.invars, shardings, strict=True)
    ]
    used, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    outputs = builder.run(used, inputs)
    memory = builder.finish(inputs, outputs, frozenset(outputs[:donated]))
    return ShardedProgram(memory, dict(builder.work))


def _to_spec(partition: PartitionSpec, rank: int) -> Spec:
    axes = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in partition]
    return (*axes, *[()] * (rank - len(axes)))


class _Builder:
    """Lowers a traced program to nodes."""

    def __init__(
        self,
        axes: dict[str, int],
        gradients: dict[tuple[int, ...], Spec],
        work: dict[str, Work],
        platform: str,
        times=1,
    ):
        self.axes, self.gradients, self.work, self.times, self.platform = axes, gradients, work, times, platform
        self.on_cpu = platform == "cpu"
        self.nodes: list[Node] = []
        self.gathered: dict[tuple[Value, frozenset[str]], Value] = {}
        self.label, self.backward = OUTSIDE, False

    def inner(self, times: int, work: dict[str, Work] | None = None) -> _Builder:
        """The builder of a body that runs `times` times, which adds its work to `work` or to that of this builder."""
        work = self.work if work is None else work
        builder = _Builder(self.axes, self.gradients, work, self.platform, self.times * times)
        builder.label, builder.backward = self.label, self.backward
        return builder

    def absorb(self, work: Mapping[str, Work]) -> None:
        """Adds the work of a body."""
        for label, part in work.items():
            self.work[label].flops += part.flops
            self.work[label].moved += part.moved
            self.work[label].received += part.received

    def finish(self, inputs: Iterable[Value], outputs: Sequence[Value], reused: frozenset[Value]) -> Memory:
        memory = measure_memory(self.nodes, list(inputs), outputs, reused)
        for label, moved in memory.moved.items():
            self.work[label].moved += self.times * moved
        return memory

    def count(self, axes: Iterable[str]) -> int:
        return math.prod(self.axes[axis] for axis in axes)

    def make(self, aval: Any, spec: Spec) -> Value:
        """A value on a device; axes that do not divide it are left out."""
        shape, kept = tuple(aval.shape), []
        for size, names in zip(shape, spec, strict=True):
            names = tuple(name for name in names if self.axes[name] > 1)
            kept.append(names if size % self.count(names) == 0 else ())
        local = math.prod(size // self.count(names) for size, names in zip(shape, kept, strict=True))
        on_host = getattr(getattr(aval, "memory_space", None), "name", "") == "Host"
        return Value(shape, aval.dtype, tuple(kept), 0 if on_host else local * aval.dtype.itemsize)

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Appends the nodes of a program; returns its outputs."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable in jaxpr.constvars:
            values[variable] = self.make(variable.aval, _none(variable))
            values[variable].constant = True

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                literal: Any = atom.aval
                return Value(tuple(np.shape(atom.val)), literal.dtype, _none(atom), 0, constant=True)
            return values[atom]

        outside = self.label, self.backward
        for equation in jaxpr.eqns:
            name = equation.primitive.name.removesuffix("_p")
            stack = str(equation.source_info.name_stack)
            layers = LAYER.findall(stack)
            self.label = layers[-1] if layers else self.label
            self.backward |= "transpose(" in stack
            rule = RULES.get(name) or (_call if any(key in equation.params for key in PROGRAMS) else _elementwise)
            outputs = rule(self, equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, outputs, strict=True)
            self.label, self.backward = outside
        return [read(atom) for atom in jaxpr.outvars]

    def add(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value], workspace: int = 0) -> list[Value]:
        uniform = name in UNIFORM and all(operand.constant and not operand.bytes for operand in inputs)
        for value in outputs:
            value.constant = all(operand.constant for operand in inputs)
            value.bytes = 0 if uniform else value.bytes
            value.sources += [(operand, 0) for operand in inputs if value.constant and operand.shape == value.shape]
        self.nodes.append(Node(name, list(inputs), list(outputs), self.label, self.backward, workspace))
        return list(outputs)

    def split(self, value: Value, spec: Spec) -> None:
        """Splits a constant, and the constants from which it is computed, by the axes of the values that it meets."""
        if not value.constant or _axes_of(value.spec) or not _axes_of(spec):
            return
        value.spec = spec
        value.bytes = value.bytes // self.count(_axes_of(spec))
        for source, added in value.sources:
            self.split(source, (((),) * added + spec) if added >= 0 else spec[-added:])

    def emit(self, equation: Any, inputs: Sequence[Value], *specs: Spec) -> list[Value]:
        """Appends a node whose outputs have these specs."""
        outputs = [self.make(variable.aval, spec) for variable, spec in zip(equation.outvars, specs, strict=True)]
        return self.add(equation.primitive.name.removesuffix("_p"), inputs, outputs)

    def receive(self, collective: str, operand: float, axes: Iterable[str]) -> None:
        """Counts a collective over mesh axes."""
        name, share = COLLECTIVES[collective]
        if (n := self.count(axes)) > 1:
            self.work[self.label].received[name] += self.times * operand * share(n)

    def reduce_gradient(self, size: float, like: Spec, summed: set[str]) -> set[str]:
        """Counts the sum of `size` bytes of a parameter's gradient; returns the axes over which it is scattered."""
        scattered = set() if self.on_cpu else _axes_of(like) & summed
        self.receive("reduce_scatter", size, scattered)
        self.receive("psum", size / self.count(scattered), summed - scattered)
        return scattered

    def gather(self, value: Value, axes: Iterable[str]) -> Value:
        """The value without these axes, which an all-gather removes: the same one wherever it is needed again."""
        axes = frozenset(axes) & _axes_of(value.spec)
        if not axes:
            return value
        if (value, axes) in self.gathered:
            return self.gathered[value, axes]
        spec = tuple(tuple(name for name in names if name not in axes) for names in value.spec)
        whole = Value(value.shape, value.dtype, spec, value.bytes * self.count(axes))
        self.receive("all_gather", value.bytes, axes)
        self.add("all_gather", [value], [whole])
        self.gathered[value, axes] = whole
        return whole


def _none(variable: Any) -> Spec:
    return ((),) * len(variable.aval.shape)


def _axes_of(spec: Spec) -> set[str]:
    return {name for names in spec for name in names}


def _join(values: Iterable[tuple[Spec, Sequence[int | None]]], rank: int) -> Spec:
    """The axes of an output, given specs and the axis of the output of each of their axes.

    No mesh axis splits the output twice. The most sharded input decides first: activations before parameters.
    """
    spec: list[tuple[str, ...]] = [()] * rank
    used: set[str] = set()
    for names_by_axis, targets in sorted(values, key=lambda value: -len(_axes_of(value[0]))):
        for names, target in zip(names_by_axis, targets, strict=True):
            if target is not None:
                fresh = tuple(name for name in names if name not in used)
                spec[target] += fresh
                used.update(fresh)
    return tuple(spec)


# Rules: functions of the builder, an equation and its inputs, which return the outputs.


def _elementwise(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Outputs have the axes of the inputs of the same rank where sizes agree."""
    specs = []
    for variable in equation.outvars:
        shape = variable.aval.shape
        alike = [value for value in inputs if len(value.shape) == len(shape)]
        targets = [[i if a == b else None for i, (a, b) in enumerate(zip(v.shape, shape, strict=True))] for v in alike]
        specs.append(_join(zip((value.spec for value in alike), targets, strict=True), len(shape)))
        for value in alike:
            if value.shape == shape:
                builder.split(value, specs[-1])
    return builder.emit(equation, inputs, *specs)


def _call(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    program = next(equation.params[key] for key in PROGRAMS if key in equation.params)
    return builder.run(program.jaxpr if isinstance(program, ClosedJaxpr) else program, inputs)


def _scan(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    body, length = equation.params["jaxpr"], equation.params["length"]
    carries = len(equation.outvars) - _count_stacked(equation.outvars, body.jaxpr.outvars)
    n = len(equation.invars) - _count_stacked(equation.invars, body.jaxpr.invars) - carries
    constants, carry, stacked = inputs[:n], inputs[n : n + carries], inputs[n + carries :]
    specs = [value.spec for value in carry]
    variables = body.jaxpr.invars
    for _ in range(2):  # the second time, if they change, with the axes of the carry after the first
        work: dict[str, Work] = defaultdict(Work)
        inside, before = builder.inner(length, work), specs
        start = [inside.make(v.aval, spec) for v, spec in zip(variables[n : n + carries], specs, strict=True)]
        slices = [
            inside.add("dynamic_slice", [value], [inside.make(variable.aval, value.spec[1:])])[0]
            for value, variable in zip(stacked, variables[n + carries :], strict=True)
        ]
        for value, part in zip(stacked, slices, strict=True):
            part.sources.append((value, 1))
        outputs = inside.run(body.jaxpr, [*constants, *start, *slices])
        specs = [
            _join([(a, range(len(a))), (b.spec, range(len(a)))], len(a))
            for a, b in zip(specs, outputs[:carries], strict=True)
        ]
        if specs == before:
            break
    memory = inside.finish([*constants, *start, *stacked], outputs, frozenset(outputs))
    builder.absorb(work)
    results = [inside.make(v.aval, spec) for v, spec in zip(equation.outvars, specs, strict=False)]
    results += [
        inside.make(variable.aval, ((), *value.spec))
        for variable, value in zip(equation.outvars[carries:], outputs[carries:], strict=True)
    ]
    builder.add("scan", inputs, results, memory.peak)
    for result, value in zip(results[carries:], outputs[carries:], strict=True):
        result.constant = value.constant
        result.sources = [(value, -1)]
    return results


def _count_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Number of arrays of a loop with an axis more than in its body; versions of JAX differ in how they state it."""
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _while(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """A loop of unknown length counts once."""
    n = equation.params["cond_nconsts"]
    inside = builder.inner(1)
    body = equation.params["body_jaxpr"]
    outputs = inside.run(body.jaxpr, inputs[n:])
    memory = inside.finish(inputs[n:], outputs, frozenset(outputs))
    results = [builder.make(v.aval, value.spec) for v, value in zip(equation.outvars, outputs, strict=True)]
    return builder.add("while", inputs, results, memory.peak)


def _cond(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """The branch of the platform; else the work of the first branch, the memory of the largest."""
    if (platforms := equation.params.get("branches_platforms")) is not None:
        branches = zip(platforms, equation.params["branches"], strict=True)
        chosen = next(branch for names, branch in branches if names is None or builder.platform in names)
        return builder.run(chosen.jaxpr, inputs[1:])
    peaks, specs = [], [_none(v) for v in equation.outvars]
    for number, branch in enumerate(equation.params["branches"]):
        inside = builder.inner(1 if number == 0 else 0)
        outputs = inside.run(branch.jaxpr, inputs[1:])
        peaks.append(inside.finish(inputs[1:], outputs, frozenset(outputs)).peak)
        specs = [
            _join([(a, range(len(a))), (b.spec, range(len(a)))], len(a)) for a, b in zip(specs, outputs, strict=True)
        ]
    results = [builder.make(v.aval, spec) for v, spec in zip(equation.outvars, specs, strict=True)]
    return builder.add("cond", inputs, results, max(peaks))


def _shard_map(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """The program of a shard, whose shapes are divided by the manual axes already."""
    params = equation.params
    manual = set(params.get("newly_manual_axes", params.get("manual_axes", ())))
    program, entered = params["jaxpr"], []
    for value, partition, variable in zip(inputs, params["in_specs"], program.invars, strict=True):
        kept = _axes_of(_to_spec(partition, len(value.shape)))
        value = builder.gather(value, manual - kept)
        spec = tuple(tuple(name for name in names if name not in manual) for names in value.spec)
        entered += builder.add("reshape", [value], [builder.make(variable.aval, spec)])
    outputs = builder.run(program, entered)
    results = []
    for value, partition, variable in zip(outputs, params["out_specs"], equation.outvars, strict=True):
        added = _to_spec(partition, len(value.shape))
        spec = tuple((*a, *(name for name in b if name not in a)) for a, b in zip(added, value.spec, strict=True))
        results += builder.add("reshape", [value], [builder.make(variable.aval, spec)])
    return results


def _collective(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """A collective that the program states."""
    axes = equation.params.get("axes", equation.params.get("axis_name", ()))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    name = equation.primitive.name.removesuffix("_p").removesuffix("_invariant")
    outputs = []
    for value, variable in zip(inputs, equation.outvars, strict=True):
        like = builder.gradients.get(value.shape) if name == "psum" and builder.backward else None
        if like is not None and _axes_of(like) & set(axes):  # the gradient of a parameter that shards read whole
            builder.reduce_gradient(value.bytes, like, set(axes))
            rank = len(like)
            outputs.append(builder.make(variable.aval, _join([(value.spec, range(rank)), (like, range(rank))], rank)))
            continue
        builder.receive(name, value.bytes, axes)
        same = len(value.shape) == len(variable.aval.shape)
        outputs.append(builder.make(variable.aval, value.spec if same else _none(variable)))
    return builder.add(name, inputs, outputs)


def _dot(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    (contract, batch), values = equation.params["dimension_numbers"], list(inputs)
    roles = [_roles(value, contract[side], batch[side], side) for side, value in enumerate(values)]
    # A mesh axis on two different axes of the product: one of the inputs is gathered.
    where = [
        {name: role for names, role in zip(v.spec, r, strict=True) for name in names}
        for v, r in zip(values, roles, strict=True)
    ]
    for name in sorted(where[0].keys() & where[1].keys()):
        if where[0][name] != where[1][name]:
            side = _gathered_side(values, [where[0][name], where[1][name]])
            values[side] = builder.gather(values[side], [name])
    free = [[i for i, role in enumerate(r) if role[0] == "free"] for r in roles]
    rank = len(batch[0]) + len(free[0]) + len(free[1])
    targets: list[list[int | None]] = [[None] * len(value.shape) for value in values]
    for side in (0, 1):
        for position, axis in enumerate(batch[side]):
            targets[side][axis] = position
        offset = len(batch[0]) + (len(free[0]) if side else 0)
        for position, axis in enumerate(free[side]):
            targets[side][axis] = offset + position
    spec = _join([(value.spec, target) for value, target in zip(values, targets, strict=True)], rank)
    summed = {name for side in (0, 1) for axis in contract[side] for name in values[side].spec[axis]} - _axes_of(spec)
    variable = equation.outvars[0]
    length = math.prod(values[0].shape[axis] for axis in contract[0])
    product = builder.make(variable.aval, spec)
    size = product.bytes / variable.aval.dtype.itemsize
    builder.work[builder.label].flops += builder.times * 2 * size * length / builder.count(summed)
    copied = _copied_bytes(builder, values, contract)
    like = builder.gradients.get(tuple(variable.aval.shape))
    if like is not None and summed and not batch[0]:  # the gradient of a parameter
        scattered = builder.reduce_gradient(product.bytes, like, summed)
        result = builder.make(variable.aval, _join([(spec, range(rank)), (like, range(rank))], rank))
        return builder.add("dot_general", values, [result], copied + (product.bytes if scattered else 0))
    builder.receive("psum", product.bytes, summed)
    return builder.add("dot_general", values, [product], copied)


def _copied_bytes(builder: _Builder, values: Sequence[Value], contract: Sequence[Sequence[int]]) -> int:
    """Bytes of a transposed copy: on a CPU the first input of a product is contracted over its last axes."""
    trailing = range(len(values[0].shape) - len(contract[0]), len(values[0].shape))
    return values[0].bytes if builder.on_cpu and set(contract[0]) != set(trailing) else 0


def _gathered_side(values: Sequence[Value], roles: Sequence[tuple[str, int]]) -> int:
    """The input of a product that is gathered: that which would be summed over the axis, or else the smaller."""
    summed = [role[0] == "contract" for role in roles]
    return summed.index(True) if any(summed) else min((0, 1), key=lambda side: values[side].bytes)


def _roles(value: Value, contract: Sequence[int], batch: Sequence[int], side: int) -> list[tuple[str, int]]:
    """What each axis of an input of a product is: equal for axes that meet."""
    roles = [("free", 10 * side + axis) for axis in range(len(value.shape))]
    for kind, axes in (("contract", contract), ("batch", batch)):
        for position, axis in enumerate(axes):
            roles[axis] = (kind, position)
    return roles


def _reduce(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    axes = equation.params["axes"]
    value = inputs[0]
    spec = tuple(names for axis, names in enumerate(value.spec) if axis not in axes)
    outputs = builder.emit(equation, inputs, *[spec] * len(equation.outvars))
    summed = {name for axis in axes for name in value.spec[axis]}
    for output in outputs:
        builder.receive("psum", output.bytes, summed)
    return outputs


def _transpose(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    return builder.emit(equation, inputs, tuple(inputs[0].spec[axis] for axis in equation.params["permutation"]))


def _broadcast(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    variable = equation.outvars[0]
    if not inputs[0].shape:  # a constant: it is written to the memory of what is computed from it
        return builder.add(
            "broadcast_in_dim", inputs, [dataclasses.replace(builder.make(variable.aval, _none(variable)), bytes=0)]
        )
    spec = list(_none(variable))
    for axis, target in enumerate(equation.params["broadcast_dimensions"]):
        spec[target] = inputs[0].spec[axis]
    return builder.emit(equation, inputs, tuple(spec))


def _squeeze(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    removed = equation.params["dimensions"]
    return builder.emit(equation, inputs, tuple(x for axis, x in enumerate(inputs[0].spec) if axis not in removed))


def _reshape(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Within axes that are merged or split, mesh axes go to the first axes that they divide."""
    value, shape = inputs[0], tuple(equation.outvars[0].aval.shape)
    spec: list[tuple[str, ...]] = [()] * len(shape)
    i = j = 0
    while i < len(value.shape) or j < len(shape):
        first, second = [i], [j]
        a = value.shape[i] if i < len(value.shape) else 1
        b = shape[j] if j < len(shape) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= value.shape[i]
                first.append(i)
                i += 1
            else:
                b *= shape[j]
                second.append(j)
                j += 1
        names = [name for axis in first if axis < len(value.shape) for name in value.spec[axis]]
        for axis in second:
            while names and axis < len(shape) and shape[axis] % builder.count((*spec[axis], names[0])) == 0:
                spec[axis] += (names.pop(0),)
    return builder.emit(equation, inputs, tuple(spec))


def _constraint(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    sharding = equation.params["sharding"]
    spec = _to_spec(sharding.spec, len(inputs[0].shape))
    value = builder.gather(inputs[0], _axes_of(inputs[0].spec) - _axes_of(spec))
    return builder.emit(equation, [value], spec)


def _gather(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Rows of a table: a table that is split by rows gives parts that an all-reduce adds up."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, indices = inputs[0], inputs[1]
    rank = len(equation.outvars[0].aval.shape)
    outer = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    collapsed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rows = [axis for axis in range(len(operand.shape)) if axis not in collapsed]
    targets: list[int | None] = [None] * len(operand.shape)
    for axis, target in zip(rows, numbers.offset_dims, strict=True):
        targets[axis] = target if sizes[axis] == operand.shape[axis] else None
    for axis, source in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        targets[axis] = outer[source]
    by_rows = {name for axis, names in enumerate(operand.spec) if targets[axis] is None for name in names}
    clash = _axes_of(operand.spec) & _axes_of(indices.spec)
    clash -= {name for axis in numbers.operand_batching_dims for name in operand.spec[axis]}
    operand = builder.gather(operand, clash)
    placed: list[tuple[Spec, Sequence[int | None]]] = [(indices.spec[:-1], outer), (operand.spec, targets)]
    outputs = builder.emit(equation, [operand, indices], _join(placed, rank))
    builder.receive("psum", outputs[0].bytes, by_rows - clash)
    return outputs


def _scatter(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Rows that are added to a table: the gradient of a table is summed over the tokens."""
    operand, updates = inputs[0], inputs[2]
    numbers = equation.params["dimension_numbers"]
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    targets: list[int | None] = [None] * len(updates.shape)
    for axis, target in zip(numbers.update_window_dims, windows, strict=True):
        targets[axis] = target if updates.shape[axis] == operand.shape[target] else None
    batches = [axis for axis in range(len(updates.shape)) if axis not in numbers.update_window_dims]
    for target, source in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        targets[batches[source]] = target
    rank = len(operand.shape)
    spec = _join([(operand.spec, range(rank)), (updates.spec, targets)], rank)
    summed = _axes_of(updates.spec) - _axes_of(spec)
    like = builder.gradients.get(tuple(operand.shape))
    if like is None or not summed:
        return builder.emit(equation, inputs, spec)
    table = builder.make(equation.outvars[0].aval, like)
    whole = table.bytes * (1 if builder.on_cpu else builder.count(_axes_of(like) & summed))
    scattered = builder.reduce_gradient(whole, like, summed)
    return builder.add("scatter", inputs, [table], whole if scattered else 0)


def _kernel(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """A kernel, whose program is that of a block: it states its work."""
    outputs = _elementwise(builder, equation, inputs)
    if (cost := equation.params.get("cost_estimate")) is not None:
        builder.work[builder.label].flops += builder.times * cost.flops
        builder.nodes[-1].moved = cost.bytes_accessed
    return outputs


def _slice(builder: _Builder, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    return _elementwise(builder, equation, inputs[:1])


RULES: dict[str, Callable[[_Builder, Any, Sequence[Value]], list[Value]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "dot_general": _dot,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "sharding_constraint": _constraint,
    "gather": _gather,
    "slice": _slice,
    "dynamic_slice": _slice,
    "pallas_call": _kernel,
    "core_map": _kernel,
}
RULES |= dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-mul"), _scatter)
RULES |= dict.fromkeys(
    ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"), _reduce
)
RULES |= dict.fromkeys([*COLLECTIVES, *(f"{name}_invariant" for name in COLLECTIVES)], _collective)
