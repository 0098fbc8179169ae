"""A job runs one command at a time on a place, knows how it ended, and saves before it is queued again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sparsejax.job import Job, hold, read_tail, was_asked

# A run in miniature: asked to stop it says so and leaves with 75; else it runs on, or leaves a result.
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

# Calls a job in a process of its own, as submitit does: USR2 asks for a checkpoint.
CALLER = """
import pickle, signal, sys
job = pickle.load(open(sys.argv[1], "rb"))
def checkpoint(*_):
    print("again" if job.checkpoint() else "over", flush=True)
    sys.exit(0)
signal.signal(signal.SIGUSR2, checkpoint)
print(job())
"""


def job_for(folder, seconds, **options):
    result = folder / "result"
    return Job([sys.executable, "-c", RUN, str(seconds), str(result)], folder / "jobs" / "one", result, **options)


def call_elsewhere(job, folder):
    import pickle

    (folder / "job.pkl").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", CALLER, str(folder / "job.pkl")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_runs_its_command_and_knows_how_it_ended(tmp_path):
    job = job_for(tmp_path, 0)
    assert (job.exit_code(), job.process(), job.held(), job.last_lines(3)) == (None, None, False, [])
    assert job() == job.exit_code() == 0
    assert (job.held(), job.process(), job.last_lines(3)) == (False, None, ["started"])


def test_a_finished_run_is_not_run_again(tmp_path):
    job_for(tmp_path, 0)()
    again = job_for(tmp_path, 0)
    assert again() == 0
    assert again.last_lines(3) == ["started"]


@pytest.mark.parametrize("command", [["sh", "-c", "echo wrong >&2; exit 7"], ["sh", "-c", "kill -9 $$"]])
def test_failures(tmp_path, command):
    job = Job(command, tmp_path / "one", tmp_path / "result")
    code = job()
    assert code == job.exit_code() == (7 if "exit 7" in command[-1] else -signal.SIGKILL)
    assert job.last_lines(1) == (["wrong"] if code == 7 else [])
    assert not was_asked(code)


def test_one_process_at_a_time(tmp_path):
    job = job_for(tmp_path, 30)
    first = call_elsewhere(job, tmp_path)
    wait_for(lambda: job.last_lines(1) == ["started"])
    assert job.held()
    assert job.began()
    assert call_elsewhere(job, tmp_path).communicate()[0].splitlines()[-1] == "None"
    # The lock is held as long as the run itself is alive, even if nobody waits for it any more.
    first.kill()
    first.wait()
    assert job.held()
    os.kill(job.process(), signal.SIGKILL)
    wait_for(lambda: not job.held())
    assert job.exit_code() is None
    assert job.last_lines(9) == ["started"]
    first.stdout.close()


def test_a_checkpoint_waits_until_the_run_has_saved(tmp_path):
    job = job_for(tmp_path, 30)
    caller = call_elsewhere(job, tmp_path)
    wait_for(lambda: job.last_lines(1) == ["started"])
    caller.send_signal(signal.SIGUSR2)
    assert caller.communicate()[0] == "again\n"
    assert job.last_lines(9) == ["started", "saved"]
    assert (job.exit_code(), job.held()) == (None, False)


def test_a_run_that_fails_as_it_is_asked_to_save_is_not_queued_again(tmp_path):
    command = ["sh", "-c", "trap 'exit 5' TERM; echo started; while :; do sleep 0.05; done"]
    job = Job(command, tmp_path / "one", tmp_path / "result")
    caller = call_elsewhere(job, tmp_path)
    wait_for(lambda: job.last_lines(1) == ["started"])
    caller.send_signal(signal.SIGUSR2)
    assert caller.communicate()[0] == "over\n"
    assert job.exit_code() == 5


def test_cores_and_environment(tmp_path, monkeypatch):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setenv("TAKEN", "1")
    show = "import os; print(os.sched_getaffinity(0), os.environ.get('SET'), os.environ.get('TAKEN'))"
    job = Job([sys.executable, "-c", show], tmp_path / "one", tmp_path / "result", (core,), {"SET": "2", "TAKEN": None})
    assert job() == 0
    assert job.last_lines(1) == [f"{{{core}}} 2 None"]


def test_the_signals_of_a_cluster_leave_the_run_alone(tmp_path):
    job = Job(["sh", "-c", "kill -USR1 $$; kill -USR2 $$; echo alive"], tmp_path / "one", tmp_path / "result")
    assert job() == 0
    assert job.last_lines(1) == ["alive"]


def test_a_process_of_another_machine_is_not_told(tmp_path):
    job = job_for(tmp_path, 0)
    job.place.parent.mkdir()
    job.place.with_suffix(".lock").write_text("12 elsewhere\n")
    assert (job.began(), job.process()) == (True, None)


def test_tails(tmp_path):
    place = tmp_path / "log"
    assert read_tail(place) == []
    place.write_text("".join(f"line {i}\n" for i in range(1000)))
    assert read_tail(place, 40) == ["line 996", "line 997", "line 998", "line 999"]
    assert len(read_tail(place)) == 1000


def test_a_lock_is_held_once(tmp_path):
    with hold(tmp_path / "new" / "lock") as first:
        assert first
        with hold(tmp_path / "new" / "lock") as second:
            assert not second
    with hold(tmp_path / "new" / "lock") as third:
        assert third


def test_imports_start_in_no_time():
    script = "import sys, sparsejax.job; print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
