"""Mutated configurations: every one is loaded, described and planned, or rejected in one line."""

import copy
import functools
import io
import json
import math
import random
import re
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder, required_placeholder
from rich.console import Console

from sparsejax import config as configs
from sparsejax import show
from sparsejax.config.write import write_config
from sparsejax.errors import InputError
from sparsejax.model import Functional
from sparsejax.overrides import write_value
from sparsejax.presets import find_preset, list_presets
from sparsejax.runs.phases import plan_evaluations, plan_phases
from tests.fuzz import test_patterns
from tests.fuzz.worker import ROOT, read_cases, run_cases, run_nightly

FUZZER = "tests.fuzz.test_configs:check"
BASES = {name: ["", "tiny"] if "tiny" in (find_preset(name).__doc__ or "") else [""] for name in list_presets()}
FILES = {path.stem: ROOT / "configs" / path.name for path in (ROOT / "configs").glob("*.py")}
# Expressions of Python, since JSON has no integers or sets; `eval` reads them.
VALUES = (
    *("None", "True", "False", "0", "1", "-1", "2", "3", "7", "64", "100_000", "2**31", "2**40", "2**63", "-(2**70)"),
    *("10**400", "0.5", "1e4", "-0.5", "1e-30", "1e300", "float('nan')", "float('inf')", "-float('inf')", "''"),
    *("'x'", "'none'", "'null'", "'\\0'", "'é\\u200b'", "'\\ud800'", "'a' * 5000", "'1'", "b'x'", "()", "[]", "{}"),
    *("(1, 2)", "[1, 'x']", "{'a': 1}", "{1: 2}", "{None: 3}", "{'a.b': 1}", "{'': 1}", "{1, 2}", "object()", "len"),
    *("np.int64(3)", "np.float32(0.5)", "np.bool_(True)", "np.str_('full')", "np.arange(3)", "np.array(4)"),
    *("deep(30)", "deep(200)", "placeholder(int)", "required_placeholder(int)", "FieldReference(5) * 2"),
    *("FieldReference(5) // 0.0", "FieldReference('a')", "1j", "...", "range(3)", "Path('x')"),
)
SCHEDULES = (
    *("10000000000000x({})", "1024x({})", "1025x({})", "32x(32x({}))", "100x(100x(100x({})))", "0x({})", "x({})"),
    *("3x({} full", "3x({}))", "{} " * 3000, "3x()", "-3x({})", "{} é", "{},{}", "2 x({})", "1e3x({})", ""),
)
BUILT = 0.15  # share of the cases whose model is built as shapes, which takes a second
KINDS = (
    *("attention", "latent", "mamba", "mamba2", "lightning", "delta", "rglru", "conv", "lsh", "parallel", "gated"),
    *("plain", "experts", "rms", "layer", "mqar", "duplication", "text", "x", ""),
)


def test_stored_cases():
    failures = run_cases(FUZZER, read_cases("configs"))
    assert not failures, failures


@pytest.mark.nightly
def test_mutated_configurations():
    run_nightly("configs", FUZZER, generate, 5_000)


# Cases.


def generate(rng: random.Random) -> dict:
    """A preset or a configuration file with one to three changed keys, and up to two overrides."""
    base = rng.choice([*BASES, *FILES])
    argument = rng.choice(["", "mini", "paper"]) if base in FILES else rng.choice(BASES[base])
    paths = list_paths(make_base(base, argument) or {})
    edits = [edit for _ in range(rng.choice([0, 1, 1, 1, 2, 3])) if (edit := mutate(rng, paths))]
    overrides = dict(override(rng, paths) for _ in range(rng.choice([0, 0, 0, 1, 1, 2])))
    case = {"base": base, "argument": argument, "edits": edits, "overrides": overrides}
    built = rng.random() < BUILT
    return case | {"built": built, "length": rng.choice([None, None, None, 1, 100, 1000])}


@functools.cache
def make_base(base: str, argument: str) -> dict | None:
    """The sections of a preset or a file; None if it does not have the argument."""
    module = configs.run_file(FILES[base]) if base in FILES else find_preset(base)
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except (InputError, TypeError):
        return None
    return json.loads(json.dumps(configs.complete(config.to_dict())))


def list_paths(section: dict, prefix: tuple = ()) -> dict[tuple, Any]:
    """Every section and value by path."""
    paths = {}
    for name, value in section.items():
        paths[(*prefix, name)] = value
        if isinstance(value, dict):
            paths |= list_paths(value, (*prefix, name))
    return paths


def mutate(rng: random.Random, paths: dict[tuple, Any]) -> list | None:
    """A change: the path of a key and the expression of its value; None deletes it."""
    if not paths:
        return None
    path = rng.choice(list(paths))
    value, choice = paths[path], rng.random()
    if choice < 0.08:
        return [path, None]
    if choice < 0.14:
        return [(*path[:-1], rng.choice(["x", path[-1] + "s", path[-1][:-1], "a b", "é", ""])), rng.choice(VALUES)]
    if path[-1] in ("kind", "task") and choice < 0.8:
        return [path, repr(rng.choice(KINDS))]
    if path[-1] == "schedule" and choice < 0.8:
        layers = [other[-1] for other in paths if other[:-1] == ("model", "layers")]
        return [path, repr(rng.choice(SCHEDULES).replace("{}", rng.choice([*layers, "x"])))]
    if path[-1] == "pattern" and choice < 0.8:
        return [path, repr(test_patterns.generate(rng)["text"])]
    if choice < 0.25:
        return [path, repr(paths[rng.choice(list(paths))])]
    if type(value) in (int, float) and choice < 0.6:
        return [path, repr(value * rng.choice([-1, 0, 2, 3, 0.5, 1e6, 1.5]) + rng.choice([0, 0, 1, -1]))]
    return [path, rng.choice(VALUES)]


def override(rng: random.Random, paths: dict[tuple, Any]) -> tuple[str, str]:
    """A key and the text of its value, as on the command line."""
    changed = mutate(rng, paths) or [("model",), "1"]
    prefix = rng.choice([""] * 8 + ["train.phases.long.set.", "eval.also.long.", "train.phases.long."])
    key = prefix + ".".join(changed[0])
    if rng.random() < 0.1:
        key += rng.choice([".x", ".", ".kind", "..", " "])
    value = None if changed[1] is None else evaluate(changed[1])
    return key, f"{value!r:.5000}" if not isinstance(value, str) else value


def evaluate(expression: str) -> Any:
    """The value of an expression of a case."""

    def deep(levels: int) -> Any:
        return [deep(levels - 1)] if levels else {"a": 1}

    names = {"np": np, "nan": math.nan, "inf": math.inf, "deep": deep, "Path": Path, "FieldReference": FieldReference}
    try:
        return eval(expression, names | {"placeholder": placeholder, "required_placeholder": required_placeholder})
    except (ZeroDivisionError, RecursionError, TypeError):
        return None


# The check.


def check(case: dict) -> None:
    """Loads and describes a configuration; raises an exception if it fails in another way than an error of one line."""
    config = copy.deepcopy(make_base(case["base"], case["argument"]) or {})
    for path, expression in case["edits"]:
        section = config
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(path[-1], None)
            if expression is not None:
                section[path[-1]] = evaluate(expression)
    preset = types.SimpleNamespace(get_config=lambda: config)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparsejax.presets.find_preset", lambda name: preset)
            settings = configs.load("preset:changed", case["overrides"])
        checked = configs.check(settings)
    except InputError as error:
        check_error(error)
        return
    record = json.loads(json.dumps(settings.to_dict()))
    assert configs.digest(ConfigDict(record)) == configs.digest(settings)
    assert configs.check(ConfigDict(configs.complete(copy.deepcopy(record)))) == checked
    if not case["built"]:
        return
    check_file(settings, checked)
    try:
        describe(settings, checked, case["length"])
    except InputError as error:
        check_error(error)


def check_error(error: InputError) -> None:
    """Checks that an error is one short line."""
    assert len(str(error).splitlines()) == 1, str(error)
    assert len(str(error)) < 3000, f"{len(str(error))} characters"
    assert not re.search(r"(Recursion|Memory|Overflow|Attribute|Type|Assertion)Error", str(error)), str(error)


def check_file(settings: ConfigDict, checked: configs.Config) -> None:
    """Checks that a written configuration file yields the configuration, also with its values as overrides."""
    keys = ("train.steps", "model.schedule", "optimizer.clip", "data.files")
    texts = {key: write_value(functools.reduce(ConfigDict.__getitem__, key.split("."), settings)) for key in keys}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "written.py"
        file.write_text(write_config(settings.to_dict(), "Written."))
        assert configs.check(configs.load(str(file), texts)) == checked


def describe(settings: ConfigDict, checked: configs.Config, length: int | None) -> None:
    """Does what `show` and the start of training do, with shapes instead of arrays."""
    show.show(checked.model, checked.data.length if length is None else length, Console(file=io.StringIO(), width=200))
    checked.model.layer_schedule.default_length  # noqa: B018
    plan_phases(settings)
    plan_evaluations(settings)
    if len(checked.model.fold.before) < 100:  # each unrolled layer takes a fraction of a second
        assert Functional(checked.model).size > 0
