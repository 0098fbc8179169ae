"""Executors launch runs, on this machine or through Slurm. Both submit jobs with submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.job import Job
from sparsejax.machine import default_jobs, find_cores, find_devices, share_out
from sparsejax.sweep.grid import SweepError
from sparsejax.sweep.runs import Run
from sparsejax.workdir import SweepFolder, read_json, write_json

if TYPE_CHECKING:
    import submitit

# A job of submitit has a time limit, locally as well, and is queued again after a limited number of timeouts.
YEAR = 365 * 24 * 60  # minutes
TIMEOUTS = 10_000
# Local jobs outlive the launcher and its terminal: they ignore its signals and do not write to it.
QUIET = ("trap '' INT HUP", "exec < /dev/null > /dev/null 2>&1")

SUBMISSION = {"launcher": str, "job": str, "slot": int}  # schema of the record of a submission

SLURM_NAMES = {"cpus": "cpus_per_task", "gpus": "gpus_per_node"}
SLURM_MINUTES = 60  # default time limit of a job, after which the run saves and is queued again
SQUEUE_INTERVAL = 2.0  # seconds between two calls of squeue
SQUEUE_PATIENCE = 600.0  # seconds for which squeue may fail


class State(enum.StrEnum):
    """State of a run."""

    WAITING = enum.auto()  # to be launched
    QUEUED = enum.auto()  # launched, and its job has not started
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    STOPPED = enum.auto()  # asked to stop, and has saved


@dataclasses.dataclass
class Attempt:
    """A run as its launcher follows it."""

    run: Run
    job: Job
    state: State = State.WAITING
    id: str | None = None  # of the job in submitit and Slurm
    slot: int = 0  # index of its share of the machine
    since: float = 0.0  # time.monotonic() when it was launched or found, later when its job started
    step: int = 0  # step of the run at that time
    asked: bool = False  # to stop
    settled: bool = False  # nothing is left to do

    @property
    def live(self) -> bool:
        """Whether the run was launched and has not ended."""
        return self.state in (State.QUEUED, State.RUNNING)


class _Submissions:
    """The record of the last submission of each run, and submitit's result of it."""

    launcher: str  # name of the executor in the record

    def __init__(self, folder: Path, jobs: int | None):
        if jobs is not None and jobs < 1:
            raise SweepError("jobs", f"must be at least 1, got {jobs}")
        self._folder, self.jobs = SweepFolder(folder), jobs
        self._submitit = _import_submitit()

    def exit_code(self, attempt: Attempt) -> int | None:
        """Exit code of the last attempt, negative for a signal; None if there was none or nobody observed its end."""
        submission = _read_submission(attempt)
        if not submission:
            return None
        kind = self._submitit.LocalJob if submission["launcher"] == Local.launcher else self._submitit.SlurmJob
        job = kind(self._pickles(attempt, submission["launcher"]), submission["job"])
        # Without its result, submitit waits for a job; a job that raised an exception has no exit code.
        return job.result() if job.paths.result_pickle.exists() and job.exception() is None else None

    def _pickles(self, attempt: Attempt, launcher: str) -> Path:
        """The folder of submitit's files, one per run on this machine, where ids are process ids and recur."""
        return self._folder.jobs / launcher / (attempt.run.name if launcher == Local.launcher else "")

    def _record(self, attempt: Attempt, job: str) -> None:
        attempt.id, attempt.asked = job, False
        submission = {"launcher": self.launcher, "job": job, "slot": attempt.slot}
        write_json(attempt.job.files.submission, submission)


class Local(_Submissions):
    """Launches runs on this machine, each on its share of the cores and devices."""

    launcher = "local"
    poll_interval = 0.05  # seconds
    detached = False  # whether jobs go on when the launcher is asked to stop
    jobs: int  # limit of concurrent runs

    def __init__(self, folder: Path, jobs: int | None = None):
        super().__init__(folder, jobs)
        self._devices, self._cores = find_devices(), find_cores()
        self.jobs = jobs or default_jobs(self._devices, self._cores)
        self._submitted: dict[str, submitit.Job[int | None]] = {}

    def launch(self, waiting: Sequence[Attempt], live: Sequence[Attempt]) -> list[Attempt]:
        """Submits as many waiting runs as there is room for beside the live ones; returns them."""
        self._submitted = {key: job for key, job in self._submitted.items() if not job.done()}
        launched = list(waiting[: max(0, self.jobs - len(live))])
        taken = {attempt.slot for attempt in live}
        for attempt in launched:
            attempt.slot = min(set(range(self.jobs)) - taken)
            taken.add(attempt.slot)
            cores = share_out(self._cores, attempt.slot, self.jobs)
            environment = self._environment(attempt.slot)
            attempt.job = dataclasses.replace(attempt.job, cores=cores, environment=environment, new_session=True)
            folder = self._pickles(attempt, self.launcher)
            shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt may have had the same process id
            executor = self._submitit.LocalExecutor(folder, max_num_timeout=TIMEOUTS)
            executor.update_parameters(timeout_min=YEAR, setup=list(QUIET))
            job = executor.submit(attempt.job)
            self._submitted[job.job_id] = job
            self._record(attempt, job.job_id)
        return launched

    def find(self, attempt: Attempt) -> bool:
        """Whether an earlier launcher left this run running or queued."""
        attempt.slot = _read_submission(attempt, self.launcher).get("slot", 0)
        return attempt.job.files.held()

    def started(self, attempt: Attempt) -> bool:
        """Whether the job of a launched run is running."""
        return True

    def ended(self, attempt: Attempt) -> bool:
        """Whether nothing is left of a launched run: no process and no queued job."""
        # The result exists before submitit's own processes have ended; the launcher need not wait for them.
        job = self._submitted.get(attempt.id or "")
        waiting = job is not None and not job.done() and not job.paths.result_pickle.exists()
        if not waiting:
            self._submitted.pop(attempt.id or "", None)  # the destructor of a job fails when the interpreter exits
        return not waiting and not attempt.job.files.held()

    def stop(self, attempt: Attempt) -> None:
        """Asks a launched run to save and stop as soon as that is possible; may be called repeatedly."""
        process = None if attempt.asked else attempt.job.files.process()
        if process is not None and process[1] == platform.node():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process[0], signal.SIGTERM)
            attempt.asked = True

    def _environment(self, slot: int) -> dict[str, str | None]:
        # XLA splits its sums by the number of threads, one per core that it may use. With the number of a run that has
        # the machine to itself, a run computes the same bits on any share; XLA reads NPROC first.
        threads = {"NPROC": os.environ.get("NPROC", str(len(self._cores)))} if self._cores else {}
        # Submitit hides all devices.
        devices = ",".join(share_out(self._devices, slot, self.jobs)) or os.environ.get("CUDA_VISIBLE_DEVICES")
        # Runs that differ only in their seed are one program.
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._folder.compiled))
        return threads | {"JAX_COMPILATION_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": devices}


class Slurm(_Submissions):
    """Submits all runs to a cluster at once, as one array; has the methods of `Local`.

    The settings are partition, time (minutes), cpus, gpus, mem, and other options of sbatch.
    """

    launcher = "slurm"
    poll_interval = 1.0
    detached = True

    def __init__(self, folder: Path, jobs: int | None, settings: Mapping[str, str]):
        super().__init__(folder, jobs)
        try:
            self._executor = self._submitit.SlurmExecutor(self._folder.jobs / self.launcher, max_num_timeout=TIMEOUTS)
        except RuntimeError as error:
            raise SweepError("launcher", str(error)) from None
        self._executor.update_parameters(job_name="sparsejax", stderr_to_stdout=True, time=SLURM_MINUTES)
        if jobs is not None:
            self._executor.update_parameters(array_parallelism=jobs)
        self._configure(settings)
        self._queue: dict[str, str] = {}
        self._called = self._answered = -SQUEUE_PATIENCE

    def launch(self, waiting: Sequence[Attempt], live: Sequence[Attempt]) -> list[Attempt]:
        if not waiting:
            return []
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(attempt.job) for attempt in waiting]
        except Exception as error:  # sbatch's messages come in several classes
            raise SweepError("launcher", f"slurm: {error}") from error
        for attempt, job in zip(waiting, jobs, strict=True):
            self._record(attempt, job.job_id)
        self._called = -SQUEUE_PATIENCE
        return list(waiting)

    def find(self, attempt: Attempt) -> bool:
        attempt.id = _read_submission(attempt, self.launcher).get("job")
        return attempt.id in self._states() or attempt.job.files.held()

    def started(self, attempt: Attempt) -> bool:
        return self._states().get(attempt.id or "") == "RUNNING"

    def ended(self, attempt: Attempt) -> bool:
        # From Slurm's queue: submitit asks sacct, which many clusters lack.
        return attempt.id not in self._states() and not attempt.job.files.held()

    def stop(self, attempt: Attempt) -> None:
        state = self._states().get(attempt.id or "")
        if state is None or attempt.asked or (state == "RUNNING" and attempt.job.files.process() is None):
            return  # it has ended, was asked, or has only just started
        options = ["--signal=TERM"] if state == "RUNNING" else []
        attempt.asked = subprocess.run(["scancel", *options, str(attempt.id)], capture_output=True).returncode == 0

    def _states(self) -> dict[str, str]:
        """The state of each queued or running job of the user."""
        now = time.monotonic()
        if now - self._called < SQUEUE_INTERVAL:
            return self._queue
        self._called = now
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            self._queue, self._answered = dict(map(str.split, answer.stdout.splitlines())), now
        elif now - self._answered > SQUEUE_PATIENCE:
            raise SweepError("launcher", f"slurm: {answer.stderr}; jobs continue, and the same command finds them")
        return self._queue

    def _configure(self, settings: Mapping[str, str]) -> None:
        """Passes settings to submitit, and those that it does not know to sbatch."""
        others: dict[str, int | str] = {}
        for key, text in settings.items():
            value = int(text) if text.isdigit() else text
            if key == "time" and not isinstance(value, int):
                raise SweepError("slurm.time", f"needs minutes, got {text!r}")
            try:
                self._executor.update_parameters(**{SLURM_NAMES.get(key, key): value})
            except ValueError:
                others[key] = value
        if others:
            self._executor.update_parameters(additional_parameters=others)


Executor = Local | Slurm


def build_executor(folder: Path, jobs: int | None, slurm: Mapping[str, str] | None) -> Executor:
    """Returns the executor of this machine, or of Slurm if it has settings."""
    return Local(folder, jobs) if slurm is None else Slurm(folder, jobs, slurm)


def build_job(run: Run, folder: Path) -> Job:
    """Returns the job of a run, whose files are in the sweep's `jobs` and not in the workdir."""
    return Job(run.command(folder), SweepFolder(folder).job(run.name), run.workdir(folder).result)


def _import_submitit() -> Any:
    level = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # its own logging configuration would disable all other loggers
    try:
        import submitit
    except ImportError:
        raise SweepError("launcher", "needs submitit; pip install 'sparsejax[launch]'") from None
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]
        os.environ |= {} if level is None else {"SUBMITIT_LOG_LEVEL": level}
    return submitit


def _read_submission(attempt: Attempt, launcher: str | None = None) -> dict[str, Any]:
    """The last submission of a run, if it was to this launcher: ids of another one mean other jobs here."""
    file = attempt.job.files.submission
    submission = read_json(file, SUBMISSION) if file.exists() else {}
    return submission if launcher in (None, submission.get("launcher")) else {}
