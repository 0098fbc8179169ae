"""Pages of one table or a few: patterns, presets, files of a workdir, verification, complexity, nightly blocks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from generators import markdown
from sparsejax import complexity, workdir
from sparsejax import config as configs
from sparsejax.account import account_model
from sparsejax.ops.verification import RECORDED
from sparsejax.patterns import Pattern, library, per_head, recipes
from sparsejax.patterns.algebra import Multiset
from sparsejax.presets import find_preset, list_presets

ROOT = Path(__file__).parents[2]

# reference/patterns.md

TEXT_FORM = """\
A pattern is an expression of names and operators, in Python and as text: `patterns.parse(text)` reads the text and
`str(pattern)` writes it. Patterns ignore time unless they say otherwise: `causal & window(255)` is a causal window.
The [gallery](../gallery/index.md) shows a picture, the receptive field and the cost of each. `patterns.register` adds
[patterns](../tutorials/own_pattern.md)."""
OPERATORS = (
    ("`a & b`", "The keys to which both attend"),
    ("`a | b`", "The keys to which at least one attends"),
    ("`a - b`", "The keys to which `a` attends and `b` does not"),
)


def generate_patterns() -> str:
    """The page of the library, the operators and the recipes."""
    joined = [("`multiset(a, b, ...)`", _summary(Multiset)), ("`per_head(a, b, ...)`", _summary(per_head))]
    named = [(f"`{_signature(value)}`", _summary(value)) for value in library.NAMES.values()]
    made = [part for name, recipe in recipes.RECIPES.items() for part in _describe_recipe(name, recipe)]
    return markdown.page(
        "Patterns",
        TEXT_FORM,
        "## Library",
        markdown.table(("text", "meaning"), named),
        "## Operators",
        markdown.table(("text", "meaning"), [*OPERATORS, *joined]),
        "## Recipes",
        "Recipes name the patterns of papers and models. The text form of a recipe is that of the patterns it returns.",
        *made,
    )


def _summary(value: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0].rstrip(".")


def _signature(pattern: type[Pattern]) -> str:
    """The text form of a pattern with the names of its arguments and their defaults."""
    arguments = []
    for field in dataclasses.fields(pattern):
        default = "" if field.default is dataclasses.MISSING else str(field.default)
        if field.kw_only and not default:
            arguments.append(f"{field.name}=...")
        else:
            arguments.append(f"{field.name}={default}" if default else field.name)
    return f"{pattern.name}({', '.join(arguments)})" if arguments else pattern.name


def _describe_recipe(name: str, recipe: Callable[..., Pattern]) -> Iterator[str]:
    parameters = inspect.signature(recipe).parameters.values()
    arguments = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    summary, _, details = (inspect.getdoc(recipe) or "").partition("\n\n")
    text, _, listed = details.partition("Args:\n")
    listed = re.sub(r"\n    +", " ", listed.partition("\n\n")[0])
    yield f"### {name}"
    yield f"`{name}({', '.join(arguments)})`"
    yield summary
    yield text.strip()
    yield re.sub(r"^ *(\w+): ", r"- `\1`: ", listed, flags=re.MULTILINE)


# reference/presets.md

PRESETS = """\
A preset is a config that the package ships: `--config=preset:NAME`. Released models have the sizes of their papers, for
accounts and for loading; `--config=preset:NAME:tiny` has the same layers at a size that trains on a CPU. Active
parameters are those that process one token, embedding and head included. The cache is that of one sequence."""
LENGTH = 262_144


def generate_presets() -> str:
    """The page of the presets."""
    names = list_presets()
    heading = ("preset", "model", "sizes from", "parameters", "active", "cache at 256K")
    rows = [_tabulate_preset(name) for name in names]
    sections = [part for name in names for part in (f"## {name}", inspect.getdoc(find_preset(name)) or "")]
    return markdown.page("Presets", PRESETS, markdown.table(heading, rows, right=heading[3:]), *sections)


def _tabulate_preset(name: str) -> tuple[str, ...]:
    model = configs.check(configs.load(f"preset:{name}")).model
    layers, ends = account_model(model, LENGTH if model.causal else 1)
    total = sum(layers, ends)
    docstring = inspect.getdoc(find_preset(name)) or ""
    source = re.search(r"Sizes:\s(arXiv:[\d.]*\d)?", docstring)
    origin = (source[1] or "config.json") if source else ""
    active = _round(total.active_parameters) if total.active_parameters < total.parameters else "all"
    cache = f"{total.cache_bytes / 2**30:.2f} GiB" if model.causal else ""
    title = re.split(r"[:.](?=\s)", docstring)[0]
    return f"[`{name}`](#{name})", title, origin, _round(total.parameters), active, cache


def _round(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


# reference/workdir.md

FILES = """\
`train` writes one folder per run, and `sweep` and `search` write one folder for many runs. Every file is replaced in
one step, so that neither a reader nor a crash leaves half of it. A jsonl file only grows."""


def generate_workdir() -> str:
    """The page of the files of a run, of a sweep and of a job."""
    parts = []
    root = Path("DIR")
    for title, folder in (
        ("A run", workdir.Workdir(root)),
        ("A sweep or a search", workdir.SweepFolder(root)),
        ("The job of a run", workdir.SweepFolder(root).job("RUN")),
    ):
        rows = [
            (f"`{getattr(folder, name).relative_to(root)}`", inspect.getdoc(value) or "")
            for name, value in vars(type(folder)).items()
            if isinstance(value, property) and isinstance(getattr(folder, name), Path)
        ]
        summary = (inspect.getdoc(folder) or "").replace("`path`", f"`{folder.path}`")
        parts += [f"## {title}", summary, markdown.table(("file", "content"), rows)]
    return markdown.page("Files of a workdir", FILES, *parts)


# reference/status.md

KERNELS = {
    "dense": ("every pair; the oracle", "any"),
    "gather": ("the live tiles", "any"),
    "segment": ("the allowed pairs", "any"),
    "tpu": ("the live tiles in Pallas kernels", "TPU v5e and newer"),
    "gpu": ("the live tiles in Pallas kernels", "Hopper GPUs"),
    "cudnn": ("no mask, causal masks and causal windows", "NVIDIA GPUs"),
}
ON_CPU = "on CPU, by the tests"
INTERPRETED = "not yet on a device; values interpreted on CPU by the tests, [code compiled](../../experiments/kernels)"
STATUS = """\
## Implementations of attention

An implementation counts as verified on a kind of device once a recorded benchmark has compared it with the float64
oracle there. `impl="auto"` selects verified implementations only. `sparsejax doctor` verifies those of your machine."""
FAMILIES = """\
## Checkpoints of Hugging Face

Each family is compared with transformers in float32, **on random weights**: no released weights were loaded. The table
has the largest difference of a logit and the tolerance of the tests; [all measurements](../../experiments/parity)
include losses and gradients."""


def generate_status() -> str:
    """The page of what is verified where."""
    rows = [(f"`{name}`", *KERNELS[name], _verified(name)) for name in KERNELS]
    heading, _, *lines = (ROOT / "experiments" / "parity" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *lines)]
    columns = [cells[0].index(name) for name in ("model", "logits", "allowed")]
    families = [(f"`{row[columns[0]]}`", row[columns[1]], row[columns[2]]) for row in cells[1:]]
    return markdown.page(
        "Status",
        STATUS,
        markdown.table(("implementation", "computes", "runs on", "verified"), rows),
        FAMILIES,
        markdown.table(("family", "difference", "tolerance"), families, right=("difference", "tolerance")),
    )


def _verified(name: str) -> str:
    if name not in RECORDED:
        return ON_CPU
    return ", ".join(sorted(RECORDED[name])) or (INTERPRETED if name in ("tpu", "gpu") else "not yet")


# reference/complexity.md

COMPLEXITY = """\
`sparsejax show --complexity --length=N` prints the number of scored pairs of each method at a length, and
`--complexity=measured` also fits the growth of time and memory. The exponents below are for a forward and backward pass
of one head, [measured on a CPU](../../experiments/complexity)."""


def generate_complexity() -> str:
    """The page of the growth of costs."""
    record = json.loads((ROOT / "experiments" / "complexity" / "result.json").read_text())["methods"]
    growth = {
        name: complexity.Growth(*(tuple(method[key]) for key in ("lengths", "seconds", "memory")))
        for name, method in record.items()
    }
    heading, *rows = complexity.tabulate(complexity.TABLE_LENGTH, growth)
    return markdown.page("Growth of cost", COMPLEXITY, markdown.table(heading, rows, right=heading[3:]))


# reference/executed.md

EXECUTED = """\
Every `python` and `sh` block of the README and of these pages is executed by the tests, page by page, in an empty
folder. A `text` block after it is its output, in which `...` stands for any text. `pytest tests/docs -k PAGE` executes
one page. The blocks below take too long for every change and are executed every night; `console` blocks are not
executed. [CONTRIBUTING](../../CONTRIBUTING.md) describes the tests."""


def generate_executed() -> str:
    """The page of the nightly blocks."""
    from tests.docs.runner import parse

    rows = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = [block for block in parse(path.read_text()) if block.executed and block.nightly]
        if blocks:
            name = path.relative_to(ROOT).as_posix()
            link = f"[{name}]({'../../' + name if path.parent == ROOT else '../' + name.removeprefix('docs/')})"
            rows.append((link, str(len(blocks)), blocks[0].nightly or ""))
    table = markdown.table(("page", "nightly blocks", "reason"), rows, right=["nightly blocks"]) if rows else "None."
    return markdown.page("Executed blocks", EXECUTED, table)
