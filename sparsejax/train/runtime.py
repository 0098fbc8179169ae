"""Phases and evaluation settings bound to the mesh: models, data and compiled functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from sparsejax import data, sharding
from sparsejax.config import ConfigError
from sparsejax.errors import InputError, argument_path
from sparsejax.inference.evaluation import (
    Evaluation,
    build_evaluation,
    build_measurement,
    evaluate_on,
    evaluate_sources,
    measure_on,
    shard_batch,
    share_rows,
)
from sparsejax.model import Functional
from sparsejax.runs.groups import find_frozen
from sparsejax.runs.lora import adapt
from sparsejax.runs.optimizer import averaged_parameters, build_optimizer, build_schedule, find_ema, is_averaging
from sparsejax.runs.phases import EvaluationSetting, Phase
from sparsejax.runs.state import TrainState, regroup_state
from sparsejax.train.histograms import Inspection, build_inspection
from sparsejax.train.step import Metrics, build_step
from sparsejax.train.teacher import Distillation, Teacher


class Evaluator:
    """The model and the validation data of a setting, with a compiled evaluation."""

    def __init__(self, setting: EvaluationSetting | Phase, dataset: data.Dataset, mesh: Mesh):
        self.setting, self.config, self.dataset, self._mesh = setting, setting.config, dataset, mesh
        self.base = Functional(self.config.model)  # without low-rank updates
        self.model = adapt(self.base, self.config.optimizer)
        self._build = functools.cache(functools.partial(build_evaluation, self.model, mesh))
        self._measure = build_measurement(self.model, mesh)
        self._average = jax.jit(averaged_parameters)

    def evaluate(self, state: TrainState[Array], limit: int, before_batch: Callable[[], None]) -> Evaluation:
        """Evaluates on at most `limit` validation batches; 0 is no limit. See `inference.evaluate`."""
        evaluation = self._evaluate_parameters(self.parameters(state), limit, before_batch)
        ema = find_ema(state.optimizer)
        return (
            evaluation if ema is None else evaluation._replace(ema=self._evaluate_parameters(ema, limit, before_batch))
        )

    def parameters(self, state: TrainState[Array]) -> dict[str, Any]:
        """Returns the parameters to evaluate: those of the state, or their averages by a schedule-free optimizer."""
        return self._average(state.optimizer, state.parameters) if is_averaging(state.optimizer) else state.parameters

    def _evaluate_parameters(
        self, parameters: dict[str, Any], limit: int, before_batch: Callable[[], None]
    ) -> Evaluation:
        rows = self.config.eval.batch

        def evaluate(dataset: data.Dataset) -> Evaluation:
            share = share_rows(self._mesh, rows)
            batches = dataset.validation_batches(rows, limit=limit, **share)
            run = self._build(dataset.scores_accuracy)
            evaluation = evaluate_on(self._mesh, run, parameters, batches, before_batch)
            if not self.config.model.measures_selections:
                return evaluation
            batches = dataset.validation_batches(rows, limit=1, **share)
            return evaluation._replace(selections=measure_on(self._mesh, self._measure, parameters, batches))

        return evaluate_sources(self.dataset, evaluate)


class PhaseRuntime(Evaluator):
    """A phase of a run of `steps` steps: an evaluator that also has training data and a compiled step."""

    def __init__(self, phase: Phase, steps: int, dataset: data.Dataset, mesh: Mesh, teacher: Teacher | None = None):
        super().__init__(phase, dataset, mesh)
        self.phase = phase
        self.distillation = None if teacher is None else _distil(phase, teacher)
        self._teacher = None if self.distillation is None or teacher is None else teacher.model.parameters
        arguments = phase, steps, self.model, mesh
        self.optimizer, self._step = build_phase_step(
            *arguments, distillation=self.distillation, ends_row=self.logs_after
        )
        frozen = find_frozen(self.config.optimizer, self.model.shapes)
        self._inspect = build_inspection(self.model, self.config.train, mesh, frozen, self.distillation)

    def enter(self, state: TrainState[Array], previous: PhaseRuntime) -> TrainState[Array]:
        """Returns the state at the end of the previous phase with the groups of the optimizer of this one."""
        old, new = previous.config.optimizer, self.config.optimizer
        if (old.freeze, old.groups) == (new.freeze, new.groups):
            return state
        return regroup_state(state, self.model, self.optimizer, self._mesh)

    def train_batches(self) -> data.BatchIterator:
        """Iterates over this process's share of the training batches, from the first of the phase."""
        rows = self.config.train.batch
        return self.dataset.train_batches(rows, self.phase.seed, **share_rows(self._mesh, rows))

    def step(self, state: TrainState[Array], batch: data.Batch) -> tuple[TrainState[Array], Metrics]:
        """Takes a training step; donates the buffers of `state`."""
        with jax.set_mesh(self._mesh):
            return self._step(state, shard_batch(batch, self._mesh), self._teacher)

    def inspect(self, state: TrainState[Array], batch: data.Batch) -> Inspection:
        """Returns histograms of the gradients and activations of the step that follows."""
        with jax.set_mesh(self._mesh):
            return self._inspect(state, shard_batch(batch, self._mesh), self._teacher)

    def inspects(self, step: int) -> bool:
        """Whether histograms of `step` are due."""
        return self.config.train.histograms > 0 and step % self.config.train.histograms == 0

    def logs_after(self, step: Any) -> Any:
        """Whether a row of metrics follows `step`, an integer or an array. A row also follows a loss that diverged."""
        return (step % self.config.train.log_every == 0) | self.evaluates_after(step)

    def evaluates_after(self, step: Any) -> Any:
        """Whether an evaluation follows `step`, an integer or an array."""
        return (step == self.phase.stop) | (step % self.config.eval.every == 0)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows `step`."""
        return step == self.phase.stop or step % self.config.checkpoint.every == 0

    def is_due(self, step: int) -> bool:
        """Whether an evaluation or a checkpoint follows `step`."""
        return self.evaluates_after(step) or self.saves_after(step)


def build_phase_step(
    phase: Phase, steps: int, model: Functional, mesh: Mesh | AbstractMesh, **options: Any
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """Returns the optimizer and the training step of a phase.

    Args:
      phase: The phase.
      steps: Steps of the whole run.
      model: The model of the phase, with its low-rank updates.
      mesh: The mesh.
      options: Other arguments of `build_step`.
    """
    config, rate = phase.config, (phase.config.optimizer, steps, phase.restart)
    optimizer = build_optimizer(*rate, decay=model.decay, axes=model.axes)
    options |= {"first": phase.start, "frozen": find_frozen(config.optimizer, model.shapes)}
    return optimizer, build_step(model, optimizer, build_schedule(*rate), config.train, mesh, **options)


def set_up(
    phases: Sequence[Phase],
    evaluations: Sequence[EvaluationSetting],
    mesh: Mesh,
    recorded: bytes | None = None,
    teacher: Teacher | None = None,
) -> tuple[list[PhaseRuntime], list[Evaluator]]:
    """Binds phases and evaluation settings to the mesh. They share one text, which is read once.

    Args:
      phases: The phases of the run.
      evaluations: The evaluation settings.
      mesh: The mesh.
      recorded: Content of the tokenizer's file in the workdir, see `load_tokenizer`.
      teacher: The teacher of the phases in which a weight of `train.teacher` is above 0.

    Raises:
      ConfigError, DataError: A setting does not fit the mesh, the text, the model or the teacher.
    """
    settings: list[Phase | EvaluationSetting] = [*phases, *evaluations]
    for setting in settings:
        require_even_shards(setting, mesh)
    datasets: list[data.Dataset] = []
    for setting in settings:
        loaded = datasets[-1] if datasets else None
        datasets.append(data.load_dataset(setting.config.data, setting.config.eval.stride, loaded, recorded=recorded))
        _require_vocabulary(setting, datasets[-1])
    steps = phases[-1].stop
    return (
        [PhaseRuntime(phase, steps, dataset, mesh, teacher) for phase, dataset in zip(phases, datasets, strict=False)],
        [Evaluator(*pair, mesh) for pair in zip(evaluations, datasets[len(phases) :], strict=True)],
    )


def _distil(phase: Phase, teacher: Teacher) -> Distillation | None:
    """The losses of a phase with the teacher; None in a phase in which every weight is 0."""
    try:
        return teacher.distil(phase.config) if phase.config.train.active_teacher else None
    except ConfigError as error:
        raise _invalid(phase, error.argument or "", error.problem) from None


def require_even_shards(setting: Phase | EvaluationSetting, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if the devices of a mesh cannot have equal parts of a batch, or a mixer cannot be sharded."""
    config, shards = setting.config, sharding.batch_shards(mesh)
    for key, count, unit in (
        ("train.batch", config.train.batch // config.train.accumulate, "rows per microbatch"),
        ("eval.batch", config.eval.batch, "rows"),
    ):
        if count % shards:
            raise _invalid(setting, key, f"{count} {unit} cannot be split evenly over {shards} devices")
    try:
        with argument_path("data"):
            config.sharding.check_length(config.data.length)
        with argument_path("model"):
            config.model.check_sharded(config.data.length, config.sharding.sequence)
    except InputError as error:
        raise _invalid(setting, error.argument or "", error.problem) from None


def _require_vocabulary(setting: Phase | EvaluationSetting, dataset: data.Dataset) -> None:
    try:
        dataset.require_vocabulary(setting.config.model.vocab)
    except data.DataError as error:
        raise _invalid(setting, "model.vocab", error.problem) from None


def _invalid(setting: Phase | EvaluationSetting, key: str, problem: str) -> ConfigError:
    error = ConfigError(key, problem)
    return error.within(setting.key) if setting.key else error
