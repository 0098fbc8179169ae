"""A phase on the mesh: its model, its data and its compiled functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from sparsejax import data, sharding
from sparsejax.config import ConfigError
from sparsejax.model import Functional
from sparsejax.train.evaluate import Evaluation, evaluate
from sparsejax.train.optimizer import build_optimizer, build_schedule
from sparsejax.train.phases import Phase
from sparsejax.train.state import TrainState
from sparsejax.train.step import Batch, build_evaluation, build_step


class Stage:
    """A phase on the mesh: its model, its data, and its own compiled functions."""

    def __init__(self, phase: Phase, steps: int, dataset: data.Dataset, mesh: Mesh):
        self.phase, self.config, self.dataset, self._mesh = phase, phase.config, dataset, mesh
        self.model = Functional(self.config.model)
        rate = self.config.optimizer, steps, phase.restart
        self.optimizer = build_optimizer(*rate)
        self._step = build_step(self.model, self.optimizer, build_schedule(*rate), self.config.train, mesh)
        self._evaluation = build_evaluation(self.model, mesh, dataset.answers)

    def train_batches(self) -> Iterator[data.Batch]:
        """Batches to train on, of each what this process reads, from the first of the phase on."""
        rows = self.config.train.batch
        return self.dataset.train_batches(rows, self.phase.seed, **share_rows(self._mesh, rows))

    def step(self, state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, Any]]:
        """One training step; it gives up its input state."""
        with jax.set_mesh(self._mesh):  # kernels are spread over it
            return self._step(state, place_batch(batch, self._mesh))

    def evaluate(self, state: TrainState, limit: int) -> Evaluation:
        """On so many batches of the rows held out; on all of them if there is no limit."""
        rows = self.config.eval.batch
        held_out = self.dataset.validation_batches(rows, limit=limit, **share_rows(self._mesh, rows))
        with jax.set_mesh(self._mesh):
            return evaluate(self._evaluation, state.parameters, (place_batch(batch, self._mesh) for batch in held_out))


def set_up(phases: list[Phase], mesh: Mesh) -> list[Stage]:
    """All phases on the mesh; the text is the same in all of them, and read once.

    Raises:
      ConfigError, DataError: something that a phase sets does not fit the mesh, the text or the model.
    """
    for phase in phases:
        _require_even_batches(phase, mesh)
    stages, corpus = [], None
    for phase in phases:
        dataset = data.load_dataset(phase.config.data, phase.config.eval.stride, corpus)
        corpus = dataset.corpus
        _require_vocabulary(phase, dataset)
        stages.append(Stage(phase, phases[-1].stop, dataset, mesh))
    return stages


def _require_even_batches(phase: Phase, mesh: Mesh) -> None:
    shards, train = sharding.batch_shards(mesh), phase.config.train
    part, rows = train.batch // train.accumulate, phase.config.eval.batch
    if part % shards:
        raise ConfigError(f"{phase.place}train.batch: a slice of {part} rows does not divide over {shards} devices")
    if rows % shards:
        raise ConfigError(f"{phase.place}eval.batch: {rows} rows do not divide over {shards} devices")


def _require_vocabulary(phase: Phase, dataset: data.Dataset) -> None:
    config = phase.config
    if config.model.vocab < dataset.vocab:
        why = config.data.task if dataset.corpus is None else f"data.tokenizer = {config.data.tokenizer!r}"
        why += f" with data.objective = {config.data.objective!r}" if config.data.objective != "causal" else ""
        raise ConfigError(f"{phase.place}model.vocab: is {config.model.vocab}, {why} needs {dataset.vocab}")


def share_rows(mesh: Mesh, rows: int) -> dict[str, int]:
    """Which rows of a batch this process reads."""
    index, count = sharding.own_rows(mesh, rows)
    return {"process_index": index, "process_count": count}


def place_batch(batch: data.Batch, mesh: Mesh) -> Batch:
    """The global batch on the mesh, from the rows that this process has read."""
    place = sharding.batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(place, rows) for name, rows in batch.items()}
