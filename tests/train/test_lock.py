"""One process works on a workdir; readers need no lock."""

import os
import platform
import shutil
import signal

import pytest

import sparsejax
from sparsejax import cli
from sparsejax.errors import InputError
from sparsejax.report import report
from sparsejax.workdir import LOCK_TIMEOUT, JobFiles, SweepFolder, Workdir, is_held, read_holder
from tests.messages import check_message, rejects
from tests.train import runs


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_second_start_is_refused(text, tmp_path):
    """In one line that names the workdir and the process, and without a change; the first run goes on."""
    workdir = Workdir(tmp_path / "run")
    arguments = ["train", f"--config={runs.RECIPE}", f"--config.data.files={text}", f"--workdir={workdir.path}"]
    arguments.append("--config.train.steps=4000")
    first = runs.start(*arguments)
    runs.wait_for_row(first, workdir.path, 1)
    assert read_holder(workdir.lock) == (first.pid, platform.node())
    versions = workdir.versions.read_bytes()
    code, out, err = runs.finish(runs.start(*arguments))
    assert (code, out) == (2, "")
    check_message(err.strip())
    assert workdir.versions.read_bytes() == versions
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert runs.finish(first)[0] == cli.INTERRUPTED
    assert not is_held(workdir.lock)
    assert workdir.lock.read_text() == ""


def test_readers_need_no_lock(trained, text, tmp_path):
    workdir = Workdir(shutil.copytree(trained[0], tmp_path / "run"))
    with workdir.hold():
        before = snapshot(workdir.path)
        assert sparsejax.load(workdir.path).step == 20
        assert len(report(workdir.path).comparisons[0].results.runs) == 1
        with rejects(InputError, "workdir"):
            runs.train_here(runs.load(text, runs.TRAINED), workdir.path)
        assert snapshot(workdir.path) == before


def test_what_a_killed_process_was_writing_is_deleted(tmp_path):
    workdir, sweep = Workdir(tmp_path / "run"), SweepFolder(tmp_path / "sweep")
    for path in (workdir.path, sweep.path, sweep.jobs):
        path.mkdir()
        (path / "record.json.123.part").write_text("cut off")
    with workdir.hold(), sweep.hold():
        assert not list(tmp_path.rglob("*.part"))
        with rejects(InputError, "workdir"), sweep.hold():
            pass


def test_a_sweep_finds_a_run_that_a_user_started(tmp_path):
    workdir = Workdir(tmp_path / "runs" / "a")
    files = JobFiles(tmp_path / "jobs" / "a", workdir)
    assert not files.held()
    assert files.process() is None
    with workdir.hold():
        assert files.held()
        assert files.process() == (os.getpid(), platform.node())
    assert not files.held()


def test_a_look_at_a_lock_is_no_refusal(tmp_path):
    """A process that checks a lock holds it for an instant."""
    workdir = Workdir(tmp_path / "run")
    with workdir.hold():
        pass
    for _ in range(50):
        assert not is_held(workdir.lock)
        with workdir.hold():
            assert is_held(workdir.lock)
    assert LOCK_TIMEOUT >= 1


def test_a_failed_write_leaves_no_partial_file(tmp_path, monkeypatch):
    from sparsejax import workdir

    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workdir.replace_file(tmp_path / "record.json", b"x")
    assert not list(tmp_path.iterdir())
