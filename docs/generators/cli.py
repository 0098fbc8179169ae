"""reference/cli.md and reference/exit_codes.md: the verbs, from their parsers, and the exit codes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import textwrap

from generators import markdown
from sparsejax import signals
from sparsejax.cli import VERBS, build_parser, exit_codes

INTRODUCTION = """\
`sparsejax VERB --help` prints the options of a verb, and `sparsejax --version` the version. `python -m sparsejax` runs
the same program. Invalid input is reported in one line on stderr. The [exit codes](exit_codes.md) tell how a command
ended."""


def generate() -> str:
    """The page of the verbs."""
    contents = markdown.table(
        ("verb", "purpose"), [(f"[`{name}`](#{markdown.anchor(name)})", purpose) for name, purpose in VERBS.items()]
    )
    return markdown.page("Command line", INTRODUCTION, contents, *(part for name in VERBS for part in _describe(name)))


def _describe(name: str) -> list[str]:
    """Heading, synopsis, options and example of a verb."""
    parser, verb = build_parser(name), importlib.import_module(f"sparsejax.cli.{name.replace(' ', '_')}")
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [(f"`{_invocation(action)}`", _meaning(action)) for action in actions]
    synopsis = textwrap.fill(f"usage: sparsejax {name} {_synopsis(parser, actions)}", 80, subsequent_indent="    ")
    codes = "".join(f", {code}" for code in sorted({0, exit_codes.USAGE_ERROR, *verb.EXIT_CODES.values()}))[2:]
    return [
        f"## {name}",
        parser.description or "",
        f"```text\n{synopsis}\n```",
        markdown.table(("option", "meaning"), rows) if rows else "It has no options.",
        f"Exit codes: {codes}. Example:",
        f"```console\n$ {verb.EXAMPLE}\n```",
    ]


def _meaning(action: argparse.Action) -> str:
    return markdown.sentence(re.sub(r"the presets are .*", "see [Presets](presets.md)", action.help or ""))


def _synopsis(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    """The options, of which those in brackets are optional and those separated by | exclude one another."""
    parts, done = [], set()
    for action in actions:
        group = next((group for group in parser._mutually_exclusive_groups if action in group._group_actions), None)
        if id(action) in done:
            continue
        members = group._group_actions if group else [action]
        done |= {id(member) for member in members}
        required = group.required if group else action.required
        text = " | ".join(_invocation(member) for member in members)
        parts.append(f"({text})" if required and group else text if required else f"[{text}]")
    return " ".join(parts)


def _invocation(action: argparse.Action) -> str:
    """An option with its value."""
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    if not action.option_strings:
        return f"{value} ..." if action.nargs in ("*", "+") else str(value)
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return flag
    return f"{flag}[={value}]" if action.nargs == "?" else f"{flag}={value}"


def generate_exit_codes() -> str:
    """The page of the exit codes."""
    rows = [("0", "Success", "all")]
    for module in (exit_codes, signals):
        for name, value, comment in re.findall(r"^([A-Z_]+) = (\d+)  # (.*)$", inspect.getsource(module), re.MULTILINE):
            verbs = [verb for verb in VERBS if int(value) in _exit_codes(verb)]
            shown = "all" if int(value) == exit_codes.USAGE_ERROR else ", ".join(f"`{verb}`" for verb in verbs)
            rows.append((value, f"`{name}`: {comment}", shown))
    rows.sort(key=lambda row: int(row[0]))
    introduction = (
        "The names are constants of `sparsejax.cli`. A command that stopped with 75 resumes when it is run again."
    )
    return markdown.page("Exit codes", introduction, markdown.table(("code", "meaning", "verbs"), rows, right=["code"]))


def _exit_codes(verb: str) -> set[int]:
    return set(importlib.import_module(f"sparsejax.cli.{verb.replace(' ', '_')}").EXIT_CODES.values())
