"""The files of a run and of a sweep, and how they are read and written.

Every file name of a workdir stands here once. A file is replaced in one step, so that neither a reader nor a crash
sees half of it; a jsonl file only grows, and a reader ignores a last line that a crash cut short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.errors import InputError
from sparsejax.records import parse_json

RUN = {"label": str, "seed": int, "overrides": dict}
SWEEP = {"config": str, "sweeps": [str], "runs": {...: RUN}}  # schema of the record of a sweep
PART = ".part"  # suffix of a file that is being written
LOCK_TIMEOUT = 2.0  # seconds; a process that checks a lock holds it for an instant
ROW = {"step": int, ...: (float, None)}  # schema of a row of a jsonl file


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The files of one run, under `path`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration. A folder with this file is a workdir."""
        return self.path / "config.json"

    @property
    def certificate(self) -> Path:
        """The findings of the check of the models of the run, see `train.certify`."""
        return self.path / "certificate.json"

    @property
    def extensions(self) -> Path:
        """The user's modules that registered patterns or mixers, if there are any."""
        return self.path / "extensions.json"

    @property
    def schedule(self) -> Path:
        """The layer names, one per line."""
        return self.path / "schedule.txt"

    @property
    def data(self) -> Path:
        """Counts of files, documents and tokens, and the digests of the text and the tokenizer."""
        return self.path / "data.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, trained or copied, as JSON of the library `tokenizers`."""
        return self.path / "tokenizer.json"

    @property
    def sentencepiece(self) -> Path:
        """The tokenizer, if it is a SentencePiece model."""
        return self.path / "tokenizer.model"

    @property
    def init(self) -> Path:
        """Where each parameter came from, if the run started from the weights of a model."""
        return self.path / "init.json"

    @property
    def teacher(self) -> Path:
        """The model from which the run distils, if there is one: its source, digest and configuration."""
        return self.path / "teacher.json"

    @property
    def versions(self) -> Path:
        """The software and devices of each start."""
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        """Metrics by step. Two equal runs write equal bytes."""
        return self.path / "metrics.jsonl"

    @property
    def metrics_table(self) -> Path:
        """The metrics as a table, written when the run ends."""
        return self.path / "metrics.csv"

    @property
    def timing(self) -> Path:
        """Measurements by step that depend on the clock."""
        return self.path / "timing.jsonl"

    @property
    def histograms(self) -> Path:
        """Histograms of gradients and activations by step, if `train.histograms` asks for them."""
        return self.path / "histograms.jsonl"

    @property
    def profile(self) -> Path:
        """The folder of the traces of `train.profile`, which TensorBoard and xprof read."""
        return self.path / "profile"

    @property
    def loggers(self) -> Path:
        """Ids of the run in the services of `train.log_to`, with which a resumed run continues."""
        return self.path / "loggers.json"

    @property
    def events(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "events"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, one folder per step."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """The final evaluation. A run with this file has ended."""
        return self.path / "result.json"

    @property
    def lock(self) -> Path:
        """Held while the run is running. Its content is then the process id and the host of the run."""
        return self.path / "lock"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the lock, and deletes partial files of a killed run; raises InputError if another process holds it."""
        with hold_lock(self.lock, self.path, self.path):
            yield

    def exists(self) -> bool:
        """Whether `path` is a workdir."""
        return self.config.exists()


@dataclasses.dataclass(frozen=True)
class SweepFolder:
    """The files of one sweep or search, under `path`."""

    path: Path

    @property
    def record(self) -> Path:
        """The planned runs. A folder with this file is a sweep."""
        return self.path / "sweep.json"

    @property
    def search(self) -> Path:
        """The settings of a search."""
        return self.path / "search.json"

    @property
    def study(self) -> Path:
        """The journal of Optuna's study of a search."""
        return self.path / "study.journal"

    @property
    def trials(self) -> Path:
        """The trials of a search, as a table."""
        return self.path / "trials.csv"

    @property
    def runs(self) -> Path:
        """The folder of the workdirs."""
        return self.path / "runs"

    @property
    def jobs(self) -> Path:
        """The folder of logs and of the launcher's state."""
        return self.path / "jobs"

    @property
    def compiled(self) -> Path:
        """The compilation cache that runs which differ only in their seed share."""
        return self.path / "compiled"

    @property
    def lock(self) -> Path:
        """Held by the launcher."""
        return self.jobs / "launcher.lock"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the lock, and deletes partial files of a killed launcher; raises InputError if another one holds it."""
        with hold_lock(self.lock, self.path, self.path, self.jobs):
            yield

    def workdir(self, name: str) -> Workdir:
        """The workdir of the run `name`."""
        return Workdir(self.runs / name)

    def job(self, name: str) -> JobFiles:
        """The files of the job of the run `name`."""
        return JobFiles(self.jobs / name, self.workdir(name))

    def exists(self) -> bool:
        """Whether `path` is a sweep."""
        return self.record.exists()

    def read(self) -> dict[str, Any]:
        """Reads the record.

        Returns:
          `config`; `sweeps`, as written on the command line; `runs` by name, each with `label`, `seed` and `overrides`.

        Raises:
          InputError: The record is damaged.
        """
        if not self.exists():
            return {"config": None, "sweeps": [], "runs": {}}
        return read_json(self.record, SWEEP)

    def add(self, config: str, sweep: str, runs: dict[str, Any]) -> None:
        """Adds runs to the record."""
        record = self.read()
        sweeps = record["sweeps"] + [sweep] * (sweep not in record["sweeps"])
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.record, {"config": config, "sweeps": sweeps, "runs": record["runs"] | runs})


@dataclasses.dataclass(frozen=True)
class JobFiles:
    """The files of the job of the run in `workdir`; `path` is their common stem."""

    path: Path
    workdir: Workdir

    @property
    def log(self) -> Path:
        """Output of the run, over all attempts."""
        return self.path.with_suffix(".log")

    @property
    def lock(self) -> Path:
        """Held from the start of the job to the end of the run. Its content is the process id and host of the run."""
        return self.path.with_suffix(".lock")

    @property
    def submission(self) -> Path:
        """The last submission: launcher, job id, share of the machine."""
        return self.path.with_suffix(".json")

    def held(self) -> bool:
        """Whether a process works on the run: its job, the run itself, or a run that a user started."""
        return is_held(self.lock) or is_held(self.workdir.lock)

    def process(self) -> tuple[int, str] | None:
        """Process id and host of the run while it is running."""
        return read_holder(self.lock) or read_holder(self.workdir.lock)


@contextlib.contextmanager
def hold_lock(path: Path, subject: object, *folders: Path) -> Iterator[None]:
    """Holds a lock file, which contains the process id and the host of its holder.

    Args:
      path: The lock file.
      subject: What the lock protects, for errors.
      folders: Folders of which the partial files of an earlier holder are deleted.

    Raises:
      InputError: Another process holds the lock of `subject`.
    """
    import filelock  # here, because most users of this module need no locks

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=LOCK_TIMEOUT)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise busy(path, subject) from None
    try:
        path.write_text(f"{os.getpid()} {platform.node()}\n")
        for folder in folders:
            for part in folder.glob(f"*{PART}"):
                part.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # the content counts only while the lock is held
            path.write_text("")
        lock.release()


def busy(path: Path, subject: object) -> InputError:
    """The error about a lock that another process holds."""
    holder = read_holder(path)
    process = f"process {holder[0]} on {holder[1]}" if holder else "another process"
    return InputError("workdir", f"{subject} is in use by {process}; wait for its end, or stop it")


def is_held(path: Path, timeout: float = 0.0) -> bool:
    """Whether a process holds a lock for longer than `timeout` seconds."""
    import filelock

    try:
        if path.exists():
            filelock.FileLock(path, timeout=timeout).acquire().lock.release()
    except filelock.Timeout:
        return True
    return False


def read_holder(path: Path) -> tuple[int, str] | None:
    """Returns the process id and the host in a lock file while a process holds it."""
    content = path.read_text().split() if is_held(path) else []
    return (int(content[0]), content[1]) if len(content) == 2 else None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step; of concurrent writers the last one wins."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step."""
    replace_file(path, f"{json.dumps(value, indent=2)}\n".encode())


def read_json(path: Path, schema: Any = None) -> Any:
    """Reads a JSON file of the types of `schema`, see `records`.

    Raises:
      InputError: The file cannot be read, or is damaged.
      FileNotFoundError: There is no file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(path, str(error.strerror)) from error
    return parse_json(content, path, schema)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to a jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, schema: Any = ROW) -> list[dict[str, Any]]:
    """Reads the rows of a jsonl file, without a last line that a crash cut short; no file has no rows.

    Raises:
      InputError: The file cannot be read, or a row is damaged.
    """
    try:
        content = path.read_bytes().rstrip(b"\0")  # after a power failure
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(path, str(error.strerror)) from error
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [parse_json(line, f"{path}: line {number}", schema) for number, line in enumerate(lines, 1)]


def read_last_row(path: Path, size: int = 1 << 14) -> dict[str, Any]:
    """Reads the last whole row of a jsonl file that may be growing; empty if there is none or it is damaged."""
    for line in reversed(read_tail(path, size)):
        with contextlib.suppress(InputError):
            return parse_json(line, path, ROW)
    return {}


def read_tail(path: Path, size: int = 1 << 14) -> list[str]:
    """Reads the last whole lines, at most `size` bytes, of a file that may be growing; none if there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[bool(start) :]


def resume_rows(path: Path, identity: dict[str, Any], argument: str, subject: str) -> list[dict[str, Any]]:
    """Returns the rows of a record in a jsonl file that starts with a row of what determines them; or starts it.

    Args:
      path: The file, whose folder exists.
      identity: What determines the rows, with the types of JSON.
      argument: What names the folder, for errors.
      subject: What has the record, for errors.

    Raises:
      InputError: The file is a record of something else, or is damaged.
    """
    rows = read_rows(path, {...: (dict, list, str, int, float, bool, None)})
    if rows and rows[0] != identity:
        changed = next(key for key in identity if rows[0].get(key) != identity[key])
        problem = f"{path.parent} holds another {subject}, which differs in {changed}"
        raise InputError(argument, f"{problem}; name another folder, or delete {path.name}")
    lines = "".join(f"{json.dumps(row)}\n" for row in rows or [identity])
    replace_file(path, lines.encode())  # without a last line that a crash cut short
    return rows[1:]
