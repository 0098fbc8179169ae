"""A plan as tables and lines, and as a record."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from sparsejax.plan.planner import Plan, Proposal, describe_overrides, roofline
from sparsejax.sharding import MESH_AXES
from sparsejax.show import print_lines, print_table

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the memory, the collectives and the times of a plan, and whether it fits."""
    axes = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, plan.axes, strict=True))
    phase = "" if plan.phase is None else f", phase {plan.phase}"
    print_lines(
        console, f"{plan.topology}, {plan.topology.count} devices: {axes}; {plan.length:,} tokens per row{phase}"
    )
    _print_memory(plan, console)
    if plan.topology.count > 1:
        _print_collectives(plan, console)
    _print_times(plan, console)
    print_lines(console, describe_verdict(plan))


def _print_memory(plan: Plan, console: Console) -> None:
    account, compiled = plan.account, plan.compiled
    rows = [
        ("parameters", account.parameters),
        ("optimizer", account.optimizer),
        *([("teacher", account.teacher)] if account.teacher else []),
        ("batch", account.batch),
        ("activations", account.activations),
        ("temporaries", account.temporaries),
        ("peak", account.peak),
    ]
    known = {} if compiled is None else {"batch": compiled.arguments, "temporaries": compiled.temporaries}
    known |= {} if compiled is None else {"peak": compiled.peak}
    label = {"batch": "to here", "temporaries": "with activations", "peak": ""}
    columns = ["GiB per device", "account"] + ([] if compiled is None else ["compiler", ""])
    cells = [
        (name, _gib(size), *([] if compiled is None else [_gib(known.get(name)), label.get(name, "")]))
        for name, size in rows
    ]
    print_table(console, columns, cells, texts=1, keys=1, total=True)


def _print_collectives(plan: Plan, console: Console) -> None:
    account, compiled = plan.account.received, None if plan.compiled is None else plan.compiled.received
    names = sorted({*account, *(compiled or ())})
    columns = ["GiB received per device and step", "account"] + ([] if compiled is None else ["compiler"])
    rows = [(name, _gib(account[name]), *([] if compiled is None else [_gib(compiled[name])])) for name in names]
    if plan.compiled is not None and compiled is None:
        print_lines(console, "the compiler cannot print its program: its collectives are not counted")
    if rows:
        print_table(console, columns, rows, texts=1, keys=1)


def _print_times(plan: Plan, console: Console) -> None:
    """The roofline by kind of layer."""
    machine, work = plan.topology.machine, plan.account.work
    columns = ["per device and step", "TFLOP", "GiB moved", "GiB received", *(["seconds"] if machine.flops else [])]
    rows = [
        (
            name,
            f"{part.flops / 1e12:,.2f}",
            _gib(part.moved),
            _gib(sum(part.received.values())),
            *([f"{roofline(part, plan.topology):,.3f}"] if machine.flops else []),
        )
        for name, part in work.items()
    ]
    print_table(console, columns, rows, texts=1, keys=1)
    if machine.flops:
        total = sum(plan.account.seconds(plan.topology).values())
        peaks = (
            f"{machine.flops / 1e12:,.0f} TFLOP/s in bfloat16, {machine.bandwidth / 1e9:,.0f} GB/s of memory and"
            f" {machine.interconnect / 1e9:,.0f} GB/s from other devices"
        )
        print_lines(
            console,
            f"seconds: the largest of FLOPs, bytes moved and bytes received, each divided by its peak: {peaks};"
            f" at best {total:,.3f} s per step",
        )


def describe_verdict(plan: Plan) -> str:
    """Says whether a plan fits, and who says so."""
    source = "the account" if plan.compiled is None and not plan.exceeds else "the compiler"
    capacity = plan.topology.capacity
    if plan.exceeds:
        verdict = f"does not fit: {plan.problem}"
    elif plan.fits:
        verdict = f"fits: {_gib(plan.peak)} of {_gib(capacity)} GiB per device"
    else:
        verdict = f"does not fit: {_gib(plan.peak)} of {_gib(capacity)} GiB per device"
    note = f"; {plan.problem}" if plan.problem and not plan.exceeds else ""
    return f"{verdict}, by {source}{note}"


def print_proposals(proposals: Sequence[Proposal], console: Console) -> None:
    """Prints the changes with which a run fits."""
    if not proposals:
        print_lines(console, "no mesh, rematerialization or accumulation that was tried is enough: use more devices")
        return
    print_lines(console, "the smallest changes with which it fits, the fastest first:")
    for proposal in proposals:
        seconds = sum(proposal.plan.account.seconds(proposal.plan.topology).values())
        time = f", {seconds:,.3f} s per step at best" if seconds else ""
        peak = f"{_gib(proposal.plan.peak)} GiB{time}"
        print_lines(console, f"  {describe_overrides(proposal.overrides)}  ({peak})")


def print_lengths(plans: Iterable[Plan], console: Console) -> list[Plan]:
    """Prints a line per length as the plans come; returns them."""
    done = []
    for plan in plans:
        done.append(plan)
        print_lines(console, f"{plan.length:>12,} tokens  {describe_verdict(plan)}")
    longest = max((plan.length for plan in done if plan.fits), default=None)
    if longest is not None:
        print_lines(console, f"longest row that fits: {longest:,} tokens")
    return done


def record(plan: Plan) -> dict[str, Any]:
    """Returns a plan with the types of JSON."""
    work = {
        name: {"flops": part.flops, "moved": part.moved, "received": dict(part.received)}
        for name, part in plan.account.work.items()
    }
    account = dataclasses.asdict(dataclasses.replace(plan.account, work={})) | {
        "peak": plan.account.peak,
        "received": _plain(plan.account.received),
        "work": work,
    }
    compiled = plan.compiled
    capacity = plan.topology.capacity
    return {
        "topology": str(plan.topology),
        "phase": plan.phase,
        "length": plan.length,
        "axes": dict(zip(MESH_AXES, plan.axes, strict=True)),
        "capacity": capacity if math.isfinite(capacity) else None,
        "account": account,
        "compiled": None if compiled is None else {name: _plain(x) for name, x in vars(compiled).items()},
        "problem": plan.problem,
        "fits": plan.fits,
        "seconds": plan.account.seconds(plan.topology),
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Counter) else value


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:,.3f}"
