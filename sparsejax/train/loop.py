"""The training loop: effects around the pure step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array
from ml_collections import ConfigDict
from rich.console import Console

from sparsejax import config as configs
from sparsejax import extensions, sharding
from sparsejax.buckets import Uploads
from sparsejax.data import BatchIterator
from sparsejax.data.tokenizers import read_tokenizer
from sparsejax.inference.evaluation import Evaluation, describe, summarize
from sparsejax.metrics import TRAIN, finite_or_none
from sparsejax.runs.checkpoint import Checkpoints
from sparsejax.runs.phases import plan_evaluations, plan_phases
from sparsejax.runs.state import TrainState
from sparsejax.signals import Interrupted, StopSignals
from sparsejax.train import display, start
from sparsejax.train.certify import ModelCheck
from sparsejax.train.histograms import fetch
from sparsejax.train.interruption import StopRequests
from sparsejax.train.loggers import require_packages
from sparsejax.train.profiler import Profiler
from sparsejax.train.progress import ProgressReport
from sparsejax.train.runtime import Evaluator, PhaseRuntime, set_up
from sparsejax.train.step import Metrics
from sparsejax.train.teacher import find_teacher
from sparsejax.train.writers import Writers
from sparsejax.workdir import Workdir, write_json


class LossDiverged(Exception):
    """The loss diverged more often than `train.bad_loss` allows, or the final evaluation is not finite.

    A checkpoint without the updates was saved.
    """


@dataclasses.dataclass
class Run:
    """A run in progress.

    Attributes:
      workdir: Its files.
      runtimes: Its phases.
      state: The newest state.
      batches: Batches of the phase in progress.
    """

    workdir: Workdir
    runtimes: Sequence[PhaseRuntime]
    state: TrainState[Array]
    batches: BatchIterator
    checkpoints: Checkpoints
    writers: Writers
    progress: ProgressReport
    profiler: Profiler
    requests: StopRequests
    uploads: Uploads

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.runtimes[-1].phase.stop


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step, which are fetched from the device when they are first read."""

    step: int
    on_device: Metrics | dict[str, Any]

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """The metrics by name, without the verdicts."""
        metrics = {**self.on_device, **self.on_device.get("details", {})}
        return {name: float(value) for name, value in metrics.items() if name not in ("details", "diverged", "stops")}

    @functools.cached_property
    def diverged(self) -> bool:
        """Whether the loss diverged."""
        return bool(self.on_device["diverged"])

    @functools.cached_property
    def stops(self) -> bool:
        """Whether the run must stop because the loss diverged."""
        return bool(self.on_device["stops"])


def train(settings: ConfigDict, workdir: str | os.PathLike[str], console: Console, extend: bool = False) -> Evaluation:
    """Trains to the last step, or resumes the run of `workdir`; returns the final evaluation.

    A run resumes with changes of the keys in `config.resumable_keys()`, each of which is printed and recorded. With
    `extend` it may also have more steps than before; the learning rate then follows the schedule over all of them.

    If several processes train together, the first writes the workdir, and all of them write the checkpoints.

    Raises:
      ConfigError, DataError, CheckpointError: Invalid input; no file has changed.
      InputError: Another process works on the workdir.
      Interrupted: A signal stopped the run after a checkpoint.
      LossDiverged: The loss diverged.
      CheckFailed: A model does not do what its config declares, see `train.check`; no checkpoint was saved since the
        start.
    """
    phases, evaluations = plan_phases(settings), plan_evaluations(settings)
    base = phases[0].config.train
    require_packages(base.loggers)
    mesh = sharding.make_mesh(phases[0].config.sharding)
    # From here on a signal is recorded: the exception that it would raise could be lost in a callback.
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        with signals.raising("before the first step"):
            path, uploads = stack.enter_context(start.open_workdir(workdir))
            files = Workdir(path)
            start.check_workdir(files, settings, extend)
            teacher = find_teacher(phases, files, mesh)
            runtimes, evaluators = set_up(phases, evaluations, mesh, read_tokenizer(files), teacher)
            init = start.plan_init(runtimes[0], files)
            stack.enter_context(start.hold(files))
            parameters = None if init is None else init.load(mesh, phases[0].config.train.seed)
        changed = extensions.find_changes(files)  # before the record is replaced
        changes = start.claim_workdir(files, settings, runtimes, extend)
        display.print_plan(runtimes, evaluators, mesh, console)
        if init is not None:
            display.print_lines(console, *init.describe())
        meta = {"config": settings.to_dict(), "digest": configs.digest(settings), "corpus": runtimes[0].dataset.digest}
        losses = start.read_losses(files, runtimes)
        checkpoints = stack.enter_context(Checkpoints(files.checkpoints, phases[0].config.checkpoint, meta, losses))
        remaining = [phase for phase in phases if phase.stop > (checkpoints.latest or 0)]
        check = stack.enter_context(ModelCheck(files, remaining, console))
        state, batches, metrics = start.start_state(runtimes, checkpoints, mesh, parameters)
        first_step = int(state.step)
        if checkpoints.latest is not None:
            current = next(runtime for runtime in runtimes if first_step <= runtime.phase.stop)
            effects = start.describe_changes(changes, current, first_step)
            display.print_lines(console, f"resuming {workdir} at step {first_step}", *effects)
            for source in changed:
                display.print_lines(console, f"warning: {source} has changed since the run last started")
        if sharding.is_coordinator():
            start.record_versions(files, changes)
            if init is not None:
                write_json(files.init, init.record)
            if teacher is not None:
                write_json(files.teacher, teacher.record)
        with (
            Writers(files, first_step, sharding.is_coordinator(), base.loggers, settings.to_dict()) as writers,
            ProgressReport(console, first_step, phases[-1].stop) as progress,
            Profiler(files, base.profile_steps) as profiler,
        ):
            requests = StopRequests(signals, check)
            run = Run(files, runtimes, state, batches, checkpoints, writers, progress, profiler, requests, uploads)
            evaluation = _train_phases(run, metrics)
        last = runtimes[-1]
        if not math.isfinite(evaluation.loss):
            raise LossDiverged(
                f"the loss of the final evaluation is {evaluation.loss}: the run has no {files.result.name}; see"
                f" {files.metrics.name}"
            )
        summary = summarize(evaluation, last.dataset) | _evaluate_settings(evaluators, run, console)
        checkpoints.wait()  # a run with a result has its last checkpoint
        if sharding.is_coordinator():
            size = {"step": int(run.state.step), "parameters": last.model.size}
            write_json(files.result, size | finite_or_none(summary))
    display.print_evaluation(evaluation, last.dataset, console)
    display.print_sample(last, run.state, console)
    return evaluation


def _train_phases(run: Run, metrics: dict[str, float] | None) -> Evaluation:
    """Trains to the last step; returns the evaluation there. `metrics` are those of the checkpoint."""
    first_step = int(run.state.step)
    run.requests.check(first_step, "start")
    evaluation = _write_missing_row(run, metrics)
    for previous, runtime in zip([None, *run.runtimes], run.runtimes, strict=False):
        if runtime.phase.start >= first_step:
            run.batches = runtime.train_batches()
            run.state = run.state if previous is None else runtime.enter(run.state, previous)
        if runtime.phase.stop > first_step:
            evaluation = _train_phase(run, runtime)
    if evaluation is None:  # the run had ended before
        last = run.runtimes[-1]
        evaluation = last.evaluate(
            run.state, last.config.eval.final, lambda: run.requests.check(first_step, "evaluation")
        )
    return evaluation


def _write_missing_row(run: Run, metrics: dict[str, float] | None) -> Evaluation | None:
    """Evaluates the state of a checkpoint whose row of metrics was not written; returns the evaluation, if it is due.

    A run that is killed or interrupted after a save and before the row of its step lacks it.
    """
    step = int(run.state.step)
    if metrics is None or sharding.from_coordinator(run.writers.last_step == step):
        return None
    runtime = next(runtime for runtime in run.runtimes if step <= runtime.phase.stop)
    evaluation = _evaluate(run, runtime, step)
    _write_row(run, runtime, StepMetrics(step, metrics), evaluation)
    return evaluation


def _train_phase(run: Run, runtime: PhaseRuntime) -> Evaluation | None:
    """Trains to the end of a phase; returns the evaluation there."""
    first_step, train_config = int(run.state.step), runtime.config.train
    current: StepMetrics | None = None
    evaluation: Evaluation | None = None
    run.progress.begin(first_step, train_config.batch * runtime.config.data.length)
    for step in range(first_step + 1, runtime.phase.stop + 1):
        with run.profiler.step(step) as traced:
            batch = next(run.batches)
            inspection = runtime.inspect(run.state, batch) if runtime.inspects(step) else None
            run.state, metrics = runtime.step(run.state, batch)
            traced.append(metrics)
        run.progress.advance(step)
        previous, current = current, StepMetrics(step, metrics)
        _log(run, runtime, previous)  # a step late, so that the device does not wait for Python
        if inspection is not None:  # after the row of the previous step, because W&B takes steps in order only
            run.writers.write_histograms(step, fetch(inspection))
        diverged = previous is not None and previous.stops
        stopped_by = run.requests.poll(f"phase {runtime.phase.number}")
        if runtime.is_due(step) or diverged or stopped_by:
            evaluation = _finish_step(run, runtime, current, diverged or current.stops, stopped_by)
            current = None
    return evaluation


def _finish_step(
    run: Run, runtime: PhaseRuntime, metrics: StepMetrics, diverged: bool, stopped_by: str | None
) -> Evaluation | None:
    """Saves, evaluates and logs a step, as far as they are due, in this order; raises the reason to stop, if any.

    The save comes first, so that a signal in the evaluation costs no training. The row, which depends on the
    evaluation, is written after it, if need be when the run resumes.
    """
    step, evaluation = metrics.step, None
    if not stopped_by and (diverged or runtime.saves_after(step)):
        stopped_by = run.requests.settle()
    if diverged or stopped_by or runtime.saves_after(step):
        _save(run, runtime, metrics)
    if not stopped_by:
        try:
            evaluation = _evaluate(run, runtime, step)
        except Interrupted:
            _save(run, runtime, metrics)
            raise
    if evaluation is not None or not runtime.evaluates_after(step):
        _log(run, runtime, metrics, evaluation)
    if diverged:
        raise LossDiverged(
            f"the loss diverged (not finite, or a spike) by step {step}, and {int(metrics.values['skipped'])} updates"
            f" were skipped, see {run.workdir.metrics.name}; step {step} is saved without them; run the same command to"
            " resume"
        )
    if stopped_by:
        raise Interrupted(f"stopped by {stopped_by} at step {step}; run the same command to resume")
    return evaluation


def _save(run: Run, runtime: PhaseRuntime, metrics: StepMetrics) -> None:
    """Saves a checkpoint, with the metrics of its step if a row of them follows."""
    row = None
    if _is_logged(runtime, metrics):
        row = metrics.values | {"diverged": metrics.diverged, "stops": metrics.stops}
    run.checkpoints.save(run.state, run.batches, row)
    run.uploads.request(metrics.step)


def _evaluate(run: Run, runtime: PhaseRuntime, step: int) -> Evaluation | None:
    """Evaluates the state, if the step is due for it."""
    if not runtime.evaluates_after(step):
        return None
    config = runtime.config.eval
    limit = config.final if step == run.steps else config.batches
    with run.progress.pause():
        evaluation = runtime.evaluate(run.state, limit, lambda: run.requests.check(step, "evaluation"))
    if runtime.saves_after(step):
        run.checkpoints.rank(step, evaluation.loss)
    return evaluation


def _log(run: Run, runtime: PhaseRuntime, metrics: StepMetrics | None, evaluation: Evaluation | None = None) -> None:
    """Writes and prints the metrics of a step, if the step is due for it."""
    if metrics is not None and _is_logged(runtime, metrics):
        _write_row(run, runtime, metrics, evaluation)


def _is_logged(runtime: PhaseRuntime, metrics: StepMetrics) -> bool:
    """Whether a row of metrics follows a step."""
    return bool(runtime.logs_after(metrics.step)) or metrics.diverged


def _write_row(run: Run, runtime: PhaseRuntime, metrics: StepMetrics, evaluation: Evaluation | None) -> None:
    """Writes and prints the metrics of a step."""
    values, note, phase = metrics.values, "", runtime.phase
    row: dict[str, float | int] = {}
    if phase.name is not None:
        row, note = {"phase": phase.number}, f"phase {phase.name} | "
    row |= {f"{TRAIN}{name}": value for name, value in values.items()}
    note += f"loss {display.format_losses(values, runtime.dataset)} | grad {values['grad_norm']:.2f}"
    if metrics.diverged:
        note += " | diverged, update skipped"
    if evaluation:
        summary = summarize(evaluation, runtime.dataset)
        row |= summary
        note += f" | validation {describe(summary)}"
    run.writers.write(metrics.step, row, run.progress.log(metrics.step, note))


def _evaluate_settings(evaluators: Sequence[Evaluator], run: Run, console: Console) -> dict[str, float]:
    """Returns the metrics of the evaluations of `eval.also`, with the name of the evaluation as a suffix."""
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        name = evaluator.setting.name
        check = functools.partial(run.requests.check, run.steps, f"evaluation {name}")
        summary = summarize(evaluator.evaluate(run.state, evaluator.config.eval.final, check), evaluator.dataset)
        display.print_lines(console, f"validation, {name}: {describe(summary)}")
        metrics |= {f"{metric}/{name}": value for metric, value in summary.items()}
    return metrics
