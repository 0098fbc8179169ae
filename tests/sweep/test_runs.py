import sys
from pathlib import Path

import pytest

from sparsejax.sweep import SweepError, limit_steps, plan_runs, read_sweep, show_command
from sparsejax.train import RESULT

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


def test_names():
    runs = plan_runs(RECIPE, [{"train.seed": 0, "train.steps": 5}, {"train.steps": "5", "train.seed": 0}])
    assert len(runs) == 1  # a value and its text are one override, in whatever order they come
    others = plan_runs(RECIPE, [{"train.seed": 1, "train.steps": 5}, {"train.steps": 5}, {}])
    assert len({run.name for run in runs + others}) == 4
    assert all(len(run.name) == 12 for run in runs)


def test_labels():
    sweep = [{"label": "a", "train.seed": i} for i in range(2)] + [{"train.steps": 5}, {}]
    assert [run.label for run in plan_runs(RECIPE, sweep)] == ["a", "a", "steps=5", "config"]
    with pytest.raises(SweepError, match="b: is the same run as a"):
        plan_runs(RECIPE, [{"label": "a"}, {"label": "b"}])


def test_labels_tell_keys_apart():
    sweep = [{"model.width": 32}, {"model.layers.full.mlp.width": 32, "train.batch": 2}]
    assert [run.label for run in plan_runs(RECIPE, sweep)] == ["model.width=32", "mlp.width=32, batch=2"]


def test_a_run_may_set_anew_what_is_given():
    (run,) = plan_runs(RECIPE, [{"train.steps": 9}], {"train.steps": "7"})
    assert run.checked.train.steps == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.stepps": 5}, r"stepps=5: train.stepps: unknown key, did you mean 'steps'\?"),
        ({"train.steps": "many"}, "steps=many: train.steps: expected an integer, got 'many'"),
        ({"model.schedule": "ful", "train.seed": 1}, "schedule=ful, seed=1: .*did you mean 'full'"),
        ({"train.batch": 3, "train.accumulate": 2}, "batch = 3 is not divisible"),
    ],
)
def test_what_a_config_refuses_names_the_run(overrides, message):
    with pytest.raises(SweepError, match=message):
        plan_runs(RECIPE, [{}, overrides])


def test_finished(tmp_path):
    (run,) = plan_runs(RECIPE, [{}])
    assert not run.finished(tmp_path)
    run.workdir(tmp_path).mkdir(parents=True)
    (run.workdir(tmp_path) / RESULT).write_text("{}")
    assert run.finished(tmp_path)


def test_steps_are_limited():
    runs = plan_runs(RECIPE, [{"train.steps": 5}, {"train.steps": 6, "label": "long"}])
    limit_steps(runs, 6)
    limit_steps(runs, None)
    with pytest.raises(SweepError, match=r"long: train\.steps is 6, more than --max-steps=5"):
        limit_steps(runs, 5)


def test_sweeps_of_a_file(tmp_path):
    place = tmp_path / "sweep.py"
    place.write_text(
        "from sparsejax.sweep import grid\n"
        "def sweep():\n    yield from grid({'a': [1, 2]})\n"
        "def other():\n    return [{'b': 1}]\n"
        "def empty():\n    return []\n"
        "def words():\n    return ['a']\n"
        "def broken():\n    return [{}['a']]\n"
    )
    assert read_sweep(str(place)) == [{"a": 1}, {"a": 2}]
    assert read_sweep(f"{place}:other") == [{"b": 1}]
    for name, message in {
        "nothing": r"has no function nothing\(\)",
        "empty": r"empty\(\) must give dicts of overrides",
        "words": r"words\(\) must give dicts of overrides",
        "broken": "KeyError: 'a'",
    }.items():
        with pytest.raises(SweepError, match=message):
            read_sweep(f"{place}:{name}")
    with pytest.raises(SweepError, match="no file"):
        read_sweep(str(tmp_path / "none.py"))
    assert read_sweep("a=[1, 2]") == [{"a": 1}, {"a": 2}]
