"""Launchers and runs that are killed, stopped and fail, as real processes."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from sparsejax.cli import INTERRUPTED, RUNS_FAILED, main
from sparsejax.sweep import RunsFailed, SweepError, engines, launch, plan_runs, read_sweep
from sparsejax.sweep.board import Board, read_progress
from sparsejax.sweep.engines import Local, build_job
from sparsejax.train import Interrupted, list_steps, read_arrays
from tests.sweep.commands import Command, wait_for
from tests.train import runs

pytest.importorskip("submitit", reason="needs the extra launch")

STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("data") / "text")


def command(folder, axes, text, *arguments):
    overrides = {"train.steps": STEPS, "data.files": text, "model.schedule": "full", "checkpoint.every": 10}
    given = [f"--config.{key}={value}" for key, value in overrides.items() if f"{key}=" not in axes]
    places = [f"--config={runs.RECIPE}", f"--sweep={axes}", f"--workdir={folder}"]
    return ["sweep", *places, *given, "--config.eval.every=10", *arguments]


def jobs_of(folder, axes, text):
    """The jobs of a sweep's runs, in order, as the command plans them."""
    overrides = {"train.steps": STEPS, "data.files": str(text), "model.schedule": "full", "checkpoint.every": 10}
    kept = {key: value for key, value in overrides.items() if f"{key}=" not in axes} | {"eval.every": 10}
    return [build_job(run, folder) for run in plan_runs(str(runs.RECIPE), read_sweep(axes), kept)]


def steps_of(job):
    return read_progress(job.result.parent).step


def starts_of(job):
    """How often a run has started to train."""
    return len(json.loads((job.result.parent / "versions.json").read_text()))


def test_killed_launcher(text, tmp_path):
    """Its run goes on; the same command waits for it, and does the rest."""
    axes = "seed=range(3)"
    jobs = jobs_of(tmp_path, axes, text)
    first = runs.start(*command(tmp_path, axes, text, "--jobs=1"))
    wait_for(lambda: steps_of(jobs[0]) > 0)
    first.kill()
    out = runs.finish(first)[1]
    assert out.count("python -m sparsejax train") == 1
    assert jobs[0].held()

    code, out, err = runs.finish(runs.start(*command(tmp_path, axes, text, "--jobs=1")))
    assert (code, err) == (0, "")
    assert out.count("python -m sparsejax train") == 2
    assert out.splitlines()[-1] == "3 of 3 runs done"
    assert [starts_of(job) for job in jobs] == [1, 1, 1]
    assert [steps_of(job) for job in jobs] == [STEPS] * 3


def test_killed_and_failing_runs(text, tmp_path):
    """Are reported with what they printed last, and run again on request only."""
    axes = f"data.files=['{tmp_path}/nowhere','{text}']"
    _, job = jobs_of(tmp_path, axes, text)
    launcher = runs.start(*command(tmp_path, axes, text, "--jobs=1"))
    wait_for(lambda: (job.result.parent / "checkpoints" / "10").is_dir())
    os.kill(job.process(), signal.SIGKILL)
    code, out, err = runs.finish(launcher)
    assert code == RUNS_FAILED
    assert err == "sparsejax: 0 of 2 runs done, 2 failed; the same command with --retry runs again what failed\n"
    assert "exit code 2; log: " in out
    assert f"    sparsejax: data.files: no such file or folder: {tmp_path}/nowhere" in out
    assert "killed by signal 9, SIGKILL; log: " in out

    before = steps_of(job)
    assert main(command(tmp_path, axes, text)) == RUNS_FAILED
    assert steps_of(job) == before
    assert job.exit_code() == -signal.SIGKILL

    code, out, _ = runs.finish(runs.start(*command(tmp_path, axes, text, "--retry")))
    assert code == RUNS_FAILED  # the other one fails again
    assert "1 of 2 runs done" not in out
    assert f"resuming {job.result.parent} at step " in job.log.read_text()
    assert steps_of(job) == STEPS


def test_asked_to_stop(text, tmp_path):
    """The runs that run save first; the others wait for the same command."""
    axes = "seed=range(3);train.steps=[100000]"
    jobs = jobs_of(tmp_path, axes, text)
    launcher = runs.start(*command(tmp_path, axes, text, "--jobs=2"))
    wait_for(lambda: min(map(steps_of, jobs[:2])) > 0)
    launcher.send_signal(signal.SIGINT)
    code, out, err = runs.finish(launcher)
    assert code == INTERRUPTED
    assert err == "sparsejax: stopped by SIGINT: 0 of 3 runs done, 3 left; the same command goes on\n"
    assert "SIGINT: 2 runs asked to save and stop" in out
    assert [job.exit_code() for job in jobs] == [INTERRUPTED, INTERRUPTED, None]
    assert not any(job.held() for job in jobs)
    for job in jobs[:2]:
        assert list_steps(job.result.parent / "checkpoints")[-1] == steps_of(job)


# What follows launches commands that are no training, to be quick.


def launch_here(commands, folder, jobs=2, **options):
    console = Console(file=io.StringIO(), width=200)
    error = None
    try:
        launch(commands, folder, Local(folder, jobs), Board(console, folder, jobs), **options)
    except (RunsFailed, Interrupted) as raised:
        error = raised
    return console.file.getvalue(), error


def test_runs_have_shares_of_the_cores_and_no_more_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_devices", lambda: ("3", "5"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    # The first two wait for each other, however long a launch takes.
    others = f"while [ $(ls {tmp_path}/begun | wc -l) -lt 2 ]; do sleep 0.02; done; sleep 0.3"
    begin = f"mkdir -p {tmp_path}/begun; echo $(date +%s%N) $CUDA_VISIBLE_DEVICES $JAX_COMPILATION_CACHE_DIR"
    commands = [
        Command(f"run{i}", f"{begin}; touch {tmp_path}/begun/{i}; {others}; date +%s%N; DONE") for i in range(4)
    ]
    out, error = launch_here(commands, tmp_path)
    assert error is None
    assert out.splitlines()[-1] == "4 of 4 runs done"
    lines = [build_job(one, tmp_path).last_lines(2) for one in commands]
    assert {line[0].split()[1] for line in lines} == {"3", "5"}
    assert {line[0].split()[2] for line in lines} == {str(tmp_path / "compiled")}
    spans = [(int(line[0].split()[0]), int(line[1])) for line in lines]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) == 2


def test_a_job_that_is_lost_is_a_failure_and_runs_again(tmp_path):
    """The process that waits for a run is killed with it: nobody knows how it has ended."""
    lost = Command("lost", "if [ -e runs/again ]; then DONE; fi; mkdir -p runs/again; kill -9 $PPID")
    once = dataclasses.replace(lost, script=lost.script.replace("runs/again", str(tmp_path / "again")))
    out, error = launch_here([once], tmp_path)
    assert isinstance(error, RunsFailed)
    assert "its job ended without an exit code" in out
    _, error = launch_here([once], tmp_path)
    assert error is None


def test_a_run_that_leaves_no_result_has_failed(tmp_path):
    out, error = launch_here([Command("empty", "echo nothing")], tmp_path)
    assert isinstance(error, RunsFailed)
    assert "exit code 0, but no result" in out
    assert "    nothing\n" in out


def test_a_run_that_others_stop_is_left_for_the_next_time(tmp_path):
    out, error = launch_here([Command("stopped", "exit 75"), Command("done", "DONE")], tmp_path)
    assert str(error) == "stopped by others: 1 of 2 runs done, 1 left; the same command goes on"
    assert "stopped" in out


def test_hours_are_limited(tmp_path):
    script = "[ -e ran ] && DONE && exit; touch ran; trap 'exit 75' TERM; while :; do sleep 0.02; done"
    commands = [Command(f"run{i}", script.replace("ran", f"{tmp_path}/ran{i}")) for i in range(2)]
    out, error = launch_here(commands, tmp_path, jobs=1, hours=1 / 3600)
    assert str(error) == "stopped by --max-hours: 0 of 2 runs done, 2 left; the same command goes on"
    assert "--max-hours: 1 run asked to save and stop" in out
    assert not (tmp_path / "ran1").exists()
    for i in range(2):
        (tmp_path / f"ran{i}").touch()
    out, error = launch_here(commands, tmp_path, jobs=1)
    assert error is None


def test_the_second_signal_leaves_at_once(tmp_path, monkeypatch):
    run = Command("stubborn", f"trap '' TERM; echo deaf; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; DONE")
    job = build_job(run, tmp_path)

    def interrupt():
        wait_for(lambda: job.last_lines(1) == ["deaf"])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt)
    thread.start()
    _, error = launch_here([run], tmp_path)
    thread.join()
    assert isinstance(error, Interrupted)
    assert "left at once" in str(error)
    assert job.held()
    find = Local.find

    def find_and_let_go(engine, attempt):
        found = find(engine, attempt)
        (tmp_path / "go").touch()
        return found

    monkeypatch.setattr(Local, "find", find_and_let_go)
    out, error = launch_here([run], tmp_path)
    assert error is None
    assert "found again, launched before" in out
    assert job.exit_code() == 0


def test_one_launcher_at_a_time(text, tmp_path, capsys):
    from sparsejax.job import hold

    with hold(tmp_path / "jobs" / "launcher.lock"):
        assert main(command(tmp_path, "seed=[0]", text)) == 2
    assert capsys.readouterr().err == f"sparsejax: --workdir: another launcher is at work on {tmp_path}\n"


def test_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SweepError, match=r"needs submitit; pip install 'sparsejax\[launch\]'"):
        Local(tmp_path)


def test_a_share_of_the_cores_changes_no_bit(tmp_path, text, monkeypatch):
    """Sums are cut up by the number of threads, if they are as wide as those of the quickstart."""
    cores = engines.find_cores()
    if len(cores) < 2:
        pytest.skip("one core has no shares")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", runs.COMPILED.name)
    given = {"train.steps": 2, "data.files": str(text), "data.length": 128, "eval.sample": 0, "checkpoint.keep_best": 0}
    given |= {"train.log_every": 1, "model.schedule": "ssm", "eval.every": 2, "eval.batch": 4}
    (run,) = plan_runs(str(Path(__file__).parents[2] / "configs" / "quickstart.py"), [{}], given)
    subprocess.run(run.command(tmp_path / "alone"), check=True, capture_output=True)
    out, error = launch_here([run], tmp_path / "shared", jobs=len(cores))
    assert error is None, out
    states = [read_arrays(run.workdir(tmp_path / name) / "checkpoints", 2) for name in ("alone", "shared")]
    runs.assert_same_bits(*states)
