"""A job runs its command alone, returns the exit code, and saves before it is queued again."""

import dataclasses
import os
import pickle
import platform
import signal
import subprocess
import sys
import time

import pytest

from sparsejax.job import Job, was_asked
from sparsejax.workdir import JobFiles, Workdir, read_tail

# A run in miniature. When asked to stop, it exits with 75; else it ends with a result.
RUN = """
import signal, sys, time, pathlib
def stop(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(float(sys.argv[1]))
pathlib.Path(sys.argv[2]).touch()
"""

# Calls a job in its own process, as submitit does: USR2 asks for a checkpoint.
CALLER = """
import pickle, signal, sys
job = pickle.load(open(sys.argv[1], "rb"))
def checkpoint(*_):
    if job.checkpoint():
        print("again", flush=True)
        sys.exit(0)
signal.signal(signal.SIGUSR2, checkpoint)
print(job())
"""


def job_for(folder, seconds, **options):
    command = [sys.executable, "-c", RUN, str(seconds), str(folder / "result")]
    return Job(command, JobFiles(folder / "jobs" / "run", Workdir(folder)), folder / "result", **options)


def shell(folder, command, **options):
    return Job(["sh", "-c", command], JobFiles(folder / "run", Workdir(folder)), folder / "result", **options)


def call_elsewhere(job, folder):
    (folder / "job.pkl").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", CALLER, str(folder / "job.pkl")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def held(job):
    return job.files.held()


def process_of(job):
    return job.files.process()[0]


def log_of(job):
    return read_tail(job.files.log)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_runs_its_command_and_returns_the_exit_code(tmp_path):
    job = job_for(tmp_path, 0)
    assert (job.files.process(), held(job), log_of(job)) == (None, False, [])
    assert job() == 0
    assert (job.files.process(), held(job), log_of(job)) == (None, False, ["started"])


def test_a_finished_run_is_not_run_again(tmp_path):
    job_for(tmp_path, 0)()
    again = job_for(tmp_path, 0)
    assert again() == 0
    assert log_of(again) == ["started"]


@pytest.mark.parametrize(
    ("command", "code"), [("echo wrong >&2; exit 7", 7), ("kill -9 $$", -signal.SIGKILL)], ids=["exit", "kill"]
)
def test_failures(tmp_path, command, code):
    job = shell(tmp_path, command)
    assert job() == code
    assert log_of(job) == (["wrong"] if code == 7 else [])
    assert not was_asked(code)


def test_one_process_at_a_time(tmp_path):
    job = job_for(tmp_path, 30)
    first = call_elsewhere(job, tmp_path)
    wait_for(lambda: log_of(job) == ["started"] and job.files.process())
    assert job.files.process()[1] == platform.node()
    assert call_elsewhere(job, tmp_path).communicate()[0].splitlines()[-1] == "None"
    # The lock is held while the run itself is alive, even if no job waits for it any more.
    process = process_of(job)
    first.kill()
    first.wait()
    assert held(job)
    assert call_elsewhere(job, tmp_path).communicate()[0].splitlines()[-1] == "None"
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not held(job))
    assert job.files.process() is None
    assert log_of(job) == ["started"]
    first.stdout.close()


def test_a_checkpoint_waits_until_the_run_has_saved(tmp_path):
    job = job_for(tmp_path, 30)
    caller = call_elsewhere(job, tmp_path)
    wait_for(lambda: log_of(job) == ["started"])
    caller.send_signal(signal.SIGUSR2)
    assert caller.communicate()[0] == "again\n"
    assert log_of(job) == ["started", "saved"]
    assert not held(job)


def test_a_run_that_fails_when_it_is_asked_to_save_is_not_queued_again(tmp_path):
    job = shell(tmp_path, "trap 'exit 5' TERM; echo started; while :; do sleep 0.05; done")
    caller = call_elsewhere(job, tmp_path)
    wait_for(lambda: log_of(job) == ["started"])
    caller.send_signal(signal.SIGUSR2)
    assert caller.communicate()[0] == "5\n"


def test_an_exception_in_the_job_keeps_the_lock_until_the_run_has_ended(tmp_path):
    job = job_for(tmp_path, 1)
    caller = call_elsewhere(job, tmp_path)
    wait_for(lambda: log_of(job) == ["started"])
    caller.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert held(job)
    caller.communicate()
    assert job.result.exists()
    assert not held(job)


def test_cores_and_environment(tmp_path, monkeypatch):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setenv("TAKEN", "1")
    show = "import os; print(os.sched_getaffinity(0), os.environ.get('SET'), os.environ.get('TAKEN'))"
    job = Job([sys.executable, "-c", show], JobFiles(tmp_path / "run", Workdir(tmp_path)), tmp_path / "result", (core,))
    job = dataclasses.replace(job, environment={"SET": "2", "TAKEN": None})
    assert call_elsewhere(job, tmp_path).communicate()[0] == "0\n"
    assert log_of(job) == [f"{{{core}}} 2 None"]


def test_the_signals_of_a_cluster_leave_the_run_alone(tmp_path):
    job = shell(tmp_path, "kill -USR1 $$; kill -USR2 $$; echo alive")
    assert job() == 0
    assert log_of(job) == ["alive"]


def test_tails(tmp_path):
    file = tmp_path / "log"
    assert read_tail(file) == []
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    assert read_tail(file, 40) == ["line 996", "line 997", "line 998", "line 999"]
    assert len(read_tail(file)) == 1000


def test_imports_are_light():
    script = "import sys, sparsejax.job; print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
