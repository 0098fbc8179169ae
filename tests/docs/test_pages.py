"""Every Python and shell block of the README and of the documentation runs; see `tests/docs/runner.py` for the rules.

A page runs alone with `pytest tests/docs -k tutorials/own_pattern`. Pages with nightly blocks run whole in the nightly
tests.
"""

import re

import pytest

from tests.docs import runner

ROOT = runner.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {*runner.EXECUTED, "text", "console", "json", "toml", "yaml", "bibtex"}
COMMAND = re.compile(r"\s*(\$ |sparsejax |python |pip |scripts/|import |from \w+ import )")


def name(path):
    return str(path.relative_to(ROOT).with_suffix("")).removeprefix("docs/")


def pages(keep):
    blocks = {path: runner.parse(path.read_text()) for path in PAGES}
    return pytest.mark.parametrize("path", [path for path in PAGES if any(map(keep, blocks[path]))], ids=name)


@pages(lambda block: block.executed and not block.nightly)
def test_page(path, tmp_path):
    runner.run(path, tmp_path)


@pytest.mark.nightly
@pages(lambda block: block.executed and block.nightly)
def test_nightly_page(path, tmp_path):
    runner.run(path, tmp_path, nightly=True)


@pytest.mark.quick
@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_that_look_like_commands_are_executed(path):
    blocks = runner.parse(path.read_text())
    outputs = [block.expected for block in blocks if block.executed]
    for block in blocks:
        assert block.language in LANGUAGES, f"line {block.line}: {block.language!r} is not a language of the pages"
        if block.language == "console":
            assert block.code.startswith("$ "), f"line {block.line}: a console block starts with a prompt"
        elif not block.executed and block.title is None and block.code not in outputs:
            assert not COMMAND.match(block.code), f"line {block.line}: is this a block to execute?"
