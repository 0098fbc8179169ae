"""Where runs are launched: on this machine, or through Slurm. Both are executors of submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsejax.job import Job
from sparsejax.sweep.axes import SweepError
from sparsejax.sweep.runs import Run
from sparsejax.train import RESULT, write_json

# A job of submitit has a time-out, locally too, and is queued again only so many times after one.
YEAR = 365 * 24 * 60  # minutes
TIMEOUTS = 10_000

SLURM_NAMES = {"cpus": "cpus_per_task", "gpus": "gpus_per_node"}
MINUTES = 60  # that a job may take if nothing else is said; then it saves and is queued again
FRESH = 2.0  # seconds that an answer of squeue serves
PATIENCE = 600.0  # seconds that squeue may fail for


class State(enum.StrEnum):
    """Where a run stands."""

    WAITING = enum.auto()  # to be launched
    QUEUED = enum.auto()  # launched; its job has not begun
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    STOPPED = enum.auto()  # asked to stop, has saved


@dataclasses.dataclass
class Attempt:
    """A run as its launcher follows it.

    Attributes:
      id: Of its job, as submitit and Slurm know it.
      slot: Which share of the machine it has.
      since: The clock as it was launched or found, later as its job began, in seconds.
      step: How far it was then.
    """

    run: Run
    job: Job
    state: State
    id: str | None = None
    slot: int = 0
    since: float = 0.0
    step: int = 0
    told: bool = False  # to stop

    @property
    def live(self) -> bool:
        """Whether it was launched and has not ended."""
        return self.state in (State.QUEUED, State.RUNNING)

    @property
    def name(self) -> str:
        return f"{self.run.label} seed {self.run.seed}"


class Engine(Protocol):
    """What launches runs and knows of their jobs."""

    rest: float  # seconds between two looks at the jobs
    jobs: int | None  # how many run at a time, if that is known
    stays: bool  # whether jobs are left to it when the launcher is asked to stop

    def launch(self, waiting: Sequence[Attempt], live: Sequence[Attempt]) -> list[Attempt]:
        """Submits as many of those that wait as there is room for beside those that live; returns them."""

    def began(self, attempt: Attempt) -> bool:
        """Whether the job of a launched run is running."""

    def ended(self, attempt: Attempt) -> bool:
        """Whether nothing is left of a launched run: no process, no job in a queue."""

    def stop(self, attempt: Attempt) -> None:
        """Asks a launched run to save and stop, as soon as it can be asked; may be called again and again."""

    def find(self, attempt: Attempt) -> bool:
        """Whether an earlier launcher has left this run running or queued."""


class Local:
    """The machine at hand: so many runs at a time, each on its share of the cores and devices."""

    rest = 0.05
    stays = False

    def __init__(self, folder: Path, jobs: int | None = None):
        self._devices, self._cores = find_devices(), find_cores()
        self.jobs = jobs or self._count_jobs()
        self._executor = _build_executor("LocalExecutor", folder)
        self._compiled = folder / "compiled"
        # The jobs outlive the launcher and its terminal, so they hear nothing from it and write nothing to it.
        quiet = ["trap '' INT HUP", "exec < /dev/null > /dev/null 2>&1"]
        self._executor.update_parameters(timeout_min=YEAR, setup=quiet)
        self._jobs: dict[str, Any] = {}

    def launch(self, waiting: Sequence[Attempt], live: Sequence[Attempt]) -> list[Attempt]:
        """Submits as many as there are free slots."""
        self._jobs = {name: job for name, job in self._jobs.items() if not job.done()}
        launched, taken = [], {attempt.slot for attempt in live}
        for attempt in waiting[: max(0, self.jobs - len(live))]:
            attempt.slot = min(set(range(self.jobs)) - taken)
            taken.add(attempt.slot)
            share = self._share(attempt.slot)
            cores = share_out(self._cores, attempt.slot, self.jobs)
            attempt.job = dataclasses.replace(attempt.job, cores=cores, environment=share, apart=True)
            attempt.job.forget()
            job = self._executor.submit(attempt.job)
            self._jobs[job.job_id] = job
            _note_submission(attempt, "local", job.job_id)
            launched.append(attempt)
        return launched

    def began(self, attempt: Attempt) -> bool:
        """Its process is known."""
        return attempt.job.began()

    def ended(self, attempt: Attempt) -> bool:
        """The exit code is there before submitit's own processes have ended; they need not be waited for."""
        job = self._jobs.get(attempt.id)
        alive = job is not None and not job.done()
        return (attempt.job.exit_code() is not None or not alive) and not attempt.job.held()

    def stop(self, attempt: Attempt) -> None:
        """Sends SIGTERM to the run's process."""
        process = attempt.job.process()
        if not attempt.told and process is not None and attempt.job.held():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGTERM)
            attempt.told = True

    def find(self, attempt: Attempt) -> bool:
        """Its lock tells."""
        attempt.slot = _read_submission(attempt, "local").get("slot", 0)
        return attempt.job.held()

    def _count_jobs(self) -> int:
        """One for each GPU, or one for all TPU chips, which a single process holds; else one for two cores."""
        if any(Path("/dev").glob("accel[0-9]*")):
            return 1
        return len(self._devices) or max(1, (len(self._cores) or os.cpu_count() or 1) // 2)

    def _share(self, slot: int) -> dict[str, str | None]:
        """The environment of a run."""
        # XLA cuts its sums into as many parts as it has threads, one for each core that it may use. With as many as a
        # run by itself would have, a run gives the same bits whatever its share is; NPROC is where XLA looks first.
        threads = {"NPROC": os.environ.get("NPROC", str(len(self._cores)))} if self._cores else {}
        # Submitit takes all devices away.
        devices = ",".join(share_out(self._devices, slot, self.jobs)) or os.environ.get("CUDA_VISIBLE_DEVICES")
        # Runs that differ in their seed alone are one program.
        compiled = {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._compiled))}
        return threads | compiled | {"CUDA_VISIBLE_DEVICES": devices}


class Slurm:
    """A cluster: everything is submitted at once, as one array, and Slurm says when and where it runs.

    Args:
      folder: The sweep's.
      jobs: How many run at a time, if Slurm has room for more.
      settings: Of the submission: partition, time in minutes, cpus, gpus, mem and whatever else sbatch takes.
    """

    rest = 1.0
    stays = True

    def __init__(self, folder: Path, jobs: int | None, settings: Mapping[str, str]):
        self.jobs = jobs
        self._executor = _build_executor("SlurmExecutor", folder)
        self._executor.update_parameters(**self._read_settings(settings, jobs))
        self._queue: dict[str, str] = {}
        self._asked = self._answered = -PATIENCE

    def launch(self, waiting: Sequence[Attempt], live: Sequence[Attempt]) -> list[Attempt]:
        """Submits all."""
        if not waiting:
            return []
        for attempt in waiting:
            attempt.job.forget()
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(attempt.job) for attempt in waiting]
        except Exception as error:  # what sbatch says comes in more than one class
            raise SweepError(f"--launcher=slurm: {error}") from error
        for attempt, job in zip(waiting, jobs, strict=True):
            _note_submission(attempt, "slurm", job.job_id)
        self._asked = -PATIENCE
        return list(waiting)

    def began(self, attempt: Attempt) -> bool:
        """Slurm says so; one that is requeued has not begun."""
        return self._ask().get(attempt.id) == "RUNNING"

    def ended(self, attempt: Attempt) -> bool:
        """A job that was requeued is in the queue, whatever its last exit code was."""
        return attempt.id not in self._ask() and not attempt.job.held()

    def stop(self, attempt: Attempt) -> None:
        """SIGTERM for a run that is running; a job that is not is cancelled."""
        state = self._ask().get(attempt.id)
        if state == "RUNNING" and not attempt.job.began():
            return  # it has only just begun
        if state is not None and not attempt.told:
            how = ["--signal=TERM"] if state == "RUNNING" else []
            attempt.told = subprocess.run(["scancel", *how, attempt.id], capture_output=True).returncode == 0

    def find(self, attempt: Attempt) -> bool:
        """Slurm's queue tells."""
        attempt.id = _read_submission(attempt, "slurm").get("job")
        return attempt.id in self._ask() or attempt.job.held()

    def _ask(self) -> dict[str, str]:
        """The state of each of the user's jobs that is queued or running."""
        now = time.monotonic()
        if now - self._asked < FRESH:
            return self._queue
        self._asked = now
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0:
            self._queue, self._answered = dict(line.split() for line in found.stdout.splitlines()), now
        elif now - self._answered > PATIENCE:
            raise SweepError(f"--launcher=slurm: {found.stderr}; jobs go on, and the same command finds them")
        return self._queue

    def _read_settings(self, given: Mapping[str, str], jobs: int | None) -> dict[str, Any]:
        settings: dict[str, Any] = {"job_name": "sparsejax", "stderr_to_stdout": True, "time": MINUTES}
        settings |= {} if jobs is None else {"array_parallelism": jobs}
        known = self._executor._valid_parameters()
        others = {}
        for key, text in given.items():
            value = int(text) if text.isdigit() else text
            if key == "time" and not isinstance(value, int):
                raise SweepError(f"--slurm.time: minutes, got {text!r}")
            name = SLURM_NAMES.get(key, key)
            (settings if name in known else others)[name] = value
        return settings | ({"additional_parameters": others} if others else {})


def share_out(items: Sequence[Any], slot: int, slots: int) -> tuple[Any, ...]:
    """The share of one slot of several: equal parts side by side; with fewer items than slots, slots share an item."""
    if len(items) < slots:
        return tuple(items[slot % len(items) : slot % len(items) + 1]) if items else ()
    part = len(items) // slots
    return tuple(items[slot * part : (slot + 1) * part])


def find_cores() -> tuple[int, ...]:
    """The cores that this process may use; empty where a process cannot be kept to some."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def find_devices() -> tuple[str, ...]:
    """The GPUs that runs may use. JAX is not asked, as it would take their memory."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return ()
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return tuple(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(str(number) for number in sorted(int(text) for text in numbers if text.isdigit()))


def build_engine(folder: Path, jobs: int | None, slurm: Mapping[str, str] | None) -> Engine:
    """The machine at hand, or Slurm if there are settings for it; raises SweepError for what cannot be used."""
    if jobs is not None and jobs < 1:
        raise SweepError(f"--jobs: at least 1, got {jobs}")
    return Local(folder, jobs) if slurm is None else Slurm(folder, jobs, slurm)


def build_job(run: Run, folder: Path) -> Job:
    """A run's job, which keeps its files in the sweep's `jobs` and leaves the workdir to the run."""
    return Job(run.command(folder), folder / "jobs" / run.name, run.workdir(folder) / RESULT)


def _build_executor(kind: str, folder: Path) -> Any:
    level = "SUBMITIT_LOG_LEVEL"
    before = os.environ.get(level)
    os.environ[level] = "NOCONFIG"  # or importing submitit would shut down whatever else is logged; jobs may do so
    try:
        import submitit
    except ImportError:
        raise SweepError("--launcher: needs submitit; pip install 'sparsejax[launch]'") from None
    finally:
        del os.environ[level]
        os.environ |= {} if before is None else {level: before}
    try:
        return getattr(submitit, kind)(folder / "jobs" / "submitit", max_num_timeout=TIMEOUTS)
    except RuntimeError as error:
        raise SweepError(f"--launcher: {error}") from None


def _note_submission(attempt: Attempt, launcher: str, job: str) -> None:
    attempt.id, attempt.told = job, False
    write_json(attempt.job.place.with_suffix(".json"), {"launcher": launcher, "job": job, "slot": attempt.slot})


def _read_submission(attempt: Attempt, launcher: str) -> dict[str, Any]:
    """The run's last submission, if it was to this launcher: another one's ids are other jobs here."""
    place = attempt.job.place.with_suffix(".json")
    found = json.loads(place.read_text()) if place.exists() else {}
    return found if found.get("launcher") == launcher else {}
