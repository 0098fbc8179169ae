"""Executes the fenced blocks of a Markdown page as a reader would: in order, in a new folder, in a new interpreter.

- `python` blocks share one namespace; `sh` blocks run with `bash -euo pipefail`, with the environment's programs first
  in PATH.
- A block with `title="FILE"` is written to that file instead of being executed, whatever its language.
- A `text` block directly after an executed block is the expected output (stdout and stderr). Within a line `...`
  matches any text; a line `...` matches any number of lines.
- `<!-- numbers vary -->` on the line before such a block lets every number of it match any number.
- `<!-- nightly: REASON -->` on the line before a block leaves it and the remaining blocks to the nightly tests.
- `<!-- clone -->` anywhere in a page links the folders of the repository into the page's folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXECUTED = ("python", "sh")
CLONE = "<!-- clone -->"
CLONED = ("configs", "experiments", "benchmarks", "scripts")
TIMEOUT = 1800  # seconds per `sh` block
FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<info>.*)")
VARY = "<!-- numbers vary -->"
NUMBER = r"[-+]?\d(?:[\d,.:]*\d)?(?:e[-+]?\d+)?"
NIGHTLY = re.compile(r"\s*<!-- nightly: (.+) -->")
TITLE = re.compile(r'title="([^"]+)"')

# Executes blocks, which arrive as lines of JSON, in one namespace. All output goes to the file that the argument names.
INTERPRETER = """
import json, os, sys, traceback, types
def serve():
    replies = os.fdopen(os.dup(1), "w")
    log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    for line in sys.stdin:
        code, name, ok = *json.loads(line), True
        try:
            exec(compile(code, name, "exec"), vars(main))
        except BaseException:
            traceback.print_exc()
            ok = False
        sys.stdout.flush(), sys.stderr.flush()
        print(json.dumps(ok), file=replies, flush=True)
serve()
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    code: str
    line: int  # of the opening fence, counted from 1
    title: str | None = None  # file to write instead of executing
    expected: str | None = None  # output
    numbers_vary: bool = False  # in the output
    nightly: str | None = None  # the reason

    @property
    def executed(self) -> bool:
        return self.language in EXECUTED and self.title is None


class BlockError(AssertionError):
    """A block failed, or its output differs from the page."""


def parse(text: str) -> list[Block]:
    """Returns the fenced blocks of a page, indented ones included."""
    blocks: list[Block] = []
    lines = text.splitlines()
    nightly, number, end = None, 0, -1
    while number < len(lines):
        match = FENCE.fullmatch(lines[number])
        if match is None:
            number += 1
            continue
        close = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == match["fence"]), None)
        if close is None:
            raise BlockError(f"line {number + 1}: the block has no closing fence")
        code = textwrap.dedent("\n".join(lines[number + 1 : close]) + "\n")
        if number and (comment := NIGHTLY.fullmatch(lines[number - 1])):
            nightly = nightly or comment[1]
        title = TITLE.search(match["info"])
        between = [line.strip() for line in lines[end + 1 : number] if line.strip()]
        if match["language"] == "text" and blocks and blocks[-1].executed and between in ([], [VARY]):
            blocks[-1] = dataclasses.replace(blocks[-1], expected=code, numbers_vary=between == [VARY])
        blocks.append(Block(match["language"], code, number + 1, title and title[1], nightly=nightly))
        end, number = close, close + 1
    return blocks


def matches(expected: str, output: str, numbers_vary: bool = False) -> bool:
    """Compares an output with the page, where `...` stands for any text or any lines."""

    def pattern(line: str) -> str:
        if line.strip() == "...":
            return r"(?:.*\n)*?"
        texts = re.split(NUMBER, line.rstrip()) if numbers_vary else [line.rstrip()]
        return NUMBER.join(re.escape(text).replace(r"\.\.\.", ".*") for text in texts) + r"[ \t]*\n"

    patterns = [pattern(line) for line in expected.rstrip().splitlines()]
    return re.fullmatch("".join(patterns), output.rstrip() + "\n") is not None


def run(path: Path, folder: Path, nightly: bool = False) -> None:
    """Executes the blocks of a page in `folder`, up to the first nightly block unless `nightly`.

    Raises:
      BlockError: names the page, the line and the output of the first block that fails.
    """
    text = path.read_text()
    for name in CLONED if CLONE in text else ():
        (folder / name).symlink_to(ROOT / name)
    with _Executor(folder) as executor:
        for block in parse(text):
            if block.nightly and not nightly:
                break
            if block.title:
                (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.title).write_text(block.code)
            elif block.executed:
                position = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{block.line}"
                ok, output = executor.execute(block, path)
                if not ok:
                    raise BlockError(f"{position}: the block failed\n{output}")
                if block.expected is not None and not matches(block.expected, output, block.numbers_vary):
                    raise BlockError(f"{position}: expected\n{block.expected}\nbut the output is\n{output}")


class _Executor:
    """Executes blocks in a folder; one interpreter executes all Python blocks."""

    def __init__(self, folder: Path):
        self.log = folder.with_name(f"{folder.name}.log")  # outside of the folder, which a page may list
        self.log.touch()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.where = {"cwd": folder, "env": os.environ | {"PATH": path, "COLUMNS": "100"}}
        command = [sys.executable, "-c", INTERPRETER, str(self.log)]
        self.python = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **self.where)

    def __enter__(self) -> _Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.python.kill()
        self.python.communicate()

    def execute(self, block: Block, path: Path) -> tuple[bool, str]:
        """Returns whether a block succeeds, and its output."""
        start = self.log.stat().st_size
        if block.language == "python":
            code = "\n" * block.line + block.code  # tracebacks name the lines of the page
            print(json.dumps([code, str(path)]), file=self.python.stdin, flush=True)
            ok = self.python.stdout.readline() == "true\n"
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
            with self.log.open("a") as log:
                ok = not subprocess.run(command, stdout=log, timeout=TIMEOUT, **streams, **self.where).returncode
        return ok, self.log.read_bytes()[start:].decode(errors="replace")
