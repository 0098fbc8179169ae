"""Layer schedules: the order of layers as one string, such as `"3x(ssm ssm local) full"`.

schedule = item+
item     = name | count "x(" schedule ")"
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from sparsejax import svg
from sparsejax.errors import InputError, excerpt, suggest
from sparsejax.palette import CELLS, GREY, SERIES
from sparsejax.patterns import Pattern, drawing, format_numbers, receptive_field
from sparsejax.patterns import parse as parse_pattern

TOKEN = re.compile(r"\s*(?:(?P<repeat>\d+)x\(|(?P<close>\))|(?P<name>[A-Za-z_]\w*))")
MAX_LAYERS = 1024  # of a schedule
PLACEMENTS = ("early", "late", "periodic", "first-middle-last")  # of `place_layers`


class ScheduleError(InputError):
    """A schedule that does not parse or names an undefined layer."""


def parse(text: str) -> tuple[str, ...]:
    """The layer names in order, at most `MAX_LAYERS`, with repeats expanded.

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
            repeats = int(match["repeat"]) if len(match["repeat"]) < 20 else MAX_LAYERS + 1
            if repeats < 1:
                raise _error(text, match.start("repeat"), "the number of repeats is less than 1")
            stack.append(([], repeats, match.start("repeat")))
        elif match["name"]:
            stack[-1][0].append(match["name"])
            if len(stack[-1][0]) > MAX_LAYERS:
                raise _error(text, match.start("name"), f"more than {MAX_LAYERS:,} layers")
        elif len(stack) == 1:
            raise _error(text, match.start("close"), "unmatched ')'")
        else:
            names, count, opened = stack.pop()
            if not names:
                raise _error(text, opened, "the repeat is empty")
            if len(stack[-1][0]) + len(names) * count > MAX_LAYERS:  # before the layers are listed
                raise _error(text, opened, f"more than {MAX_LAYERS:,} layers")
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
      ScheduleError: The text does not parse or names an undefined layer; the message suggests a defined name.
    """
    names = parse(text)
    for name in names:
        if name not in defined:
            at = next(match.start("name") for match in TOKEN.finditer(text) if match["name"] == name)
            raise _error(text, at, f"layer {name!r} is not defined; {suggest(name, defined, 'layers')}")
    return names


class Fold(NamedTuple):
    """A schedule as `before + period * repeats + after`. The period is scanned; the other layers are unrolled."""

    before: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    after: tuple[str, ...]


def fold(names: tuple[str, ...]) -> Fold:
    """The fold with the fewest layers to compile. Without a repetition all layers are in `before`."""
    n = compiled = len(names)
    codes = np.unique(names, return_inverse=True)[1] if names else np.zeros(0, int)
    best = Fold(names, (), 0, ())
    for width in range(1, n // 2 + 1):
        if width >= compiled:
            break
        # Runs of layers that equal the layer `width` before them: each extends a period that starts `width` earlier.
        equal = np.concatenate([[False], codes[width:] == codes[:-width], [False]])
        starts, stops = np.flatnonzero(equal[1:] != equal[:-1]).reshape(-1, 2).T
        repeats = (stops - starts) // width + 1
        if len(starts) and n - (repeats.max() - 1) * width < compiled:
            start, count = int(starts[repeats.argmax()]), int(repeats.max())
            compiled = n - (count - 1) * width
            best = Fold(names[:start], names[start : start + width], count, names[start + count * width :])
    return best


def write(names: Sequence[str]) -> str:
    """A short text that parses to these names, with repetitions folded."""
    parts = []
    while names:
        before, period, repeats, names = fold(tuple(names))
        parts += [write(before), f"{repeats}x({write(period)})"] if repeats else [" ".join(before)]
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
    if not 0 <= count <= layers or not 1 <= layers <= MAX_LAYERS:
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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Layers in order, with the pattern that each one reads through. Notebooks show it as a picture and a table.

    Attributes:
      names: Names of the layers from input to output.
      patterns: Pattern per name: the positions that a position can read from.
      mixers: Description of the mixer per name, for the table. Optional.
    """

    names: tuple[str, ...]
    patterns: Mapping[str, Pattern]
    mixers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, patterns: Mapping[str, str | Pattern]) -> Schedule:
        """Returns the schedule of a text, with a pattern or its text form per name.

        Raises:
          ScheduleError: The text does not parse or names a layer without a pattern.
          PatternError: A pattern does not parse.
        """
        names = check(text, patterns)
        return cls(names, {name: parse_pattern(pattern) for name, pattern in patterns.items() if name in names})

    @property
    def layers(self) -> list[tuple[str, Pattern]]:
        """Name and pattern per layer."""
        return [(name, self.patterns[name]) for name in self.names]

    @property
    def default_length(self) -> int:
        """Sequence length in tokens at which a picture shows the structure of every pattern."""
        return max(drawing.default_length(pattern) for pattern in self.patterns.values())

    def receptive_fields(self, length: int) -> Iterator[np.ndarray]:
        """Yields the inputs that can influence the last position after each layer, bool [length]."""
        inputs = np.arange(length) == length - 1
        for depth in range(1, len(self.names) + 1):
            if not inputs.all():  # receptive fields only grow
                inputs = receptive_field.trace([pattern for _, pattern in self.layers[:depth]], length)[0]
            yield inputs

    def to_svg(self, length: int | None = None) -> str:
        """Returns a row per layer that marks the inputs that can influence the last position, as SVG.

        Args:
          length: Sequence length in tokens; defaults to `default_length`.
        """
        return _draw(self, self.default_length if length is None else length)

    def __str__(self) -> str:
        return write(self.names)

    def __repr__(self) -> str:
        patterns = {name: str(pattern) for name, pattern in self.patterns.items()}
        return f"schedule.Schedule.parse({str(self)!r}, {patterns})"

    def _repr_html_(self) -> str:
        headings = ["name", "layers", *(["mixer"] if self.mixers else []), "pattern"]
        rows = []
        for name, colour in _colours(self).items():
            swatch = f'<span style="color: {colour}">&#9632;</span> '
            numbers = format_numbers([number for number, other in enumerate(self.names) if other == name])
            mixer = [escape(self.mixers.get(name, ""))] if self.mixers else []
            values = [swatch + escape(name), numbers, *mixer, f"<code>{escape(str(self.patterns[name]))}</code>"]
            rows.append("".join(f'<td style="text-align: left">{value}</td>' for value in values))
        head = "".join(f'<th style="text-align: left">{heading}</th>' for heading in headings)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<div>{self.to_svg()}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


ROW, LEAST_ROW, MAX_ROWS_HEIGHT = 16, 3, 480  # pixels of a layer, and of all layers if there are many
LABELLED = 10  # pixels from which rows have labels
WIDTH = 256  # pixels of the inputs


def _colours(schedule: Schedule) -> dict[str, str]:
    """Colour per name in the order of first use."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(dict.fromkeys(schedule.names))}


def _draw(schedule: Schedule, length: int) -> str:
    colours, n = _colours(schedule), len(schedule.names)
    row = min(ROW, max(LEAST_ROW, MAX_ROWS_HEIGHT // n))
    title = textwrap.wrap(str(schedule), 58, break_on_hyphens=False)
    left, top = 30 + 6.2 * max(map(len, colours)), 12.0 + 14 * len(title)
    tile = -(-length // drawing.PICTURE_CELLS)
    cell = WIDTH // -(-length // tile)
    elements = [svg.text(12, 18 + 14 * line, words, mono=True) for line, words in enumerate(title)]
    for number, (name, inputs) in enumerate(zip(schedule.names, schedule.receptive_fields(length), strict=True)):
        y = top + number * row
        states = drawing.draw_mask(name, inputs[None, :], tile).states
        shades = (CELLS[drawing.DEAD], _lighten(colours[name]), colours[name])
        elements.append(svg.cells(states, left, y, (cell, row - (row > LEAST_ROW)), shades))
        if row >= LABELLED:
            elements.append(svg.text(left - 6, y + row - 5, f"{name} {number}", anchor="end", size=10))
            reached = f"{int(inputs.sum()):,}"
            elements.append(svg.text(left + WIDTH + 8, y + row - 5, reached, size=10, fill=GREY))
    if row < LABELLED:
        elements += _label_runs(schedule.names, left - 6, top, row)
    bottom = top + n * row
    for token in range(0, length + 1, max(1, length // 4)):
        at = left + token / tile * cell
        elements.append(svg.text(at, bottom + 11, str(token), anchor="middle", size=9, fill=GREY))
    caption = f"inputs that can influence the last of {length:,} positions after each layer"
    elements.append(svg.text(12, bottom + 30, caption, size=10, fill=GREY))
    legend, width = svg.legend(12, bottom + 50, [(colour, name) for name, colour in colours.items()])
    size = max(left + WIDTH + 60, width + 12, 24 + 0.62 * svg.FONT * max(map(len, title)), 360)
    return svg.document(size, bottom + 62, f"Receptive field of the schedule {schedule}", [*elements, legend])


def _label_runs(names: Sequence[str], x: float, top: float, row: float) -> Iterator[str]:
    """Labels of adjacent equal layers that are high enough together."""
    first = 0
    for name, run in itertools.groupby(names):
        count = len(list(run))
        if count * row >= LABELLED:
            yield svg.text(x, top + (first + count / 2) * row + 3.5, name, anchor="end", size=10)
        first += count


def _lighten(colour: str) -> str:
    """A colour mixed with white."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 2 * 255) // 3:02x}" for i in (1, 3, 5))


def _error(text: str, at: int, problem: str) -> ScheduleError:
    return ScheduleError("schedule", f"{excerpt(text, at)}: column {at + 1}: {problem}")
