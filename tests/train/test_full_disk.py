"""A disk that is really full: one error names it, and no checkpoint is lost."""

import contextlib
import errno
import shutil
import subprocess

import pytest

from sparsejax.runs import CheckpointError, checkpoint, list_steps
from sparsejax.workdir import Workdir, read_rows
from tests.train import runs

SIZE = 4 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A folder with a file system of SIZE bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk, free):
    """Fills the disk up to `free` bytes."""
    with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
        file.truncate(0)
        while file.write(bytes(4096)) == 4096:
            pass
    (disk / "other").open("r+b").truncate((disk / "other").stat().st_size - free)


def assert_full(text, workdir):
    """The run fails because the disk is full."""
    with pytest.raises((CheckpointError, OSError)) as caught:
        runs.train_here(runs.load(text), workdir.path)
    if isinstance(caught.value, CheckpointError):
        assert caught.value.argument == str(workdir.checkpoints)
        assert "\n" not in str(caught.value)
    else:
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("free", [0, 2**12, 2**16, 1300 * 2**10], ids=lambda free: f"{free // 1024}KiB")
def test_a_full_disk_is_named_and_the_same_run_resumes(disk, text, free):
    workdir = Workdir(disk / "run")
    fill(disk, free)
    assert_full(text, workdir)
    (disk / "other").unlink()
    runs.train_here(runs.load(text), workdir.path)
    assert list_steps(workdir.checkpoints)[-1] == 20
    assert [row["step"] for row in read_rows(workdir.metrics)] == list(range(1, 21))


def test_a_save_that_fills_the_disk_keeps_the_previous_checkpoint(disk, text, monkeypatch):
    workdir = Workdir(disk / "run")
    runs.train_here(runs.load(text), workdir.path)
    for step in list_steps(workdir.checkpoints)[1:]:
        shutil.rmtree(workdir.checkpoints / str(step))
    (kept,) = list_steps(workdir.checkpoints)
    before = checkpoint.read_arrays(workdir.checkpoints, kept)

    monkeypatch.setattr(checkpoint, "_require_space", lambda folder, size: None)  # another program fills it meanwhile
    fill(disk, 2**17)
    assert_full(text, workdir)
    assert list_steps(workdir.checkpoints) == [kept]
    runs.assert_same_bits(checkpoint.read_arrays(workdir.checkpoints, kept), before)
    (disk / "other").unlink()
    runs.train_here(runs.load(text), workdir.path)
