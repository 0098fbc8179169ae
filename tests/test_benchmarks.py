"""The entry of the benchmarks: every benchmark has a question and a parser, and its quick form runs."""

import ast
import json
import subprocess
import sys

import pytest

from benchmarks.__main__ import FOLDER, NAMES, build_parser, main
from benchmarks.harness import ROOT, alternate, write_markdown
from tests.messages import check_message

NEEDS_A_DEVICE_COMPILER = {"compile": ["tpu"]}


def test_the_list_states_every_question(capsys):
    assert main([]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    questions = dict(line for line in listed if line[0] in NAMES)
    assert list(questions) == NAMES
    assert all("?" in question for question in questions.values())


def test_an_unknown_benchmark_is_one_line(capsys):
    assert main(["attentoin"]) == 2
    check_message(capsys.readouterr().err.removesuffix("\n"))


def test_every_benchmark_has_a_parser():
    for name in NAMES:
        parser = build_parser(name)
        options = parser.parse_args(["--quick", "--out=record.json", *NEEDS_A_DEVICE_COMPILER.get(name, [])])
        assert options.quick, name


def test_runs_alternate_and_slow_runs_repeat_less():
    calls = []

    def run(name, seconds):
        calls.append(name)
        return seconds

    rows = alternate({"fast": lambda: run("fast", 1.0), "slow": lambda: run("slow", 9.0)}, repetitions=5)
    assert calls == ["fast", "slow"] * 3 + ["fast"] * 2
    assert rows == {"fast": {"seconds": 1.0, "runs": [1.0] * 5}, "slow": {"seconds": 9.0, "runs": [9.0] * 3}}


def test_a_markdown_table_escapes_bars():
    assert write_markdown(("a", "b"), [("x | y", "1")], 1) == "| a | b |\n| --- | ---: |\n| x \\| y | 1 |\n"


def test_modules_of_workers_import_no_jax():
    for name in ("__main__", "harness", "gpu"):
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {module.partition(".")[0] for module in imported} & {"jax", "rich", "torch"}, name


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gpu", "compile")])
def test_the_quick_form_runs(name, tmp_path):
    out = tmp_path / "record.json"
    subprocess.run([sys.executable, "-m", "benchmarks", name, "--quick", f"--out={out}"], cwd=ROOT, check=True)
    record = json.loads(out.read_text())
    assert record["benchmark"] == name
    assert record["versions"]["python"]
