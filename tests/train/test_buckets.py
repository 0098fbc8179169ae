"""Workdirs in buckets: a run trains on a copy, and the bucket alone is enough to resume it, report it and load it."""

import importlib.util
import shutil

import fsspec
import numpy as np
import pytest

import sparsejax
from sparsejax.buckets import INDEX, Bucket, open_workdir, read_workdir
from sparsejax.errors import InputError
from sparsejax.report import report
from sparsejax.signals import Interrupted
from sparsejax.workdir import Workdir
from tests.messages import rejects
from tests.train import runs

ADDRESS = "memory://bucket/run"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty file system in memory, and an empty cache on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def read(system, name):
    return system.cat_file(f"/bucket/run/{name}")


def lose_machine(tmp_path):
    shutil.rmtree(tmp_path / "cache")


def test_a_run_resumes_from_its_bucket(system, trained, text, tmp_path, monkeypatch):
    settings, local = runs.load(text, runs.TRAINED), Workdir(trained[0])
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 12)
        with pytest.raises(Interrupted):
            runs.train_here(settings, ADDRESS)
    lose_machine(tmp_path)
    assert f"resuming {ADDRESS} at step 1" in runs.train_here(settings, ADDRESS)
    for name in ("metrics.jsonl", "metrics.csv", "result.json", "schedule.txt"):
        assert read(system, name) == (local.path / name).read_bytes(), name

    lose_machine(tmp_path)
    here, there = (report(path).comparisons[0].results.runs for path in (str(local.path), ADDRESS))
    assert here["eval/loss"].tolist() == there["eval/loss"].tolist()
    model, expected = sparsejax.load(ADDRESS), sparsejax.load(local.path)
    tokens = np.arange(16)[None]
    assert model.step == 20
    np.testing.assert_array_equal(model.logits(tokens), expected.logits(tokens))
    copies = {path.name for path in (tmp_path / "cache" / "sparsejax" / "buckets").glob("*.read/checkpoints/*")}
    assert copies == {"20"}


def write_run(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_state_counts_when_its_index_is_written(system, tmp_path, monkeypatch):
    with open_workdir(ADDRESS) as (folder, _):
        write_run(folder, config="old", checkpoints__1__state="1", lock="held", other_part="")
        (folder / "metrics.jsonl.7.part").write_text("cut off")
    assert {name.removeprefix("/bucket/run/") for name in system.find("/bucket/run")} == {
        "config",
        "checkpoints/1/state",
        "other_part",
        INDEX,
    }
    bucket = Bucket(ADDRESS)
    before = bucket.read_index()
    write_run(bucket.copy, checkpoints__2__state="2")
    shutil.rmtree(bucket.copy / "checkpoints" / "1")
    pipe = type(system).pipe_file

    def fail(self, path, value, *args, **kwargs):
        if path.endswith(INDEX):
            raise OSError("no network")
        pipe(self, path, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "pipe_file", fail)
        with rejects(InputError, "workdir"):
            bucket.upload()
    lose_machine(tmp_path)
    assert bucket.read_index() == before
    bucket.download()
    assert [path.name for path in (bucket.copy / "checkpoints").iterdir()] == ["1"]
    assert (bucket.copy / "config").read_text() == "old"


def test_the_bucket_decides(system, tmp_path):
    """What a copy holds besides is deleted, and what has not changed is not copied again."""
    with open_workdir(ADDRESS) as (folder, _):
        write_run(folder, config="x", checkpoints__1__state="1")
    write_run(folder, config="changed", checkpoints__2__state="2", stray="")
    state = folder / "checkpoints" / "1" / "state"
    inode = state.stat().st_ino
    Bucket(ADDRESS).download()
    assert (folder / "config").read_text() == "x"
    assert sorted(path.name for path in folder.rglob("*")) == ["1", "checkpoints", "config", "state"]
    assert state.stat().st_ino == inode


def test_what_is_no_workdir_is_refused(system):
    system.pipe_file("/bucket/run/photo.jpg", b"x")
    with rejects(InputError, "workdir"), open_workdir(ADDRESS):
        pass
    with rejects(InputError, "inputs"):
        read_workdir("memory://bucket/nothing", "inputs")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="the package is installed")
def test_a_package_that_is_missing_is_named(system):
    with rejects(InputError, "sparsejax[buckets]"):
        Bucket("gs://bucket/run")


def test_two_runs_of_one_machine(system):
    with open_workdir(ADDRESS), rejects(InputError, ADDRESS), open_workdir(ADDRESS):
        pass
