"""What the compiler says of a program: memory, FLOPs and collectives of a device."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from sparsejax.errors import shorten

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = "all-gather|all-reduce|collective-permute|reduce-scatter|all-to-all|ragged-all-to-all"
INSTRUCTION = re.compile(rf"= (\(?[^=]*?) ({COLLECTIVES})(?:-start)?\(")
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
CALLED = re.compile(r"(?:to_apply|body|condition|calls|called_computations)=\{?%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r"known_trip_count\D*(\d+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      arguments: Bytes of the arguments on a device.
      temporaries: Bytes of temporary memory.
      peak: Bytes of both, and of outputs that are not written over arguments.
      received: Bytes that a device receives by collective; None if the compiler cannot print its program.
    """

    arguments: int
    temporaries: int
    peak: int
    received: Counter[str] | None


class OutOfMemory(Exception):
    """The compiler reports that a program exceeds the memory of a device."""


def compile_program(function: Any, arguments: tuple[Any, ...], mesh: Mesh) -> Compiled:
    """Compiles a jitted function for the devices of a mesh.

    Raises:
      OutOfMemory: The program exceeds their memory.
    """
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemory(_find_usage(str(error))) from error
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    try:
        received = count_received(compiled.as_text(), mesh.size)
    except jax.errors.JaxRuntimeError:  # of programs with some asynchronous collectives of TPUs (libtpu 0.0.52)
        received = None
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, received)


def _find_usage(message: str) -> str:
    """The sentence that says how much memory is used of how much."""
    used = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", message)
    return used[0] if used else shorten(message, 200)


def count_received(text: str, devices: int) -> Counter[str]:
    """Bytes that a device receives by collective, from the text of a compiled program.

    A loop counts as often as it runs, or once if that is not a constant. Collectives of n devices are rings: a device
    receives (n - 1) / n of what it gathers, and twice that of what is reduced to all. A compiler for TPUs writes an
    asynchronous collective into several computations, with the same channel and source, which counts once.
    """
    computations = dict(_split(text))
    times: Counter[str] = Counter()

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in computations.get(name, ()):
            repeats = _count_trips(line, computations)
            called = set(CALLED.findall(line))
            for branches in BRANCHES.findall(line):
                called.update(branch.strip().lstrip("%") for branch in branches.split(","))
            for inner in called:
                visit(inner, factor * repeats)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    if entry:
        visit(entry[1], 1)
    received: dict[str, float] = defaultdict(float)
    by_source: dict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: defaultdict(float))  # by computation
    for name, factor in times.items():
        for line in computations.get(name, ()):
            for kind, size in _read_collective(line, devices):
                if " channel_id=" not in line:
                    received[kind] += factor * size
                else:
                    source = re.findall(r'channel_id=(\d+)|op_name="([^"]*)"', line)
                    by_source[(kind, *itertools.chain.from_iterable(source))][name] += factor * size
    for (kind, *_), sizes in by_source.items():
        received[kind] += max(sizes.values())
    return Counter({kind: round(size) for kind, size in received.items()})


def _count_trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often the body of a loop runs; 1 for other instructions."""
    if " while(" not in line:
        return 1
    if known := TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


def _split(text: str) -> Iterator[tuple[str, list[str]]]:
    """The computations of a module and their instructions."""
    name: str | None = None
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines = opened[1], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _read_collective(line: str, devices: int) -> Iterator[tuple[str, float]]:
    """The collective of an instruction, and the bytes that a device receives."""
    match = INSTRUCTION.search(line)
    if match is None:
        return
    result, kind = match.groups()
    sizes = [BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in ARRAY.findall(result)]
    if f" {kind}-start(" in line and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        sizes = [max(sizes) if kind != "reduce-scatter" else min(sizes)]  # operand and result
    n = _group_size(line, devices)
    if n < 2:
        return
    shares = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
    }
    yield kind, sum(sizes) * shares.get(kind, 1)


def _group_size(line: str, devices: int) -> int:
    """Number of devices of a collective."""
    if "source_target_pairs={{" in line:
        return devices
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", axes[1]))
        return math.prod(int(sizes[axis.strip()]) for axis in axes[2].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(groups[1].split(","))
    return devices
