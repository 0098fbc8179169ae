"""The base of every error about invalid input."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
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
