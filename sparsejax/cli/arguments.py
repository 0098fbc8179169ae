"""Parsing of command lines."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from sparsejax.errors import InputError
from sparsejax.overrides import Overrides, parse_overrides


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(None, f"{message} (see {self.prog} --help)")

    def render(self, error: InputError) -> str:
        """Renders an error, in which an argument that is an option of this parser is a flag."""
        flag = f"--{(error.argument or '').replace('_', '-')}"
        known = re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w.-])", self.format_usage())
        return f"{flag}: {error.problem}" if known else str(error)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`, and the help of the options that set its keys."""
    parser.add_argument("--config", metavar="FILE[:ARG]", help="file that defines get_config(), and its argument")
    parser.epilog = "--config.KEY=VALUE sets a key of the config, such as --config.model.width=256"


def require_config(options: argparse.Namespace) -> str:
    """Returns `--config`, which the verb needs for what it does."""
    if options.config is None:
        raise InputError("config", "is required")
    return options.config


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
