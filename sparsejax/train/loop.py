"""The training loop: effects around the pure step."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sparsejax import config as configs
from sparsejax import data, patterns, sharding
from sparsejax.config import Config, ConfigError
from sparsejax.decode import generate
from sparsejax.model import Functional
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.evaluate import Evaluation, describe, summarize
from sparsejax.train.phases import plan_evaluations, plan_phases
from sparsejax.train.progress import ProgressReport
from sparsejax.train.stage import Stage, set_up
from sparsejax.train.state import TrainState, init_state, state_shapes
from sparsejax.train.writers import RESULT, Writers, describe_versions, drop_infinite, write_json

PROMPT = 64  # tokens of validation text that the sample continues


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), saved a checkpoint and can be resumed."""


class BadLoss(Exception):
    """The loss was not finite or spiked, and the configuration says to stop."""


def train(settings: ConfigDict, workdir: Path, console: Console) -> Evaluation:
    """Trains to the last step, going on from what `workdir` holds; returns the final evaluation.

    Where several processes train together, the first of them writes the workdir and the others only its checkpoints.

    Raises:
      ConfigError, DataError, CheckpointError: something given cannot be used; nothing was changed.
      Interrupted: asked to stop; a checkpoint was saved.
      BadLoss: see there; a checkpoint was saved, its parameters are the last good ones.
    """
    phases, evaluations = plan_phases(settings), plan_evaluations(settings)
    mesh = sharding.make_mesh(phases[0].config.sharding)
    prepared = set_up([*phases, *evaluations], mesh)
    stages, others = prepared[: len(phases)], prepared[len(phases) :]
    first, last, config = stages[0], stages[-1], phases[0].config
    # From here on a signal is noted and not raised: an exception at just any place can be lost in a callback.
    with _StopSignals() as signals:
        _claim_workdir(workdir, settings, config)
        if sharding.leads():
            write_json(workdir / "data.json", _count_data(stages))
        _describe(stages, others, mesh, console)
        meta = {"config": settings.to_dict(), "digest": configs.digest(settings), "corpus": first.dataset.digest}
        with Checkpoints(workdir / "checkpoints", config.checkpoint, meta) as checkpoints:
            if checkpoints.latest is None:
                state, batches = init_state(first.model, first.optimizer, config.train.seed, mesh), None
            else:
                # That phase, or the one whose end it is: the checkpoint holds its iterator.
                batches = next(stage for stage in stages if checkpoints.latest <= stage.phase.stop).train_batches()
                state = checkpoints.restore(state_shapes(first.model, first.optimizer, mesh), batches)
                where = f"resuming {workdir} at step {int(state.step)}"
                console.print(where, highlight=False, markup=False, soft_wrap=True)
            if sharding.leads():
                _log_versions(workdir)
            state, final = _run(stages, state, batches, checkpoints, signals, workdir, console)
        found = summarize(final, last.dataset) | _evaluate_others(others, state, signals, console)
        if sharding.leads():
            size = {"step": int(state.step), "parameters": first.model.size}
            write_json(workdir / RESULT, size | drop_infinite(found))
    _show_evaluation(final, last.dataset, console)
    if config.eval.sample and last.dataset.generates:
        _show_sample(last.model, state, last.dataset, config.eval.sample, console)
    return final


def _run(stages, state, batches, checkpoints, signals, workdir, console):
    """The loop proper: from the given state to the last step; returns the last state and its evaluation."""
    start, steps, evaluation = int(state.step), stages[-1].phase.stop, None
    with (
        Writers(workdir, start, sharding.leads()) as writers,
        ProgressReport(console, start, steps) as progress,
    ):
        if stopped_by := signals.agreed(True):
            raise Interrupted(f"stopped by {stopped_by} at step {start}; the same command goes on from there")
        for stage in stages:
            if stage.phase.stop <= start:
                continue
            own = batches if stage.phase.start < start else stage.train_batches()
            record = _Recorder(stage, steps, writers, progress)
            state, evaluation = _run_phase(stage, steps, state, own, checkpoints, signals, record, progress)
    if evaluation is None:  # the run had ended before
        evaluation = stages[-1].evaluate(state, stages[-1].config.eval.final)
    return state, evaluation


def _run_phase(stage, steps, state, batches, checkpoints, signals, record, progress):
    """From the given state to the end of a phase of a run of so many steps."""
    config, start, stop_step = stage.config, int(state.step), stage.phase.stop
    evaluation, pending = None, None
    progress.begin(start, config.train.batch * config.data.length)
    for number in range(start + 1, stop_step + 1):
        state, metrics = stage.step(state, next(batches))
        progress.advance(number)
        # Metrics are read one step late, so that the device does not wait for Python.
        stop = record(*pending) if pending else False
        pending = number, metrics
        ends, last = number == stop_step, number == steps
        stopped_by = signals.agreed(number % config.train.log_every == 0)
        due = ends or number % config.eval.every == 0
        save = ends or number % config.checkpoint.every == 0
        if not (due or save or stop or stopped_by):
            continue
        evaluation = None
        if due:
            with progress.pause():
                evaluation = stage.evaluate(state, config.eval.final if last else config.eval.batches)
        stop = record(*pending, evaluation) or stop
        pending = None
        if save or stop or stopped_by:
            checkpoints.save(state, batches, evaluation and evaluation.loss)
        if stop:
            raise BadLoss(
                f"the loss went bad by step {number}: see metrics.jsonl; step {number} is saved without the bad"
                " update, and the same command goes on from there"
            )
        if stopped_by and not last:
            raise Interrupted(f"stopped by {stopped_by} at step {number}; the same command goes on from there")
    return state, evaluation


def _evaluate_others(others, state, signals, console):
    """The metrics of the evaluations of `eval.also`, each with the name of the evaluation behind it."""
    metrics = {}
    for stage in others:
        if stopped_by := signals.agreed(True):
            raise Interrupted(
                f"stopped by {stopped_by} before the last evaluations; the same command goes on from there"
            )
        found = summarize(stage.evaluate(state, stage.config.eval.final), stage.dataset)
        console.print(
            f"validation, {stage.phase.name}: {describe(found)}", highlight=False, markup=False, soft_wrap=True
        )
        metrics |= {f"{metric}/{stage.phase.name}": value for metric, value in found.items()}
    return metrics


class _Recorder:
    """Turns a step's metrics into a row, a line and a verdict: whether the run must stop for a bad loss."""

    def __init__(self, stage: Stage, steps: int, writers: Writers, progress: ProgressReport):
        self._stage, self._steps, self._writers, self._progress = stage, steps, writers, progress

    def __call__(self, number: int, metrics: dict[str, Any], evaluation: Evaluation | None = None) -> bool:
        values = {name: float(value) for name, value in metrics.items()}
        bad = bool(values.pop("bad"))
        config, phase = self._stage.config.train, self._stage.phase
        if not (bad or evaluation or number % config.log_every == 0 or number == self._steps):
            return False
        row = {} if phase.name is None else {"phase": phase.number}
        row |= {f"train/{name}": value for name, value in values.items()}
        note = "" if phase.name is None else f"phase {phase.name} | "
        note += f"loss {values['loss']:.4f} (mean {values['loss_mean']:.4f}) grad {values['grad_norm']:.2f}"
        if bad:
            note += " | BAD LOSS, update left out"
        if evaluation:
            found = summarize(evaluation, self._stage.dataset)
            row |= found
            note += f" | validation {describe(found)}"
        self._writers.write(number, row, self._progress.log(number, note))
        return bad and config.bad_loss == "stop"


class _StopSignals:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave; a second one acts at once."""

    received: str | None = None

    def __enter__(self) -> _StopSignals:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def agreed(self, ask: bool) -> str | None:
        """What was received; of several processes, by any of them, which they tell one another if they `ask`."""
        if jax.process_count() == 1:
            return self.received
        return (
            "a signal" if ask and multihost_utils.process_allgather(np.array(self.received is not None)).any() else None
        )

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def find_change(workdir: Path, settings: ConfigDict) -> str | None:
    """The first key in which a run differs from the one that a workdir belongs to, in words; None if in none.

    On which devices it runs is no part of what a run is (checkpoints restore onto any mesh), nor under which settings
    else it is evaluated at the end.
    """
    place = workdir / "config.json"
    if not place.exists():
        return None
    recorded, given = configs.complete(_read_json(place)), _resolve(settings)
    for one in (recorded, given):
        one.pop("sharding", None)
        one.get("eval", {}).pop("also", None)
    return configs.difference(recorded, given)


def _claim_workdir(workdir: Path, settings: ConfigDict, config: Config) -> None:
    """Makes the workdir this run's own, or finds that it is another's."""
    place = workdir / "config.json"
    if changed := find_change(workdir, settings):
        raise ConfigError(f"--workdir: {workdir} belongs to another configuration: {changed}")
    if not place.exists() and workdir.exists() and any(path.name != "config.json.part" for path in workdir.iterdir()):
        raise ConfigError(f"--workdir: {workdir} is not empty and holds no config.json")
    if not sharding.leads():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(place, _resolve(settings))
    (workdir / "schedule.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(config.model.names)))


def _resolve(settings: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON has it."""
    return json.loads(json.dumps(settings.to_dict()))


def _log_versions(workdir: Path) -> None:
    """Adds an entry to versions.json: a run may be resumed under others than it was started under."""
    log = workdir / "versions.json"
    write_json(log, [*(_read_json(log) if log.exists() else []), describe_versions()])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--workdir: {path} is damaged: {error}") from error


def _count_data(stages: list[Stage]) -> dict[str, Any]:
    """What went in and came out; with phases also that of each."""
    named = {stage.phase.name: stage.dataset.counts for stage in stages if stage.phase.name is not None}
    return stages[0].dataset.counts | ({"phases": named} if named else {})


def _describe(stages: list[Stage], others: list[Stage], mesh: Mesh, console: Console) -> None:
    axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
    model = stages[0].model
    lines = [
        *stages[0].dataset.describe(),
        f"model: {model.size:,} parameters, {len(model.config.names)} layers: {model.config.schedule}",
        f"mesh: {axes} on {mesh.devices.flat[0].device_kind}",
    ]
    for stage in stages:
        phase, config, where = stage.phase, stage.config, ""
        if phase.name is not None:
            given = ", ".join(phase.given) or "nothing set"
            lines.append(f"phase {phase.name}: steps {phase.start + 1:,} to {phase.stop:,}: {given}")
            where = f"phase {phase.name}: "
        lines += [f"warning: {where}{line}" for line in patterns.advise(config.model.sees, config.data.length)]
    lines += [f"evaluated also as {other.phase.name}: {', '.join(other.phase.given)}" for other in others]
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _show_evaluation(evaluation: Evaluation, dataset: data.Dataset, console: Console) -> None:
    scale = dataset.tokens_per_byte
    table = Table("position", "bits/token" if scale is None else "bits/byte", title="validation loss by position")
    for start, stop, bits in evaluation.position_bins():
        table.add_row(f"{start}-{stop - 1}", f"{bits * (scale or 1):.3f}")
    console.print(table)
    if evaluation.answers is not None and evaluation.answers.by_distance[:, 1:].any():
        table = Table("distance", "accuracy", title="accuracy by distance of the answer")
        for start, stop, accuracy in evaluation.answers.distance_bins():
            table.add_row(f"{start}-{stop - 1}", f"{accuracy:.4f}")
        console.print(table)
    unit = "bytes" if dataset.config.tokenizer == "bytes" and dataset.corpus is not None else "tokens"
    console.print(
        f"validation: {describe(summarize(evaluation, dataset))} over {evaluation.tokens:,} {unit}", highlight=False
    )


def _show_sample(model: Functional, state: TrainState, dataset: data.Dataset, length: int, console: Console) -> None:
    prompt = jnp.asarray(dataset.corpus.validation[:PROMPT], jnp.int32)[None]
    draws = jax.random.fold_in(state.key, state.step)
    tokens = jax.jit(lambda p, key: generate(model.bind(p), prompt, length, key))(state.parameters, draws)
    prompt, text = (dataset.tokenizer.decode(np.asarray(t)[0]) for t in (prompt, tokens))
    console.print("sample (the text before | was given):", highlight=False)
    console.print(f"{prompt}|{text}", highlight=False, markup=False, soft_wrap=True)
