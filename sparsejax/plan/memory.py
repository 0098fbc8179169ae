"""The memory of a program on a device, from the lifetimes of its values.

Values exist from the operation that computes them to the last one that reads them, in program order. As in a compiled
program, elementwise operations are fused with those that read them: their outputs have no memory of their own, unless a
product, a loop, an output or several expensive readers need them. An output is written over an input that ends there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIASES = _names("copy name optimization_barrier pcast pvary reshape sharding_constraint squeeze stop_gradient")
# Operations that the compiler repeats in each of several readers rather than storing what they compute.
CHEAP = _names(
    "abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy_start dynamic_slice eq floor ge gt"
    " integer_pow iota is_finite le lt max min mul ne neg not or pad rev round select_n shift_left"
    " shift_right_arithmetic shift_right_logical sign slice square sub transpose xor"
)
EXPENSIVE = _names("cos div erf exp exp2 expm1 log log1p logistic pow rem rsqrt sin sqrt tanh")
REDUCTIONS = _names(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum dynamic_update_slice"
)
FUSED = CHEAP | EXPENSIVE | ALIASES
SLICES = _names("dynamic_slice gather slice")  # read as much as they return
UPDATES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2}  # which input is written over a part of the first
LOOPS = _names("cond scan while")  # whose bodies count by themselves


@dataclasses.dataclass(eq=False)
class Value:
    """An array of a program.

    Attributes:
      shape: Its shape: global, or that of a shard in `jax.shard_map`.
      dtype: Its dtype.
      spec: Mesh axes that split each axis of `shape` further.
      bytes: Its bytes on a device.
      constant: Whether it depends on no input of the program; it is then split like the values that it meets.
      sources: Values that are split like it, and by how many leading axes they have more.
    """

    shape: tuple[int, ...]
    dtype: Any
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    constant: bool = False
    sources: list[tuple[Value, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Node:
    """An operation.

    Attributes:
      name: Its primitive.
      inputs: What it reads.
      outputs: What it computes.
      label: The layer that it belongs to.
      backward: Whether it belongs to the backward pass.
      workspace: Bytes that it needs besides inputs and outputs.
      moved: Bytes that it reads and writes; None for those of inputs and outputs.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    label: str
    backward: bool
    workspace: int = 0
    moved: int | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a program on a device.

    Attributes:
      peak: Largest number of bytes in use at a time, besides the inputs of the program.
      activations: Largest number of bytes at a time that the backward pass reads and the forward pass has computed.
      moved: Bytes that are read and written, by label.
    """

    peak: int
    activations: int
    moved: Counter[str]


def measure_memory(
    nodes: Sequence[Node], inputs: Sequence[Value], outputs: Sequence[Value], reused: frozenset[Value] = frozenset()
) -> Memory:
    """Walks through a program.

    Args:
      nodes: Its operations in order.
      inputs: Its inputs, whose memory does not count.
      outputs: Its outputs.
      reused: Outputs that are written to the memory of inputs.
    """
    nodes = _delay_slices(_remove_unused(nodes, outputs), frozenset(inputs))
    stored = _find_stored(nodes, outputs)
    last, for_backward = _find_lifetimes(nodes, inputs, outputs, stored)
    ends = defaultdict(list)
    for value in last.keys() - set(inputs):
        ends[last[value]].append(value)
    live = peak = held = activations = 0
    overwritten: set[Value] = set()
    for number, node in enumerate(nodes):
        kept, ending = [value for value in node.outputs if value in stored], ends[number]
        # An output that is written over an input of the program; what a product computes is copied there.
        placed = {value for value in kept if value in reused and node.name in FUSED | REDUCTIONS}
        overwritten |= placed
        added = sum(value.bytes for value in kept if value not in placed)
        if kept:
            peak = max(peak, live + added - _reusable(node, kept, ending) + node.workspace)
        live += added - sum(value.bytes for value in ending if value not in overwritten)
        live -= sum(value.bytes for value in kept if value not in placed and value not in last)
        held += sum(value.bytes for value in kept if value in for_backward)
        activations = max(activations, held)
        held -= sum(value.bytes for value in ending if value in for_backward)
    return Memory(peak, activations, _count_all_moved(nodes, inputs, stored))


def _find_lifetimes(
    nodes: Sequence[Node], inputs: Sequence[Value], outputs: Sequence[Value], stored: set[Value]
) -> tuple[dict[Value, int], set[Value]]:
    """The last operation that reads each stored value, and the values of the forward pass that the backward pass reads.

    What a fused operation reads is read by the operation with which it is fused.
    """
    roots: dict[Value, frozenset[Value]] = {value: frozenset([value]) for value in inputs}
    last: dict[Value, int] = {}
    forward, for_backward = set[Value](), set[Value]()
    for number, node in enumerate(nodes):
        read = frozenset().union(*(roots.get(value, frozenset()) for value in node.inputs))
        for value in node.outputs:
            roots[value] = frozenset([value]) if value in stored else read
        if any(value in stored for value in node.outputs):
            last |= dict.fromkeys(read, number)
            if node.backward:
                for_backward |= read & forward
            else:
                forward.update(node.outputs)
    for value in outputs:
        last |= dict.fromkeys(roots.get(value, ()), len(nodes))
    return last, for_backward


def _count_all_moved(nodes: Sequence[Node], inputs: Sequence[Value], stored: set[Value]) -> Counter[str]:
    """Bytes that are read and written, by label."""
    moved: Counter[str] = Counter()
    reads = {value: value.bytes for value in inputs}
    for node in nodes:
        kept = [value for value in node.outputs if value in stored]
        read = sum(reads.get(value, 0) for value in dict.fromkeys(node.inputs))
        for value in node.outputs:
            reads[value] = value.bytes if value in stored or node.name in SLICES else read
        if kept and node.name not in LOOPS:
            moved[node.label] += _count_moved(node, kept, read)
    return moved


def _count_moved(node: Node, kept: Sequence[Value], read: int) -> int:
    """Bytes that an operation reads and writes, given those of its inputs."""
    if node.moved is not None:
        return node.moved
    if node.name in UPDATES:
        return 2 * node.inputs[UPDATES[node.name]].bytes
    written = sum(value.bytes for value in kept)
    return written + (written if node.name in SLICES else read)


def _reusable(node: Node, kept: Sequence[Value], ending: Sequence[Value]) -> int:
    """Bytes of the outputs of an elementwise operation that are written over inputs that end with it."""
    if node.name not in FUSED | REDUCTIONS | {"scan", "while", "scatter", "scatter-add"}:
        return 0
    sizes = sorted((value.bytes for value in ending), reverse=True)
    total = 0
    for value in sorted(kept, key=lambda value: -value.bytes):
        if sizes and sizes[0] >= value.bytes:
            sizes.pop(0)
            total += value.bytes
    return total


def _remove_unused(nodes: Sequence[Node], outputs: Sequence[Value]) -> list[Node]:
    """The operations on which the outputs depend."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(value in needed for value in node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _delay_slices(nodes: Sequence[Node], inputs: frozenset[Value]) -> list[Node]:
    """The operations with slices of inputs right before what reads them first, as compilers schedule them."""
    first: dict[Value, int] = {}
    for number, node in enumerate(nodes):
        for value in node.inputs:
            first.setdefault(value, number)

    def position(number: int) -> float:
        node = nodes[number]
        if node.name != "dynamic_slice" or node.inputs[0] not in inputs:
            return number
        return min((first[value] for value in node.outputs if value in first), default=number + 0.5) - 0.5

    return [nodes[number] for number in sorted(range(len(nodes)), key=position)]


def _find_stored(nodes: Sequence[Node], outputs: Sequence[Value]) -> set[Value]:
    """The values that have memory."""
    readers: dict[Value, int] = defaultdict(int)
    stored: set[Value] = set(outputs)
    for node in reversed(nodes):
        fused = node.name in FUSED
        for value in node.outputs:
            many = readers[value] > 1 and node.name in EXPENSIVE
            if not fused or many:
                stored.add(value)
        if node.name in ALIASES:
            # An alias of a stored value is that value.
            for value in node.outputs:
                if value in stored:
                    stored.discard(value)
                    stored.update(node.inputs[:1])
        through = node.name in ALIASES
        for value in set(node.inputs):
            readers[value] += sum(readers[output] for output in node.outputs) if through else 1
            if not (fused or node.name in REDUCTIONS):
                stored.add(value)
    return stored
