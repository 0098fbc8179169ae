"""Every command line of the experiments' pages parses, and every file that they name exists."""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.__main__ import build_parser as build_benchmark_parser
from sparsejax import config as configs
from sparsejax.cli import VERBS, build_parser
from sparsejax.cli.arguments import split_overrides
from sparsejax.sweep import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("experiments/*/README.md")), ROOT / "benchmarks" / "README.md"]
PROGRAMS = ("sparsejax", "python", "pytest", "scripts/")
PATH = re.compile(r"(?:benchmarks|configs|docs|experiments|scripts|sparsejax|tests)/[\w./-]+\.\w+(?=[`:, ]|$)")
PLACEHOLDERS = ("NAME", "FILE", "DIR", "h100", "result", "report")  # in the paths of outputs


def command_lines(text: str) -> list[str]:
    """The command lines in code spans and fenced blocks of a page."""
    fenced = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    commands = [command for line in lines for command in expand_loop(line.removeprefix("$ "))]
    return [command for command in commands if command.startswith(PROGRAMS) and " " in command]


def expand_loop(line: str) -> list[str]:
    """The commands of a line, which may be a loop over words."""
    loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line)
    if loop is None:
        return [line]
    variable, words, body = loop.groups()
    return [body.replace(f"${variable}", word) for word in words.split()]


def check(command: str) -> None:
    """Parses a command line."""
    program, *arguments = shlex.split(re.sub(r"\bN\b", "1", command), comments=True)
    if program == "sparsejax":
        check_verb(arguments)
    elif program == "pytest":
        assert all((ROOT / path).exists() for path in arguments if "/" in path), command
    elif arguments[:2] == ["-m", "benchmarks"]:
        if arguments[2:] and arguments[2] != "NAME":
            build_benchmark_parser(arguments[2]).parse_args(arguments[3:])
    elif program == "python":
        module = arguments[0] == "-m"
        source = Path(importlib.util.find_spec(arguments[1]).origin) if module else ROOT / arguments[0]
        options = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
        assert all(f'"{option}"' in source.read_text() for option in options), command
    else:
        assert (ROOT / program).exists(), command


def check_verb(arguments: list[str]) -> None:
    """Parses the arguments of sparsejax, loads the config with its settings, and reads the sweep."""
    name = next(name for name in sorted(VERBS, key=len, reverse=True) if arguments[: len(name.split())] == name.split())
    verb = importlib.import_module(f"sparsejax.cli.{name.replace(' ', '_')}")
    others, overrides = split_overrides(arguments[len(name.split()) :], verb.OVERRIDES)
    options = build_parser(name).parse_args(others, argparse.Namespace(overrides=overrides))
    if getattr(options, "config", None):
        configs.load(options.config, overrides["config"])
    if name == "sweep" and ".py" in options.sweep:
        read_sweep(options.sweep)
    if name == "search":
        path, _, function = options.space.partition(":")
        assert f"def {function or 'space'}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_commands_of_a_page_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in command_lines(page.read_text()):
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_files_of_a_page_exist(page):
    for path in PATH.findall(page.read_text()):
        assert (ROOT / path).exists() or Path(path).stem in PLACEHOLDERS, path


def test_a_wrong_command_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = command_lines("```sh\nfor n in a b; do sparsejax doctor --fast \\\n  --$n; done\n```\n`python x.py`")
    assert lines == ["sparsejax doctor --fast  --a", "sparsejax doctor --fast  --b", "python x.py"]
    for command in (lines[0], "sparsejax train --config=preset:quickstart --workdir=w --config.train.stepss=1"):
        with pytest.raises(ValueError, match=r"--fast|stepss"):
            check(command)
    with pytest.raises(SystemExit):
        check("python -m benchmarks scans --lenght=3")
    with pytest.raises(AssertionError):
        check("python -m tests.stress.kill_runs --killls=3")
