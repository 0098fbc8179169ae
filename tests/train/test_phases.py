"""Phases have settings, data and compiled functions of their own; the state carries over."""

import json
import signal

import jax.numpy as jnp
import pytest

from sparsejax.config import ConfigError
from sparsejax.runs import list_steps, plan_phases, read_arrays
from sparsejax.runs.optimizer import build_schedule
from sparsejax.signals import Interrupted
from sparsejax.workdir import Workdir, read_rows
from tests.messages import rejects
from tests.train import runs

PATTERN = "model.layers.local.mixer.pattern"
PHASES = {
    "short": (0, {"data.length": 16, PATTERN: "causal & window(3)"}),
    "long": (8, {"train.batch": 2, "optimizer.learning_rate": 5e-3, "optimizer.warmup": 3}),
}


def settings(text="", **phases):
    return runs.load(text, overrides(phases))


def overrides(phases):
    """Overrides that add phases, each a start and its overrides."""
    overrides = {}
    for name, (start, changed) in phases.items():
        overrides[f"train.phases.{name}.start"] = start
        overrides |= {f"train.phases.{name}.set.{key}": value for key, value in changed.items()}
    return overrides


def test_a_run_without_phases_is_one_phase():
    (phase,) = plan_phases(settings())
    assert (phase.name, phase.start, phase.stop, phase.seed) == (None, 0, 20, 0)


def test_a_phase_is_the_run_with_its_overrides():
    short, long = plan_phases(settings(**PHASES))
    assert (short.start, short.stop, long.start, long.stop) == (0, 8, 8, 20)
    assert (short.config.data.length, long.config.data.length) == (16, 32)
    assert (short.config.train.batch, long.config.train.batch) == (4, 2)
    local = short.config.model.layers["local"].mixer.pattern, long.config.model.layers["local"].mixer.pattern
    assert local == ("causal & window(3)", "causal & (window(5) | sink(2))")
    assert short.seed != long.seed
    assert (short.overrides, long.overrides) == (PHASES["short"][1], PHASES["long"][1])


def test_the_rate_follows_the_run_with_the_peak_of_the_phase():
    short, long = plan_phases(settings(**PHASES))
    whole = build_schedule(short.config.optimizer, 20)
    second = build_schedule(long.config.optimizer, 20, long.restart)
    assert float(second(8)) == 0
    assert float(second(9)) == pytest.approx(float(whole(9)) / 2 / 3, rel=1e-6)
    assert float(second(15)) == pytest.approx(float(whole(15)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("phases", "key"),
    [
        pytest.param({"a": (10, {"train.seed": 1})}, "train.phases.a.set.train.seed", id="not allowed"),
        pytest.param({"b": (10, {"model.width": 8})}, "train.phases.b.set", id="parameters"),
        pytest.param({"a": (0, {"model.width": 8}), "b": (10, {})}, "train.phases.a.set", id="parameters first"),
        pytest.param({"a": (10, {PATTERN: "windou(3)"})}, "train.phases.a.set.model.layers.local", id="pattern"),
        pytest.param({"a": (10, {"train.batch": 0})}, "train.phases.a.set.train.batch", id="value"),
        pytest.param({"a": (3, {}), "b": (3, {})}, "train.phases", id="same start"),
        pytest.param({"a": (5, {}), "b": (20, {})}, "train.phases.b.start", id="late start"),
        pytest.param({"base": (5, {})}, "train.phases.base", id="name"),
    ],
)
def test_an_invalid_phase_is_named(phases, key):
    with rejects(ConfigError, key):
        plan_phases(settings(**phases))


def test_an_unknown_key_of_a_phase_is_named():
    with rejects(ConfigError, "train.phases.a.set.data.lenght"):
        settings(a=(10, {"data.lenght": 8}))


def test_steps_before_the_first_phase_have_the_base_configuration():
    phases = plan_phases(settings(z=(5, {"data.length": 8}), a=(9, {})))
    assert [(phase.name, phase.start, phase.stop) for phase in phases] == [("base", 0, 5), ("z", 5, 9), ("a", 9, 20)]
    assert [phase.config.data.length for phase in phases] == [32, 8, 32]


def test_a_run_that_is_stopped_in_a_later_phase_ends_the_same(text, tmp_path, monkeypatch):
    whole, stopped = Workdir(tmp_path / "whole"), Workdir(tmp_path / "stopped")
    config = runs.load(text, overrides(PHASES) | {"model.dropout": 0.1})
    printed = runs.train_here(config, whole.path)
    assert "phase long: steps 9 to 20: optimizer.learning_rate=0.005" in printed
    rows = read_rows(whole.metrics)
    assert [row["phase"] for row in rows] == [1] * 8 + [2] * 12
    assert "eval/loss" in rows[7]  # a phase ends with an evaluation and a checkpoint
    assert json.loads(whole.data.read_text())["phases"].keys() == PHASES.keys()

    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 11)
        with pytest.raises(Interrupted):
            runs.train_here(config, stopped.path)
    assert list_steps(stopped.checkpoints)[-1] == 12
    assert "at step 12\n" in runs.train_here(config, stopped.path)
    assert list_steps(stopped.checkpoints)[-1] == 20
    runs.assert_same_bits(read_arrays(stopped.checkpoints, 20), read_arrays(whole.checkpoints, 20))
    for name in ("metrics", "result", "data"):
        assert getattr(stopped, name).read_bytes() == getattr(whole, name).read_bytes()


def test_a_run_that_is_killed_at_the_end_of_a_phase_begins_the_next_phase(text, tmp_path):
    """The last checkpoint is that of the end of the first phase: the second starts from its first batch."""
    whole, killed = Workdir(tmp_path / "whole"), Workdir(tmp_path / "killed")
    phases = overrides(PHASES) | {"data.files": text, "model.dropout": 0.1, "checkpoint.every": 20, "eval.every": 20}
    arguments = "train", f"--config={runs.RECIPE}", *(f"--config.{key}={value}" for key, value in phases.items())
    processes = [runs.start(*arguments, f"--workdir={workdir.path}") for workdir in (whole, killed)]
    runs.wait_for_row(processes[1], killed.path, 9)
    processes[1].kill()
    assert [runs.finish(process)[0] for process in processes] == [0, -signal.SIGKILL]
    assert list_steps(killed.checkpoints) == [8]
    code, out, _ = runs.finish(runs.start(*arguments, f"--workdir={killed.path}"))
    assert code == 0
    assert "at step 8\n" in out
    assert killed.metrics.read_bytes() == whole.metrics.read_bytes()


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.05), ("constant", 0.5)])
def test_other_schedules(schedule, last):
    config = plan_phases(settings())[0].config.optimizer
    values = {"learning_rate": 0.5, "final_rate": 0.1, "warmup": 4, "schedule": schedule}
    rate = build_schedule(type(config)(**{**vars(config), **values}), 104)
    assert [float(rate(step)) for step in (0, 2, 4, 104)] == pytest.approx([0, 0.25, 0.5, last], rel=1e-6)
    assert float(rate(54)) == pytest.approx((0.5 + last) / 2, rel=1e-6)
    assert jnp.isfinite(rate(1000))
