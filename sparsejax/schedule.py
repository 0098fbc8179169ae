"""Layer schedules: names and one string, `"3x(ssm ssm local) full"`.

schedule = item+
item     = name | count "x(" schedule ")"
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from sparsejax.errors import InputError

TOKEN = re.compile(r"\s*(?:(?P<repeat>\d+)x\(|(?P<close>\))|(?P<name>[A-Za-z_]\w*))")


PLACEMENTS = ("early", "late", "periodic", "first-middle-last")  # of `place_layers`


class ScheduleError(InputError):
    """A schedule that does not parse or names an undefined layer."""


def parse(text: str) -> tuple[str, ...]:
    """The layer names in order, with repeats expanded.

    Raises:
      ScheduleError: one line with the text and the column (from 1).
    """
    stack: list[tuple[list[str], int, int]] = [([], 1, 0)]  # names, repeats, offset
    at, end = 0, len(text.rstrip())
    while at < end:
        match = TOKEN.match(text, at)
        if not match:
            at = end - len(text[at:end].lstrip())
            raise _error(text, at, f"expected a layer name, a repeat such as '3x(' or ')', found {text[at]!r}")
        if match["repeat"]:
            if int(match["repeat"]) < 1:
                raise _error(text, match.start("repeat"), "the number of repeats is less than 1")
            stack.append(([], int(match["repeat"]), match.start("repeat")))
        elif match["name"]:
            stack[-1][0].append(match["name"])
        elif len(stack) == 1:
            raise _error(text, match.start("close"), "unmatched ')'")
        else:
            names, count, opened = stack.pop()
            if not names:
                raise _error(text, opened, "the repeat is empty")
            stack[-1][0].extend(names * count)
        at = match.end()
    if len(stack) > 1:
        raise _error(text, stack[-1][2], "unmatched parenthesis")
    if not stack[0][0]:
        raise ScheduleError("schedule", f"{text!r} contains no layers")
    return tuple(stack[0][0])


def check(text: str, defined: Collection[str]) -> tuple[str, ...]:
    """Parses a schedule and checks that all of its layers are defined.

    Raises:
      ScheduleError: The text does not parse or names an undefined layer; the message suggests the nearest defined name.
    """
    names = parse(text)
    for name in names:
        if name not in defined:
            near = difflib.get_close_matches(name, defined, n=1, cutoff=0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            at = next(match.start() for match in re.finditer(r"\b[A-Za-z_]\w*", text) if match[0] == name)
            raise _error(text, at, f"layer {name!r} is not defined{hint}")
    return names


class Fold(NamedTuple):
    """A schedule as `before + period * repeats + after`. The period is scanned; the other layers are unrolled."""

    before: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    after: tuple[str, ...]


def fold(names: tuple[str, ...]) -> Fold:
    """The fold with the fewest layers to compile. Without a repetition all layers are in `before`."""
    n = len(names)
    best = Fold(names, (), 0, ())
    for width in range(1, n // 2 + 1):
        for start in range(n - 2 * width + 1):
            stop = start + width
            while stop < n and names[stop] == names[stop - width]:
                stop += 1
            repeats = (stop - start) // width
            compiled = n - (repeats - 1) * width
            if repeats > 1 and compiled < len(best.before) + len(best.period) + len(best.after):
                stop = start + repeats * width
                best = Fold(names[:start], names[start : start + width], repeats, names[stop:])
    return best


def write(names: Sequence[str]) -> str:
    """A short text that parses to these names, with repetitions folded."""
    before, period, repeats, after = fold(tuple(names))
    if not repeats:
        return " ".join(names)
    parts = [write(before), f"{repeats}x({write(period)})", write(after)]
    return " ".join(part for part in parts if part)


def repeat_period(names: Sequence[str], layers: int) -> str:
    """Returns a schedule of `layers` layers that repeats the names, the last time in part if they do not divide."""
    return write(tuple(itertools.islice(itertools.cycle(names), layers)))


def place_layers(base: str, placed: str, layers: int, count: int, placement: str) -> str:
    """Returns a schedule with `count` layers named `placed` among layers named `base`.

    Args:
      base: Name of the other layers.
      placed: Name of the placed layers.
      layers: Number of layers.
      count: Number of placed layers.
      placement: "early" (first), "late" (last), "periodic" (each at the end of an equal share of the layers), or
        "first-middle-last" (evenly from the first to the last layer; a single one is in the middle).

    Raises:
      ScheduleError: `count` exceeds `layers`, or the placement is unknown.
    """
    if not 0 <= count <= layers or layers < 1:
        raise ScheduleError("place_layers", f"cannot place {count} layers among {layers}")
    if placement not in PLACEMENTS:
        raise ScheduleError("place_layers", f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    positions = set(_positions(layers, count, placement))
    return write(tuple(placed if position in positions else base for position in range(layers)))


def _positions(layers: int, count: int, placement: str) -> Iterable[int]:
    if placement == "early":
        return range(count)
    if placement == "late":
        return range(layers - count, layers)
    if placement == "periodic":
        return [(number + 1) * layers // count - 1 for number in range(count)]
    if count == 1:
        return [layers // 2]
    return [round(number * (layers - 1) / (count - 1)) for number in range(count)]


def _error(text: str, at: int, problem: str) -> ScheduleError:
    return ScheduleError("schedule", f"{text!r}: column {at + 1}: {problem}")
