"""Launchers and runs that are killed, asked to stop or fail, as real processes."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from sparsejax.cli import RUNS_FAILED, main
from sparsejax.runs import list_steps, read_arrays
from sparsejax.signals import INTERRUPTED, Interrupted
from sparsejax.sweep import RunsFailed, SweepError, executors, launch, plan_runs, read_sweep
from sparsejax.sweep.executors import Attempt, Local, build_job
from sparsejax.sweep.progress import Progress, read_progress
from sparsejax.workdir import SweepFolder, Workdir, read_json, read_tail
from tests.messages import check_message, rejects
from tests.sweep.commands import Command, wait_for
from tests.train import runs

pytest.importorskip("submitit", reason="needs the extra launch")

STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("data") / "text")


def command(folder, axes, text, *arguments):
    overrides = {"train.steps": STEPS, "data.files": text, "model.schedule": "full", "checkpoint.every": 10}
    settings = [f"--config.{key}={value}" for key, value in overrides.items() if f"{key}=" not in axes]
    options = [f"--config={runs.RECIPE}", f"--sweep={axes}", f"--workdir={folder}"]
    return ["sweep", *options, *settings, "--config.eval.every=10", *arguments]


def plan(folder, axes, text):
    """The runs of a sweep, in order, as the command plans them, and their jobs."""
    overrides = {"train.steps": STEPS, "data.files": str(text), "model.schedule": "full", "checkpoint.every": 10}
    kept = {key: value for key, value in overrides.items() if f"{key}=" not in axes} | {"eval.every": 10}
    planned = plan_runs(str(runs.RECIPE), read_sweep(axes), kept)
    return planned, [build_job(run, folder) for run in planned]


def workdir_of(job):
    return Workdir(job.result.parent)


def steps_of(job):
    return read_progress(workdir_of(job)).step


def held(job):
    return job.files.held()


def log_of(job):
    return read_tail(job.files.log)


def exit_code_of(run, folder):
    return Local(folder).exit_code(Attempt(run, build_job(run, folder)))


def event_of(out, words):
    """What the line with these words says of a run, without name, time and log."""
    line = next(line for line in out.splitlines() if words in line)
    return re.sub(r"\d+ s", "N s", line.partition(": ")[2].partition("; log")[0])


def starts_of(job):
    """Number of times that a run has started to train."""
    return len(read_json(workdir_of(job).versions))


def test_killed_launcher(text, tmp_path):
    """Its run continues; the same command waits for it and launches the others."""
    axes = "seed=range(3)"
    _, jobs = plan(tmp_path, axes, text)
    first = runs.start(*command(tmp_path, axes, text, "--jobs=1"))
    wait_for(lambda: steps_of(jobs[0]) > 0)
    first.kill()
    out = runs.finish(first)[1]
    assert out.count("sparsejax train") == 1
    assert held(jobs[0])

    code, out, err = runs.finish(runs.start(*command(tmp_path, axes, text, "--jobs=1")))
    assert (code, err) == (0, "")
    assert out.count("sparsejax train") == 2
    assert out.splitlines()[-1] == "3 of 3 runs done"
    assert [starts_of(job) for job in jobs] == [1, 1, 1]
    assert [steps_of(job) for job in jobs] == [STEPS] * 3


def test_killed_and_failing_runs(text, tmp_path):
    """Are reported with what they printed last, and run again on request only."""
    axes = f"data.files=['{tmp_path}/nowhere','{text}']"
    (_, run), (_, job) = plan(tmp_path, axes, text)
    launcher = runs.start(*command(tmp_path, axes, text, "--jobs=1"))
    wait_for(lambda: (workdir_of(job).checkpoints / "10").is_dir())
    os.kill(job.files.process()[0], signal.SIGKILL)
    code, out, err = runs.finish(launcher)
    assert code == RUNS_FAILED
    check_message(err.strip())
    assert any(line.startswith("    sparsejax: data.files: ") for line in out.splitlines())
    check_message(event_of(out, "exit code 2"))
    assert "signal 9, SIGKILL" in out

    before = steps_of(job)
    assert main(command(tmp_path, axes, text)) == RUNS_FAILED
    assert steps_of(job) == before
    assert exit_code_of(run, tmp_path) == -signal.SIGKILL

    code, out, _ = runs.finish(runs.start(*command(tmp_path, axes, text, "--retry")))
    assert code == RUNS_FAILED  # the other one fails again
    assert "1 of 2 runs done" not in out
    assert f"resuming {job.result.parent} at step " in job.files.log.read_text()
    assert steps_of(job) == STEPS


def test_asked_to_stop(text, tmp_path):
    """The running runs save first; the others wait for the same command."""
    axes = "seed=range(3);train.steps=[100000]"
    planned, jobs = plan(tmp_path, axes, text)
    launcher = runs.start(*command(tmp_path, axes, text, "--jobs=2"))
    wait_for(lambda: min(map(steps_of, jobs[:2])) > 0)
    launcher.send_signal(signal.SIGINT)
    code, out, err = runs.finish(launcher)
    assert code == INTERRUPTED
    check_message(err.strip())
    check_message(next(line for line in out.splitlines() if line.startswith("SIGINT")))
    assert [exit_code_of(run, tmp_path) for run in planned] == [INTERRUPTED, INTERRUPTED, None]
    assert not any(held(job) for job in jobs)
    for job in jobs[:2]:
        saved, logged = list_steps(workdir_of(job).checkpoints)[-1], steps_of(job)
        assert saved - logged in (0, 1)  # the row of a step follows its checkpoint, if need be after the resume


# The tests below launch commands that train nothing, to be quick.


def launch_here(commands, folder, jobs=2, **options):
    console = Console(file=io.StringIO(), width=200)
    error = None
    try:
        launch(commands, folder, Local(folder, jobs), Progress(console, folder, jobs), **options)
    except (RunsFailed, Interrupted) as raised:
        error = raised
    return console.file.getvalue(), error


def test_runs_have_shares_of_the_cores_and_no_more_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "find_devices", lambda: ("3", "5"))
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
    lines = [log_of(build_job(run, tmp_path)) for run in commands]
    assert {line[0].split()[1] for line in lines} == {"3", "5"}
    assert {line[0].split()[2] for line in lines} == {str(tmp_path / "compiled")}
    spans = [(int(line[0].split()[0]), int(line[1])) for line in lines]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) == 2


def test_a_job_that_is_lost_is_a_failure_and_runs_again(tmp_path):
    """The process that waits for a run is killed with it, and nobody knows the exit code."""
    lost = Command("lost", "if [ -e runs/again ]; then DONE; fi; mkdir -p runs/again; kill -9 $PPID")
    run = dataclasses.replace(lost, script=lost.script.replace("runs/again", str(tmp_path / "again")))
    out, error = launch_here([run], tmp_path)
    assert isinstance(error, RunsFailed)
    check_message(event_of(out, "lost lost"))
    _, error = launch_here([run], tmp_path)
    assert error is None


def test_a_run_that_leaves_no_result_has_failed(tmp_path):
    out, error = launch_here([Command("empty", "echo nothing")], tmp_path)
    assert isinstance(error, RunsFailed)
    assert "exit code 0, but no result" in out
    assert "    nothing\n" in out


def test_a_run_that_others_stop_is_left_for_the_next_time(tmp_path):
    _, error = launch_here([Command("stopped", "exit 75"), Command("done", "DONE")], tmp_path)
    check_message(str(error))


def test_the_time_limit(tmp_path):
    script = "[ -e ran ] && DONE && exit; touch ran; trap 'exit 75' TERM; while :; do sleep 0.02; done"
    commands = [Command(f"run{i}", script.replace("ran", f"{tmp_path}/ran{i}")) for i in range(2)]
    out, error = launch_here(commands, tmp_path, jobs=1, max_hours=1 / 3600)
    check_message(str(error))
    check_message(next(line for line in out.splitlines() if line.startswith("the time limit")))
    assert not (tmp_path / "ran1").exists()
    for i in range(2):
        (tmp_path / f"ran{i}").touch()
    out, error = launch_here(commands, tmp_path, jobs=1)
    assert error is None


def test_the_second_signal_leaves_at_once(tmp_path, monkeypatch):
    run = Command("stubborn", f"trap '' TERM; echo deaf; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; DONE")
    job = build_job(run, tmp_path)

    def interrupt():
        wait_for(lambda: log_of(job) == ["deaf"])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt)
    thread.start()
    _, error = launch_here([run], tmp_path)
    thread.join()
    assert isinstance(error, Interrupted)
    check_message(str(error))
    assert held(job)
    find = Local.find

    def find_and_let_go(executor, attempt):
        live = find(executor, attempt)
        (tmp_path / "go").touch()
        return live

    monkeypatch.setattr(Local, "find", find_and_let_go)
    out, error = launch_here([run], tmp_path)
    assert error is None
    assert "found, launched before" in out
    assert exit_code_of(run, tmp_path) == 0


def test_one_launcher_at_a_time(text, tmp_path, capsys):
    with SweepFolder(tmp_path).hold():
        assert main(command(tmp_path, "seed=[0]", text)) == 2
    check_message(capsys.readouterr().err.strip())


def test_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with rejects(SweepError, "launcher"):
        Local(tmp_path)


def test_a_share_of_the_cores_changes_no_bit(tmp_path, text, monkeypatch):
    """XLA splits sums by the number of threads, if they are as wide as those of the quickstart."""
    cores = executors.find_cores()
    if len(cores) < 2:
        pytest.skip("one core has no shares")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", runs.COMPILED.name)
    overrides = {
        "train.steps": 2,
        "data.files": str(text),
        "data.length": 128,
        "eval.sample": 0,
        "checkpoint.keep_best": 0,
    }
    overrides |= {"train.log_every": 1, "train.check": False, "model.schedule": "ssm", "eval.every": 2, "eval.batch": 4}
    (run,) = plan_runs("preset:quickstart", [{}], overrides)
    subprocess.run(run.command(tmp_path / "alone"), check=True, capture_output=True)
    out, error = launch_here([run], tmp_path / "shared", jobs=len(cores))
    assert error is None, out
    states = [read_arrays(run.workdir(tmp_path / name).checkpoints, 2) for name in ("alone", "shared")]
    runs.assert_same_bits(*states)
