"""The base of every error about invalid input."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Self


class InputError(ValueError):
    """Invalid input, reported in one line: `argument: problem`.

    The library names Python arguments and configuration keys. The command line renders an argument that is one of its
    options as a flag (`max_hours` becomes `--max-hours`), and the configuration puts the section in front of the key.

    Attributes:
      argument: The argument, configuration key, file or position at fault; None if there is no single one.
      problem: What was given, what is wrong with it and what to do.
    """

    def __init__(self, argument: object | None, problem: str):
        super().__init__(argument, problem)  # both, so that the error can be pickled
        self.argument = None if argument is None else str(argument)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem if self.argument is None else f"{self.argument}: {self.problem}"

    def within(self, section: str) -> Self:
        """The same error about the argument as a key of `section`."""
        return type(self)(f"{section}.{self.argument}" if self.argument else section, self.problem)


@contextlib.contextmanager
def argument_path(path: str) -> Iterator[None]:
    """Prefixes `path` to the argument of an InputError that is raised inside."""
    try:
        yield
    except InputError as error:
        raise error.within(path) from error


def require_at_least(config: Any, least: float, *names: str) -> None:
    """Raises InputError about the first of these attributes of `config` that is below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(name, f"{value} is below {least}")


def require_choice(config: Any, name: str, options: Collection[str]) -> None:
    """Raises InputError if this attribute of `config` is none of `options`."""
    if getattr(config, name) not in options:
        raise InputError(name, f"{getattr(config, name)!r} is not one of {', '.join(options)}")


LONGEST = 600  # characters of a message that quotes a user's text
SHOWN = 80  # characters of a value in a message
EXCERPT = 120  # characters of a text in which a message names a column
LISTED = 40  # names in a message


def suggest(name: str, known: Iterable[str], plural: str) -> str:
    """Returns the end of a message about an unknown name: the nearest known name, or all of them if none is near.

    Args:
      name: The unknown name.
      known: The known names.
      plural: What they are, such as "presets".
    """
    known = list(known)
    by_lower = {other.lower(): other for other in reversed(known)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"did you mean {by_lower[near[0]]!r}?"
    hidden = len(known) - LISTED
    listed = ", ".join(known[:LISTED]) + (f" and {hidden} others" if hidden > 0 else "")
    return f"the {plural} are {listed}" if known else f"there are no {plural}"


def excerpt(text: str, at: int) -> str:
    """The part of a text around a position, quoted, for a message."""
    start = max(0, at - EXCERPT // 2)
    shown = text[start : start + EXCERPT]
    return repr("..." * (start > 0) + shown + "..." * (start + EXCERPT < len(text)) if len(text) > EXCERPT else text)


def describe_value(value: Any) -> str:
    """A value of any type in a message, in one line of limited length."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"an integer of {value.bit_length()} bits"
    try:
        return shorten(repr(value), SHOWN)
    except Exception:  # such as a list that holds an integer of more digits than Python writes
        return f"a value of type {type(value).__name__}"


def shorten(text: str, limit: int = LONGEST) -> str:
    """A text in one line of limited length."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."
