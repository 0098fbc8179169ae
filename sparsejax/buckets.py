"""Workdirs in buckets: a run works on a copy on this machine, which is uploaded at every checkpoint and at the end.

A bucket holds the files of the workdir and an index, which is written last: the files that the index lists are one
state of the run. What a run does after its last upload is lost with the machine, and done again by the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsejax.errors import InputError
from sparsejax.paths import bucket_address, default_cache, local_path
from sparsejax.workdir import PART, Workdir, hold_lock

INDEX = "index.json"  # size and time of every file of the workdir in the bucket, by name
INTERVAL = 0.2  # seconds between two looks at whether a checkpoint is complete

Stamp = list[int]


class Bucket:
    """A workdir in a bucket, and its copy in the cache of this machine.

    Raises:
      InputError: The package of the scheme is not installed, or the bucket cannot be reached.
    """

    def __init__(self, address: str):
        self.address = address
        with self._reporting():
            import fsspec

            try:
                self._system, self._root = fsspec.core.url_to_fs(address)
            except ImportError as error:
                raise InputError("workdir", f"{address}: {error}; pip install 'sparsejax[buckets]'") from None
        self.copy = default_cache() / "buckets" / hashlib.sha256(address.encode()).hexdigest()[:16]

    def read_index(self) -> dict[str, Stamp]:
        """Reads the index; empty for a new workdir."""
        with self._reporting():
            path = f"{self._root}/{INDEX}"
            if self._system.exists(path):
                return json.loads(self._system.cat_file(path))
            if self._system.exists(self._root) and self._system.find(self._root):
                raise InputError("workdir", f"{self.address} is not empty and has no {INDEX}")
        return {}

    def download(self, select: Callable[[str], bool] = lambda name: True) -> Path:
        """Makes the copy equal to the bucket, in the files that are selected; returns its folder."""
        index = self.read_index()
        for name in _list_files(self.copy):
            if name not in index and select(name):
                (self.copy / name).unlink(missing_ok=True)
        for folder in Workdir(self.copy).checkpoints.glob("*"):
            if not any(path.is_file() for path in folder.rglob("*")):
                shutil.rmtree(folder)  # of a checkpoint that is not in the bucket
        for name, stamp in index.items():
            file = self.copy / name
            if not select(name) or _stamp(file) == stamp:
                continue
            part = file.with_name(file.name + PART)
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._reporting():
                self._system.get_file(f"{self._root}/{name}", str(part))
            os.utime(part, ns=(stamp[1], stamp[1]))
            os.replace(part, file)
        return self.copy

    def upload(self) -> None:
        """Makes the bucket equal to the copy."""
        index, files = self.read_index(), {}
        for name in _list_files(self.copy):
            stamp = _stamp(self.copy / name)
            if stamp is not None:  # else it has just been deleted
                files[name] = stamp
        if files == index:
            return
        with self._reporting():
            for name, stamp in files.items():
                if index.get(name) != stamp:
                    self._system.pipe_file(f"{self._root}/{name}", (self.copy / name).read_bytes())
            self._system.pipe_file(f"{self._root}/{INDEX}", json.dumps(files).encode())
            for name in index.keys() - files.keys():
                self._system.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns the errors of a file system, which have no common base, into InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            problem = " ".join(str(error).split()) or "failed"
            raise InputError("workdir", f"{self.address}: {type(error).__name__}: {problem}") from error


class Uploads:
    """Uploads checkpoints in the background; of a run on this machine there is nothing to do."""

    def __init__(self, bucket: Bucket | None):
        self._bucket = bucket
        self._step: int | None = None
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True) if bucket else None
        if self._thread:
            self._thread.start()

    def request(self, step: int) -> None:
        """Asks for an upload once the checkpoint of a step is complete."""
        self._step = step
        self._changed.set()

    def close(self) -> None:
        """Uploads what is left; raises InputError if that fails."""
        self._closed.set()
        self._changed.set()
        if self._thread and self._bucket:
            self._thread.join()
            self._bucket.upload()

    def _work(self) -> None:
        assert self._bucket is not None
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            checkpoint = Workdir(self._bucket.copy).checkpoints / str(self._step)
            while not checkpoint.is_dir() and not self._closed.wait(INTERVAL):
                pass
            with contextlib.suppress(InputError, OSError):  # a file was deleted meanwhile, or the network failed
                if not self._closed.is_set():
                    self._bucket.upload()


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Uploads]]:
    """Yields the folder in which a run works, and the uploads of a workdir in a bucket.

    The lock of a workdir in a bucket holds on this machine only.

    Raises:
      InputError: The path cannot be written, or another process of this machine works on the bucket.
    """
    address = bucket_address(path, "workdir")
    if address is None:
        yield local_path(path, "workdir"), Uploads(None)
        return
    bucket = Bucket(address)
    with hold_lock(bucket.copy.with_suffix(".lock"), address):
        uploads = Uploads(bucket)
        folder = bucket.download()
        try:
            yield folder, uploads
        finally:
            uploads.close()


def read_workdir(path: str | os.PathLike[str], argument: str = "path", checkpoints: str = "none") -> Path:
    """Returns a folder from which a workdir can be read: that of the path, or a copy of a bucket's.

    Args:
      path: A path or the address of a bucket.
      argument: What the path is, for errors.
      checkpoints: Checkpoints of a bucket to copy: "none", "newest" or "all".
    """
    address = bucket_address(path, argument)
    if address is None:
        return local_path(path, argument)
    bucket = Bucket(address)
    names = bucket.read_index()
    if not names:
        raise InputError(argument, f"{address} holds no workdir")
    newest = max((int(name.split("/")[1]) for name in names if name.startswith("checkpoints/")), default=None)
    bucket.copy = bucket.copy.with_suffix(".read")  # a run of this machine may work on the other copy

    def select(name: str) -> bool:
        if name.startswith("checkpoints/"):
            return checkpoints == "all" or (checkpoints == "newest" and name.startswith(f"checkpoints/{newest}/"))
        return not name.startswith("events/")

    return bucket.download(select)


def _list_files(folder: Path) -> list[str]:
    """Names of the files of a workdir that belong into a bucket: not those that are being written, nor the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != PART)
    names = (path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if name != "lock" and "orbax-checkpoint-tmp" not in name]


def _stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]
