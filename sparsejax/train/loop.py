"""The training loop: effects around the pure step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array
from ml_collections import ConfigDict
from rich.console import Console

from sparsejax import config as configs
from sparsejax import extensions, sharding
from sparsejax.metrics import TRAIN, finite_or_none
from sparsejax.signals import Interrupted, StopSignals
from sparsejax.train import display, start
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.evaluate import Evaluation, describe, summarize
from sparsejax.train.phases import plan_evaluations, plan_phases
from sparsejax.train.progress import ProgressReport
from sparsejax.train.runtime import Evaluator, PhaseRuntime, set_up
from sparsejax.train.state import TrainState
from sparsejax.train.step import Metrics
from sparsejax.train.writers import Writers
from sparsejax.workdir import Workdir, write_json


class LossDiverged(Exception):
    """The loss diverged, and `train.bad_loss` is "stop". A checkpoint without the update was saved."""


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
    batches: grain.DatasetIterator
    checkpoints: Checkpoints
    writers: Writers
    progress: ProgressReport
    signals: StopSignals

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.runtimes[-1].phase.stop


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step, which are fetched from the device when they are first read."""

    step: int
    on_device: Metrics

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """The metrics by name, without the verdict."""
        metrics: dict[str, Any] = {**self.on_device}
        return {name: float(value) for name, value in metrics.items() if name != "diverged"}

    @functools.cached_property
    def diverged(self) -> bool:
        """Whether the loss diverged."""
        return bool(self.on_device["diverged"])


def train(settings: ConfigDict, workdir: Path, console: Console) -> Evaluation:
    """Trains to the last step, or resumes the run of `workdir`; returns the final evaluation.

    If several processes train together, the first writes the workdir, and all of them write the checkpoints.

    Raises:
      ConfigError, DataError, CheckpointError: Invalid input; no file has changed.
      Interrupted: A signal stopped the run after a checkpoint.
      LossDiverged: The loss diverged.
    """
    phases, evaluations = plan_phases(settings), plan_evaluations(settings)
    mesh, files = sharding.make_mesh(phases[0].config.sharding), Workdir(workdir)
    runtimes, evaluators = set_up(phases, evaluations, mesh)
    last = runtimes[-1]
    # From here on a signal is recorded: the exception that it would raise could be lost in a callback.
    with StopSignals() as signals:
        changed = extensions.find_changes(files)  # before the record is replaced
        start.claim_workdir(files, settings, runtimes)
        display.print_plan(runtimes, evaluators, mesh, console)
        meta = {"config": settings.to_dict(), "digest": configs.digest(settings), "corpus": runtimes[0].dataset.digest}
        with Checkpoints(files.checkpoints, phases[0].config.checkpoint, meta) as checkpoints:
            state, batches = start.start_state(runtimes, checkpoints, mesh)
            first_step = int(state.step)
            if checkpoints.latest is not None:
                display.print_lines(console, f"resuming {workdir} at step {first_step}")
                for source in changed:
                    display.print_lines(console, f"warning: {source} has changed since the run last started")
            if sharding.is_coordinator():
                start.record_versions(files)
            with (
                Writers(files, first_step, sharding.is_coordinator()) as writers,
                ProgressReport(console, first_step, phases[-1].stop) as progress,
            ):
                run = Run(files, runtimes, state, batches, checkpoints, writers, progress, signals)
                evaluation = _train_phases(run)
            if evaluation is None:  # the run had ended before
                evaluation = last.evaluate(run.state, last.config.eval.final)
        metrics = summarize(evaluation, last.dataset) | _evaluate_settings(evaluators, run, console)
        if sharding.is_coordinator():
            size = {"step": int(run.state.step), "parameters": last.model.size}
            write_json(files.result, size | finite_or_none(metrics))
    display.print_evaluation(evaluation, last.dataset, console)
    display.print_sample(last, run.state, console)
    return evaluation


def _train_phases(run: Run) -> Evaluation | None:
    """Trains to the last step; returns the evaluation there, or None if there was no step to take."""
    first_step, evaluation = int(run.state.step), None
    _stop(run, first_step, agree_on_signal(run.signals))
    for runtime in run.runtimes:
        if runtime.phase.start >= first_step:
            run.batches = runtime.train_batches()
        if runtime.phase.stop > first_step:
            evaluation = _train_phase(run, runtime)
    return evaluation


def _train_phase(run: Run, runtime: PhaseRuntime) -> Evaluation | None:
    """Trains to the end of a phase; returns the evaluation there."""
    first_step, train_config = int(run.state.step), runtime.config.train
    current: StepMetrics | None = None
    evaluation: Evaluation | None = None
    run.progress.begin(first_step, train_config.batch * runtime.config.data.length)
    for step in range(first_step + 1, runtime.phase.stop + 1):
        run.state, metrics = runtime.step(run.state, next(run.batches))
        run.progress.advance(step)
        previous, current = current, StepMetrics(step, metrics)
        _log(run, runtime, previous)  # a step late, so that the device does not wait for Python
        diverged = _has_diverged(runtime, previous)
        stopped_by = agree_on_signal(run.signals, exchange=step % train_config.log_every == 0)
        if runtime.is_due(step) or diverged or stopped_by:
            evaluation = _evaluate(run, runtime, step)
            _log(run, runtime, current, evaluation)
            diverged = diverged or _has_diverged(runtime, current)
            _save(run, runtime, step, evaluation, stops=diverged or stopped_by is not None)
            _stop(run, step, stopped_by if step < run.steps else None, diverged)
            current = None
    return evaluation


def _log(run: Run, runtime: PhaseRuntime, metrics: StepMetrics | None, evaluation: Evaluation | None = None) -> None:
    """Writes and prints the metrics of a step, if the step is due for it."""
    if metrics is None:
        return
    step, phase = metrics.step, runtime.phase
    if not (metrics.diverged or evaluation or step % runtime.config.train.log_every == 0 or step == run.steps):
        return
    values, note = metrics.values, ""
    row: dict[str, float | int] = {}
    if phase.name is not None:
        row, note = {"phase": phase.number}, f"phase {phase.name} | "
    row |= {f"{TRAIN}{name}": value for name, value in values.items()}
    note += f"loss {values['loss']:.4f} (mean {values['loss_mean']:.4f}) grad {values['grad_norm']:.2f}"
    if metrics.diverged:
        note += " | diverged, update skipped"
    if evaluation:
        summary = summarize(evaluation, runtime.dataset)
        row |= summary
        note += f" | validation {describe(summary)}"
    run.writers.write(step, row, run.progress.log(step, note))


def _has_diverged(runtime: PhaseRuntime, metrics: StepMetrics | None) -> bool:
    """Whether the run must stop because the loss of a step diverged."""
    return metrics is not None and metrics.diverged and runtime.config.train.bad_loss == "stop"


def _evaluate(run: Run, runtime: PhaseRuntime, step: int) -> Evaluation | None:
    """Evaluates the state, if the step is due for it."""
    if not runtime.evaluates_after(step):
        return None
    config = runtime.config.eval
    with run.progress.pause():
        return runtime.evaluate(run.state, config.final if step == run.steps else config.batches)


def _save(run: Run, runtime: PhaseRuntime, step: int, evaluation: Evaluation | None, stops: bool) -> None:
    """Saves a checkpoint, if the step is due for it or the run stops."""
    if stops or runtime.saves_after(step):
        run.checkpoints.save(run.state, run.batches, None if evaluation is None else evaluation.loss)


def _stop(run: Run, step: int, stopped_by: str | None, diverged: bool = False) -> None:
    """Raises the reason to stop, if there is one."""
    if diverged:
        raise LossDiverged(
            f"the loss diverged (not finite, or a spike) by step {step}, see {run.workdir.metrics.name}; step {step} is"
            " saved without that update; run the same command to resume"
        )
    if stopped_by:
        raise Interrupted(f"stopped by {stopped_by} at step {step}; run the same command to resume")


def _evaluate_settings(evaluators: Sequence[Evaluator], run: Run, console: Console) -> dict[str, float]:
    """Returns the metrics of the evaluations of `eval.also`, with the name of the evaluation as a suffix."""
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        if stopped_by := agree_on_signal(run.signals):
            raise Interrupted(f"stopped by {stopped_by} before the last evaluations; run the same command to resume")
        summary = summarize(evaluator.evaluate(run.state, evaluator.config.eval.final), evaluator.dataset)
        name = evaluator.setting.name
        display.print_lines(console, f"validation, {name}: {describe(summary)}")
        metrics |= {f"{metric}/{name}": value for metric, value in summary.items()}
    return metrics


def agree_on_signal(signals: StopSignals, exchange: bool = True) -> str | None:
    """Returns the stop signal that arrived, on which all processes that train together agree.

    Args:
      signals: The signals of this process.
      exchange: Whether the processes communicate; of several processes none stops without it.
    """
    if jax.process_count() == 1:
        return signals.received
    stops = exchange and multihost_utils.process_allgather(np.array(signals.received is not None)).any()
    return "a signal" if stops else None
