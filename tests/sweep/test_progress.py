import io
import json

import pytest
from rich.console import Console

from sparsejax.sweep import plan_runs
from sparsejax.sweep import progress as progresses
from sparsejax.sweep.executors import Attempt, State, build_job
from sparsejax.sweep.progress import Progress, RunProgress, read_progress
from sparsejax.workdir import Workdir
from tests.train.runs import RECIPE

pytestmark = pytest.mark.quick


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """A run of 20 steps in each state; the running one has logged step 8."""
    monkeypatch.setattr(progresses, "LIVE_INTERVAL", 0.0)
    monkeypatch.setattr(progresses, "PLAIN_INTERVAL", 0.0)
    runs = plan_runs(str(RECIPE), [{"label": state, "train.seed": i} for i, state in enumerate(State)])
    attempts = [Attempt(run, build_job(run, tmp_path), state) for run, state in zip(runs, State, strict=True)]
    workdir = next(a for a in attempts if a.state is State.RUNNING).run.workdir(tmp_path)
    workdir.path.mkdir(parents=True)
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 9)]
    workdir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "tra')
    workdir.timing.write_text('{"step": 8, "steps_per_second": 2.0}\n')
    return attempts


def test_progress(attempts, tmp_path):
    running = next(a for a in attempts if a.state is State.RUNNING)
    assert read_progress(running.run.workdir(tmp_path)) == RunProgress(8, 0.125, 2.0)
    assert read_progress(Workdir(tmp_path / "none")) == RunProgress(0, None, None)


def test_lines(attempts, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    with Progress(console, tmp_path, jobs=2) as progress:
        progress.update(attempts)
    summary, running = console.file.getvalue().splitlines()
    # 12 steps of the running run, 20 each of the waiting and the queued one, at 2 steps per second, two at a time
    assert summary == "sweep: 1 waiting, 1 queued, 1 running, 1 done, 1 failed, 1 stopped of 6 | 0:00:00 | ETA 0:00:13"
    assert running == "    running seed 2 | step 8/20 | loss 0.1250 nats | ETA 0:00:06"


def test_the_pace_of_what_is_done_counts(attempts, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    done = next(a for a in attempts if a.state is State.DONE)
    with Progress(console, tmp_path, jobs=1) as progress:
        done.since, done.step = progresses.time.monotonic() - 30, 10  # 3 seconds a step
        progress.report(done, "done")
        progress.update(attempts)
    assert "| ETA 0:02:36" in console.file.getvalue()  # 52 steps


def test_nothing_is_known_yet(attempts, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    waiting = [a for a in attempts if a.state is State.WAITING]
    with Progress(console, tmp_path) as progress:
        progress.update(waiting)
    assert console.file.getvalue() == "sweep: 1 waiting, 0 done of 1 | 0:00:00 | ETA ?\n"


def test_terminal(attempts, tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress(console, tmp_path, jobs=2) as progress:
        progress.update(attempts)
        progress.report(attempts[0], "failed", ["why"])
    lines = console.file.getvalue().splitlines()
    assert "│ running seed 2 │ 8/20 │ 0.1250      │ 0:00:06 │" in lines
    assert any(line.endswith(f"{attempts[0].run.name} waiting seed 0: failed") for line in lines)
    assert any(line.endswith("    why") for line in lines)
