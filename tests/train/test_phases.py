"""Phases: each has its own settings, data and functions; what carries over is the state."""

import json
import signal

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.cli import INTERRUPTED, USAGE_ERROR, main
from sparsejax.train import list_steps, plan_phases, read_arrays, read_rows
from sparsejax.train.optimizer import build_schedule
from tests.train import recipe, runs

PATTERN = "model.layers.local.mixer.pattern"
PHASES = {
    "short": {"start": 0, "set": ["data.length=16", f"{PATTERN}=causal & window(3)"]},
    "long": {"start": 8, "set": ["train.batch=2", "optimizer.learning_rate=5e-3", "optimizer.warmup=3"]},
}


def complete(config):
    return ConfigDict(configs.complete(config.to_dict()))


def settings(**phases):
    config = recipe.get_config()
    config.train.phases = phases or PHASES
    return complete(config)


def refused(**phases):
    with pytest.raises(configs.ConfigError) as error:
        plan_phases(settings(**phases))
    return str(error.value)


def test_a_run_without_phases_is_one():
    (phase,) = plan_phases(complete(recipe.get_config()))
    assert (phase.name, phase.start, phase.stop, phase.seed) == (None, 0, 20, 0)


def test_a_phase_is_the_run_with_what_it_sets():
    short, long = plan_phases(settings())
    assert (short.start, short.stop, long.start, long.stop) == (0, 8, 8, 20)
    assert (short.config.data.length, long.config.data.length) == (16, 32)
    assert (short.config.train.batch, long.config.train.batch) == (4, 2)
    local = short.config.model.layers["local"].mixer.pattern, long.config.model.layers["local"].mixer.pattern
    assert local == ("causal & window(3)", "causal & (window(5) | sink(2))")
    assert short.seed != long.seed


def test_the_rate_is_the_schedule_of_the_run_at_the_peak_of_the_phase():
    short, long = plan_phases(settings())
    whole = build_schedule(short.config.optimizer, 20)
    second = build_schedule(long.config.optimizer, 20, long.restart)
    assert float(second(8)) == 0
    assert float(second(9)) == pytest.approx(float(whole(9)) / 2 / 3, rel=1e-6)
    assert float(second(15)) == pytest.approx(float(whole(15)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["data.lenght=8"], "train.phases.a.set: data.lenght: unknown key, did you mean 'length'?"),
        (["train.seed=1"], "train.phases.a.set: train.seed: a phase can only set data.length"),
        (["data.length"], "train.phases.a.set: write KEY=VALUE, got 'data.length'"),
        (["model.width=8"], "train.phases.b.set: changes the model's parameters"),
        ([f"{PATTERN}=windou(3)"], "train.phases.a.set: model.layers.local.mixer"),
        (["train.batch=0"], "train.phases.a.set: train: batch must be at least 1"),
    ],
)
def test_what_a_phase_cannot_set_is_refused_before_anything_is_written(given, expected):
    name = "b" if ".b." in expected else "a"
    assert expected in refused(**{name: {"start": 10, "set": given}})


def test_the_phase_that_changes_the_parameters_is_named_also_if_it_is_the_first():
    found = refused(a={"start": 0, "set": ["model.width=8"]}, b={"start": 10, "set": []})
    assert found.startswith("train.phases.a.set: changes the model's parameters: ")


@pytest.mark.parametrize(
    ("starts", "expected"),
    [((3, 3), "two of them start at the same step"), ((5, 20), "phases.b.start: is 20, the run has 20 steps")],
)
def test_where_phases_start(starts, expected):
    assert expected in refused(a={"start": starts[0], "set": []}, b={"start": starts[1], "set": []})


def test_the_name_of_what_comes_before_all_phases_is_taken():
    assert "phases.base: is what comes before all phases" in refused(base={"start": 5})


def test_what_comes_before_all_phases_is_the_run_as_it_is():
    base, later, last = plan_phases(settings(z={"start": 5, "set": ["data.length=8"]}, a={"start": 9}))
    assert [(one.name, one.start, one.stop) for one in (base, later, last)] == [
        ("base", 0, 5),
        ("z", 5, 9),
        ("a", 9, 20),
    ]
    assert [one.config.data.length for one in (base, later, last)] == [32, 8, 32]


def test_a_typo_on_the_command_line_leaves_no_workdir(tmp_path, capsys):
    place = tmp_path / "config.py"
    place.write_text(
        "from tests.train import recipe\n\n\ndef get_config():\n    config = recipe.get_config()\n"
        f"    config.train.phases = {PHASES!r}\n    return config\n"
    )
    changed = "--config.train.phases.long.set=('data.lengt=8',)"
    assert main(["train", f"--config={place}", f"--workdir={tmp_path / 'run'}", changed]) == USAGE_ERROR
    assert "train.phases.long.set: data.lengt: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    files = runs.write_text(folder / "text")
    place = folder / "config.py"
    place.write_text(
        "from tests.train import recipe\n\n\ndef get_config():\n    config = recipe.get_config()\n"
        f"    config.train.phases = {PHASES!r}\n    config.model.dropout = 0.1\n    return config\n"
    )
    return ["train", f"--config={place}", f"--config.data.files={files}"]


def test_a_run_that_stops_in_a_later_phase_ends_as_if_nothing_had_happened(arguments, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={whole}"))
    assert (code, err) == (0, "")
    assert "phase long: steps 9 to 20: train.batch=2" in out
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["phase"] for row in rows] == [1] * 8 + [2] * 12
    assert "eval/loss" in rows[7]  # the end of a phase is evaluated, and kept
    assert json.loads((whole / "data.json").read_text())["phases"].keys() == PHASES.keys()

    process = runs.start(*arguments, f"--workdir={torn}")
    runs.wait_for_row(process, torn, 11)
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process)[0] in (0, INTERRUPTED)
    code, _, err = runs.finish(runs.start(*arguments, f"--workdir={torn}"))
    assert (code, err) == (0, "")
    assert list_steps(torn / "checkpoints")[-1] == 20
    found, expected = (read_arrays(place / "checkpoints", 20) for place in (torn, whole))
    runs.assert_same_bits(found, expected)
    for name in ("metrics.jsonl", "result.json", "data.json"):
        assert (torn / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_that_is_killed_at_the_end_of_a_phase_begins_the_next_one(arguments, tmp_path):
    """The last checkpoint is that of the end of the first phase: the second starts from its first batch."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    every = "--config.checkpoint.every=20", "--config.eval.every=20"
    for workdir in (whole, torn):
        process = runs.start(*arguments, *every, f"--workdir={workdir}")
        if workdir is torn:
            runs.wait_for_row(process, torn, 9)
            process.kill()
        runs.finish(process)
    assert list_steps(torn / "checkpoints") == [8]
    code, out, _ = runs.finish(runs.start(*arguments, *every, f"--workdir={torn}"))
    assert code == 0
    assert "at step 8" in out
    assert (torn / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.05), ("constant", 0.5)])
def test_other_schedules(schedule, last):
    config = plan_phases(complete(recipe.get_config()))[0].config.optimizer
    values = {"learning_rate": 0.5, "final_rate": 0.1, "warmup": 4, "schedule": schedule}
    rate = build_schedule(type(config)(**{**vars(config), **values}), 104)
    assert [float(rate(step)) for step in (0, 2, 4, 104)] == pytest.approx([0, 0.25, 0.5, last], rel=1e-6)
    assert float(rate(54)) == pytest.approx((0.5 + last) / 2, rel=1e-6)
    assert jnp.isfinite(rate(1000))
