"""Names and sentences use the field's words. An exception has a reason, and an unused exception must be removed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FOLDERS = ("sparsejax", "configs", "experiments", "scripts", "tests")

# Words that say nothing about the thing they name, and words that the glossary has replaced.
VAGUE = {"one", "found", "given", "own", "more", "place", "places", "piece", "pieces", "turn", "turns"}
REPLACED = {"sees", "retention", "advice", "advise", "lean", "leads", "rooms", "engine", "engines", "refuse", "turned"}
# Identifiers that contain such a word and are right. This list only gets shorter.
ALLOWED = {
    "SentencePiece": "the name of the library",
    "place_layers": "the verb",
    "place_full": "the verb",
}

PHRASES = re.compile(
    r"may look at|look at whom|\bgo(es)? on (with|from|where)|went bad|cannot be used|who may|"
    r"\bso many (of|runs|steps|tokens|rows|batches)\b|\bis said\b|\bfor each of\b|\bif not given\b|\bthe one that\b|"
    r"\bin so many\b|\btells? of\b|\bheld against\b|\bwhat is asked\b",
    re.IGNORECASE,
)


def files(*suffixes: str) -> Iterator[Path]:
    for folder in (*FOLDERS, "docs", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path != Path(__file__):
                yield path


def identifiers(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines: functions, classes, arguments, variables and attributes that are assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def is_vague(name: str) -> bool:
    if name.startswith("test_"):  # a sentence
        return False
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)}
    return bool((VAGUE | REPLACED) & words)


def test_identifiers_name_their_thing():
    vague = {}
    for path in files(".py"):
        for name in identifiers(ast.parse(path.read_text())):
            if is_vague(name):
                vague.setdefault(name, str(path.relative_to(ROOT)))
    assert {name: path for name, path in vague.items() if name not in ALLOWED} == {}
    assert sorted(set(ALLOWED) - set(vague)) == [], "remove what is no longer used"


def test_sentences_use_the_words_of_the_field():
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [ROOT / "README.md", *files(".py", ".md", ".html", ".sh")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PHRASES.search(line)
    ]
    assert lines == []
