"""Parsing of command lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from sparsejax.errors import InputError
from sparsejax.overrides import Overrides, parse_overrides
from sparsejax.paths import local_path
from sparsejax.presets import list_presets


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of exiting, and whose help ends with an example."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(None, f"{message} (see {self.prog} --help)")

    def render(self, error: InputError) -> str:
        """Renders an error, in which an argument that is an option of this parser is a flag."""
        flag = f"--{(error.argument or '').replace('_', '-')}"
        return f"{flag}: {error.problem}" if flag in self._option_string_actions else str(error)


def add_config(parser: argparse.ArgumentParser, group: argparse._ActionsContainer | None = None) -> None:
    """Adds `--config`, required or in a group of alternatives, and the options that change what it defines."""
    (group or parser).add_argument(
        "--config",
        required=group is None,
        metavar="CONFIG",
        help="FILE.py[:ARG], which defines get_config(), or preset:NAME[:ARG]; the presets are "
        + ", ".join(list_presets()),
    )
    add_overrides(parser, "config", "set a key of the config, such as --config.model.width=256")
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        type=_resolve_import,
        dest="imports",
        metavar="FILE.py|MODULE",
        help="import a file or a module that registers patterns or mixers; can be repeated",
    )


def _resolve_import(source: str) -> str:
    """The absolute path of a file, which the runs of a sweep import as well, or the name of a module."""
    return str(local_path(source, "import").resolve()) if source.endswith(".py") else source


def add_overrides(parser: argparse.ArgumentParser, section: str, purpose: str) -> None:
    """Adds the help of the options `--SECTION.KEY=VALUE`, which `split_overrides` parses."""
    parser.add_argument(f"--{section}.KEY", metavar="VALUE", default=argparse.SUPPRESS, help=purpose)


def check_overrides(options: argparse.Namespace) -> None:
    """Raises InputError if a key of a config is set without the config."""
    for key in options.overrides.get("config", ()):
        if options.config is None:
            raise InputError(f"--config.{key}", "needs --config")


def split_overrides(arguments: Iterable[str], sections: Sequence[str]) -> tuple[list[str], dict[str, Overrides]]:
    """Separates options such as `--config.KEY=VALUE` or `--config.KEY VALUE`, of each section, from the others."""
    others: list[str] = []
    texts: dict[str, list[str]] = {section: [] for section in sections}
    remaining = iter(arguments)
    for argument in remaining:
        section = next((section for section in sections if argument.startswith(f"--{section}.")), None)
        if section is None:
            others.append(argument)
            continue
        text = argument.removeprefix(f"--{section}.")
        value = None if "=" in text else next(remaining, None)
        texts[section].append(text if value is None else f"{text}={value}")
    return others, {section: parse_overrides(section_texts) for section, section_texts in texts.items()}
