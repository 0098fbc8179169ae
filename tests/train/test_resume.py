"""A run that is killed, stopped or interrupted ends as if nothing had happened: bit for bit."""

import shutil
import signal

import pytest

from sparsejax.runs import list_steps, read_arrays, read_iterator
from sparsejax.signals import INTERRUPTED
from sparsejax.workdir import Workdir, read_rows
from tests.messages import check_message
from tests.train import runs

STEPS = 60


@pytest.fixture(scope="module")
def arguments(text):
    return ["train", f"--config={runs.RECIPE}", f"--config.train.steps={STEPS}", f"--config.data.files={text}"]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("uninterrupted"))
    code, _, err = runs.finish(runs.start(*arguments, f"--workdir={workdir.path}"))
    assert (code, err) == (0, "")
    return workdir


def assert_ends_the_same(workdir, uninterrupted):
    assert list_steps(workdir.checkpoints) == list_steps(uninterrupted.checkpoints)
    for step in list_steps(uninterrupted.checkpoints):
        arrays, expected = (read_arrays(folder.checkpoints, step) for folder in (workdir, uninterrupted))
        runs.assert_same_bits(arrays, expected)
        assert read_iterator(workdir.checkpoints, step) == read_iterator(uninterrupted.checkpoints, step)
    for name in ("metrics", "metrics_table", "config", "schedule"):
        assert getattr(workdir, name).read_bytes() == getattr(uninterrupted, name).read_bytes(), name


def test_an_uninterrupted_run_logs_every_step_once(uninterrupted):
    rows = read_rows(uninterrupted.metrics)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] / 2
    assert read_arrays(uninterrupted.checkpoints, STEPS)["step"] == STEPS


def test_killed(arguments, uninterrupted, tmp_path):
    workdir = Workdir(tmp_path)
    process = runs.start(*arguments, f"--workdir={tmp_path}")
    while not (workdir.checkpoints / "25").is_dir():
        runs.wait_for_row(process, tmp_path, 25)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    latest = list_steps(workdir.checkpoints)[-1]
    assert 25 <= latest < read_rows(workdir.metrics)[-1]["step"] < STEPS

    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path}"))
    assert (code, err) == (0, "")
    assert f"resuming {tmp_path} at step {latest}\n" in out
    assert_ends_the_same(workdir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(arguments, uninterrupted, tmp_path, number):
    workdir = Workdir(tmp_path)
    process = runs.start(*arguments, f"--workdir={tmp_path}")
    runs.wait_for_row(process, tmp_path, 26)
    process.send_signal(number)
    code, _, err = runs.finish(process)
    step = list_steps(workdir.checkpoints)[-1]
    assert code == INTERRUPTED == 75
    check_message(err.strip().replace(f"step {step}", "step N"))
    assert 26 < step < STEPS

    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path}"))
    assert (code, err) == (0, "")
    assert f"resuming {tmp_path} at step {step}\n" in out
    assert_ends_the_same(workdir, uninterrupted)


def test_a_run_that_has_ended_changes_nothing(trained, text, tmp_path):
    workdir = Workdir(shutil.copytree(trained[0], tmp_path / "run"))
    before = {path: path.read_bytes() for path in workdir.path.rglob("*") if path.is_file()}
    printed = runs.train_here(runs.load(text, runs.TRAINED), workdir.path)
    last = read_rows(workdir.metrics)[-1]["eval/bits_per_byte"]
    assert f"validation: {last:.4f} bits/byte" in printed
    for path, content in before.items():
        assert path == workdir.versions or path.read_bytes() == content, path


def test_a_start_that_is_interrupted_early_prints_no_traceback(arguments, tmp_path):
    workdir = Workdir(tmp_path / "run")
    process = runs.start(*arguments, f"--workdir={workdir.path}")
    while not workdir.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = runs.finish(process)
    assert code == INTERRUPTED
    assert len(err.splitlines()) == 1
