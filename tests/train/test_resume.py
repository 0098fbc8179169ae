"""A run that was killed, stopped or interrupted ends as if nothing had happened: bit for bit."""

import signal

import pytest

from sparsejax.cli import INTERRUPTED
from sparsejax.train import list_steps, read_arrays, read_rows
from tests.train import runs

STEPS = 60


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    files = runs.write_text(tmp_path_factory.mktemp("data") / "text")
    return ["train", f"--config={runs.RECIPE}", f"--config.train.steps={STEPS}", f"--config.data.files={files}"]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = runs.finish(runs.start(*arguments, f"--workdir={workdir}"))
    assert (code, err) == (0, "")
    return workdir


def saved_steps(workdir):
    return list_steps(workdir / "checkpoints")


def saved_state(workdir, step):
    return read_arrays(workdir / "checkpoints", step)


def assert_ends_the_same(workdir, uninterrupted):
    assert saved_steps(workdir) == saved_steps(uninterrupted)
    for step in saved_steps(uninterrupted):
        runs.assert_same_bits(saved_state(workdir, step), saved_state(uninterrupted, step))
        iterator = f"checkpoints/{step}/data/metadata"
        assert (workdir / iterator).read_bytes() == (uninterrupted / iterator).read_bytes()
    for name in ("metrics.jsonl", "metrics.csv", "config.json", "schedule.txt"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_an_uninterrupted_run_logs_every_step_once(uninterrupted):
    rows = read_rows(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] / 2
    assert saved_state(uninterrupted, STEPS)["step"] == STEPS


def test_killed(arguments, uninterrupted, tmp_path):
    process = runs.start(*arguments, f"--workdir={tmp_path}")
    while not (tmp_path / "checkpoints" / "25").is_dir():
        runs.wait_for_row(process, tmp_path, 25)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    latest = saved_steps(tmp_path)[-1]
    assert 25 <= latest < read_rows(tmp_path / "metrics.jsonl")[-1]["step"] < STEPS

    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path}"))
    assert (code, err) == (0, "")
    assert f"resuming {tmp_path} at step {latest}\n" in out
    assert_ends_the_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(arguments, uninterrupted, tmp_path, number):
    process = runs.start(*arguments, f"--workdir={tmp_path}")
    runs.wait_for_row(process, tmp_path, 26)
    process.send_signal(number)
    code, _, err = runs.finish(process)
    step = saved_steps(tmp_path)[-1]
    assert code == INTERRUPTED == 75
    assert err == f"sparsejax: stopped by {number.name} at step {step}; the same command goes on from there\n"
    assert 26 < step < STEPS

    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path}"))
    assert (code, err) == (0, "")
    assert f"resuming {tmp_path} at step {step}\n" in out
    assert_ends_the_same(tmp_path, uninterrupted)


def test_the_same_command_after_the_end_changes_nothing(arguments, uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={uninterrupted}"))
    assert (code, err) == (0, "")
    last = read_rows(uninterrupted / "metrics.jsonl")[-1]["eval/bits_per_byte"]
    assert f"validation: {last:.4f} bits/byte" in out
    for path, content in before.items():
        assert path.name == "versions.json" or path.read_bytes() == content, path


def test_a_start_that_is_interrupted_early_leaves_no_traceback(arguments, tmp_path):
    process = runs.start(*arguments, f"--workdir={tmp_path / 'run'}")
    while not (tmp_path / "run" / "config.json").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = runs.finish(process)
    assert code == INTERRUPTED
    assert len(err.splitlines()) == 1
