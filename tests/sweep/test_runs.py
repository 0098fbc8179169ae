import sys
from pathlib import Path

import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.sweep import SweepError, plan_runs, read_sweep, show_command
from tests.messages import rejects

pytestmark = pytest.mark.quick

RECIPE = str(Path(__file__).parents[1] / "train" / "recipe.py")


def test_a_run_is_a_command_line(tmp_path):
    (run,) = plan_runs(RECIPE, [{"train.seed": 3, "model.schedule": "local full"}], {"train.steps": "7"})
    command = run.command(tmp_path)
    assert command == [
        sys.executable,
        "-m",
        "sparsejax",
        "train",
        f"--config={RECIPE}",
        "--config.model.schedule=local full",
        "--config.train.seed=3",
        "--config.train.steps=7",
        f"--workdir={tmp_path}/runs/{run.name}",
    ]
    assert "'--config.model.schedule=local full'" in show_command(command)
    assert (run.seed, run.checked.train.steps, run.label) == (3, 7, "schedule=local full")


def test_a_run_imports_what_its_sweep_imports(tmp_path):
    (run,) = plan_runs(RECIPE, [{}], imports=["/parts/patterns.py", "parts.mixers"])
    options = run.command(tmp_path)
    assert options[options.index(f"--config={RECIPE}") + 1 :][:2] == [
        "--import=/parts/patterns.py",
        "--import=parts.mixers",
    ]


def test_names():
    runs = plan_runs(RECIPE, [{"train.seed": 0, "train.steps": 5}, {"train.steps": "5", "train.seed": 0}])
    assert len(runs) == 1  # a value and its text are equal, in any order
    others = plan_runs(RECIPE, [{"train.seed": 1, "train.steps": 5}, {"train.steps": 5}, {}])
    assert len({run.name for run in runs + others}) == 4
    assert all(len(run.name) == 12 for run in runs)


def test_labels():
    sweep = [{"label": "a", "train.seed": i} for i in range(2)] + [{"train.steps": 5}, {}]
    assert [run.label for run in plan_runs(RECIPE, sweep)] == ["a", "a", "steps=5", "config"]
    with rejects(SweepError, "b"):
        plan_runs(RECIPE, [{"label": "a"}, {"label": "b"}])


def test_labels_tell_keys_apart():
    sweep = [{"model.width": 32}, {"model.layers.full.mlp.width": 32, "train.batch": 2}]
    assert [run.label for run in plan_runs(RECIPE, sweep)] == ["model.width=32", "mlp.width=32, batch=2"]


def test_overrides_of_a_run_take_precedence():
    (run,) = plan_runs(RECIPE, [{"train.steps": 9}], {"train.steps": "7"})
    assert run.checked.train.steps == 9


INVALID = {
    "key": {"train.stepps": 5},
    "type": {"train.steps": "many"},
    "schedule": {"model.schedule": "ful", "train.seed": 1},
    "combination": {"train.batch": 3, "train.accumulate": 2},
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_configuration_names_the_run(case):
    key, value = next(iter(INVALID[case].items()))
    with rejects(SweepError, f"{key.rpartition('.')[2]}={value}"):
        plan_runs(RECIPE, [{}, INVALID[case]])


def test_steps_are_limited():
    sweep = [{"train.steps": 5}, {"train.steps": 6, "label": "long"}]
    assert len(plan_runs(RECIPE, sweep, max_steps=6)) == 2
    with rejects(SweepError, "max_steps"):
        plan_runs(RECIPE, sweep, max_steps=5)


def test_sweeps_of_a_file(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        "from sparsejax.sweep import grid\n"
        "def sweep():\n    yield from grid({'a': [1, 2]})\n"
        "def other():\n    return [{'b': 1}]\n"
        "def empty():\n    return []\n"
        "def words():\n    return ['a']\n"
        "def broken():\n    return [{}['a']]\n"
    )
    assert read_sweep(str(file)) == [{"a": 1}, {"a": 2}]
    assert read_sweep(f"{file}:other") == [{"b": 1}]
    for name in ("nothing", "empty", "words", "broken"):
        with rejects(SweepError, name):
            read_sweep(f"{file}:{name}")
    with rejects(SweepError, "none.py"):
        read_sweep("none.py")
    assert read_sweep("a=[1, 2]") == [{"a": 1}, {"a": 2}]


def test_scalars_of_numpy_are_python_values(tmp_path):
    rates, widths = np.logspace(-3, -2, 2), np.array([48, 64])
    swept = [{"optimizer.learning_rate": rate, "model.width": width} for rate, width in zip(rates, widths, strict=True)]
    plain = [
        {"optimizer.learning_rate": 0.001, "model.width": 48},
        {"optimizer.learning_rate": 0.01, "model.width": 64},
    ]
    runs, expected = plan_runs(RECIPE, swept), plan_runs(RECIPE, plain)
    assert [(run.name, run.label, run.overrides) for run in runs] == [
        (run.name, run.label, run.overrides) for run in expected
    ]
    assert "--config.model.width=48" in runs[0].command(tmp_path)
    with rejects(InputError, "train.steps"):
        plan_runs(RECIPE, [{"train.steps": np.arange(3)}])


def test_a_sweep_over_kinds():
    runs = plan_runs(RECIPE, [{"model.layers.full.mixer.kind": kind} for kind in ("attention", "lightning")])
    assert [type(run.checked.model.layers["full"].mixer).__name__ for run in runs] == [
        "AttentionConfig",
        "LightningConfig",
    ]


def test_colons_in_the_path_of_a_sweep(tmp_path):
    path = tmp_path / "a:b.py"
    path.write_text("def other():\n    return [{'train.steps': 3}]\n")
    assert read_sweep(f"{path}:other") == [{"train.steps": 3}]
