"""A disk that runs full, a real one: said in one line, and nothing that was saved is lost."""

import contextlib
import subprocess

import pytest

from sparsejax.cli import USAGE_ERROR, main
from sparsejax.train import checkpoint, list_steps, read_rows
from tests.train import runs

SIZE = 4 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A folder with a file system of its own, of SIZE bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def leave(disk, free):
    """Fills the disk but for so many bytes."""
    with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
        file.truncate(0)
        while file.write(bytes(4096)) == 4096:
            pass
    (disk / "other").open("r+b").truncate((disk / "other").stat().st_size - free)


def run(text, disk, capsys, *more):
    arguments = ["train", f"--config={runs.RECIPE}", f"--config.data.files={text}", f"--workdir={disk / 'run'}", *more]
    code = main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("free", [0, 2**12, 2**16, 1300 * 2**10], ids=lambda free: f"{free // 1024} KiB free")
def test_a_full_disk_is_named_and_the_same_command_goes_on(disk, tmp_path, capsys, free):
    text = runs.write_text(tmp_path / "text")
    leave(disk, free)
    code, err = run(text, disk, capsys)
    assert (code, err.count("\n")) == (USAGE_ERROR, 1), err
    assert "no space left on the workdir's disk" in err
    (disk / "other").unlink()
    assert run(text, disk, capsys) == (0, "")
    assert list_steps(disk / "run" / "checkpoints")[-1] == 20
    assert [row["step"] for row in read_rows(disk / "run" / "metrics.jsonl")] == list(range(1, 21))


def test_a_save_that_fills_the_disk_leaves_the_one_before_it(disk, tmp_path, capsys, monkeypatch):
    text = runs.write_text(tmp_path / "text")
    assert run(text, disk, capsys, "--config.train.steps=20")[0] == 0
    workdir = disk / "run" / "checkpoints"
    for step in list_steps(workdir)[1:]:
        for file in sorted((workdir / str(step)).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (workdir / str(step)).rmdir()
    (kept,) = list_steps(workdir)
    before = checkpoint.read_arrays(workdir, kept)

    monkeypatch.setattr(checkpoint, "_require_room", lambda folder, size: None)  # another program fills it meanwhile
    leave(disk, 2**17)
    code, err = run(text, disk, capsys)
    assert (code, err.count("\n")) == (USAGE_ERROR, 1), err
    assert "no space left on the workdir's disk" in err
    assert list_steps(workdir) == [kept]
    runs.assert_same_bits(checkpoint.read_arrays(workdir, kept), before)
    (disk / "other").unlink()
    assert run(text, disk, capsys) == (0, "")
