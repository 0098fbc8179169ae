"""Histograms of gradients and activations by layer, computed on the device, apart from the training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from sparsejax import sharding
from sparsejax.config import TrainConfig
from sparsejax.inference.evaluation import DeviceBatch, read_context
from sparsejax.metrics import finite_or_none
from sparsejax.model import FOLDED, Functional
from sparsejax.runs.state import TrainState
from sparsejax.train.step import build_gradient
from sparsejax.train.teacher import Distillation
from sparsejax.workdir import Workdir, append_row

MAGNITUDES = 10.0 ** np.arange(-12, 4.5, 0.5)
EDGES = np.concatenate([-MAGNITUDES[::-1], MAGNITUDES])  # of the buckets, float64 [66]


class Sums(NamedTuple):
    """Sums over arrays on the device.

    Attributes:
      counts: Number of values in each bucket, int32 [67]: below `EDGES[0]`, from `EDGES[i - 1]` to `EDGES[i]`, and from
        `EDGES[-1]`. Values that are not finite are in no bucket.
      min: Smallest finite value.
      max: Largest finite value.
      sum: Sum of the finite values.
      squares: Sum of their squares.
      nonfinite: Number of values that are not finite.
    """

    counts: Int[Array, "*r n"]
    min: Float[Array, "*r"]
    max: Float[Array, "*r"]
    sum: Float[Array, "*r"]
    squares: Float[Array, "*r"]
    nonfinite: Int[Array, "*r"]

    def add(self, other: Sums) -> Sums:
        """Returns the sums over both."""
        added = jax.tree.map(jnp.add, self, other)
        return added._replace(min=jnp.minimum(self.min, other.min), max=jnp.maximum(self.max, other.max))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A histogram of an array; the fields are those of `Sums`."""

    counts: list[int]
    min: float
    max: float
    sum: float
    squares: float
    nonfinite: int

    @property
    def count(self) -> int:
        """Number of finite values."""
        return sum(self.counts)


Inspection = dict[str, Sums]


def measure(x: Array) -> Sums:
    """Returns the sums of an array of any shape."""
    x = x.astype(jnp.float32).reshape(-1)
    finite = jnp.isfinite(x)
    # Comparisons with every edge need neither a scatter nor a sort.
    above = jax.lax.map(lambda edge: (finite & (x >= edge)).sum(dtype=jnp.int32), jnp.asarray(EDGES, jnp.float32))
    bounds = jnp.concatenate([finite.sum(dtype=jnp.int32)[None], above, jnp.zeros(1, jnp.int32)])
    zeroed = jnp.where(finite, x, 0)
    return Sums(
        counts=bounds[:-1] - bounds[1:],
        min=jnp.where(finite, x, jnp.inf).min(),
        max=jnp.where(finite, x, -jnp.inf).max(),
        sum=zeroed.sum(),
        squares=jnp.square(zeroed).sum(),
        nonfinite=(~finite).sum(dtype=jnp.int32),
    )


def build_inspection(
    model: Functional,
    config: TrainConfig,
    mesh: Mesh,
    frozen: PyTree[bool],
    distillation: Distillation | None,
) -> Callable[..., Inspection]:
    """Compiles a function of state, batch and parameters of the teacher to the histograms of the step that follows.

    The arguments are those of `step.build_step`. Gradients are those before clipping, per group of parameters of a
    layer. Activations are those of the first microbatch without dropout.
    """
    differentiate = build_gradient(model, config, mesh, frozen, distillation)
    constrain = sharding.constrain_batch(mesh)

    def inspect(state: TrainState[Array], batch: DeviceBatch, teacher: dict[str, Any] | None = None) -> Inspection:
        key = jax.random.fold_in(state.key, state.step) if model.config.dropout else None
        _, gradient = differentiate(state.parameters, batch, key, teacher)
        rows = jax.tree.map(lambda x: x.reshape(-1, config.accumulate, *x.shape[1:])[:, 0], batch)
        context = read_context(rows).with_extras(traced=True)
        traces = model.bind(state.parameters).forward(rows["inputs"], context, constrain).traces
        sums: Inspection = {}
        for name, values in _gradients(model, gradient, frozen):
            sums[name] = sums[name].add(values) if name in sums else values
        for index, (layer, trace) in enumerate(zip(model.config.names, traces, strict=True)):
            for part, x in trace._asdict().items():
                if x is not None:
                    sums[f"activations/layer_{index}/{layer}/{part}"] = measure(x)
        return sums

    return jax.jit(inspect, out_shardings=sharding.replicated(mesh))


def _gradients(model: Functional, gradient: dict[str, Any], frozen: PyTree[bool]) -> Iterator[tuple[str, Sums]]:
    """The name of the group and the sums of every trained parameter, those of the period layer by layer."""
    fold, names = model.config.fold, model.config.names
    first = {"before": 0, "period": len(fold.before), "after": len(names) - len(fold.after)}
    leaves = jax.tree.leaves_with_path(gradient)
    for (path, x), keep in zip(leaves, jax.tree.leaves(frozen), strict=True):
        keys = [str(getattr(entry, "key", entry)) for entry in path]
        if keep:
            continue
        if keys[0] not in FOLDED:
            yield f"gradients/{keys[0]}", measure(x)
            continue
        start, group = first[keys[0]] + int(keys[1]), keys[2]
        if keys[0] != "period":
            yield f"gradients/layer_{start}/{names[start]}/{group}", measure(x)
            continue
        stacked = jax.lax.map(measure, x)
        for repetition in range(fold.repeats):
            index = start + repetition * len(fold.period)
            sums = jax.tree.map(lambda leaf, i=repetition: leaf[i], stacked)
            yield f"gradients/layer_{index}/{names[index]}/{group}", sums


def fetch(inspection: Inspection) -> dict[str, Histogram]:
    """Fetches histograms from the device."""
    histograms = {}
    for name, sums in jax.device_get(inspection).items():
        scalars = {key: value.item() for key, value in sums._asdict().items() if key != "counts"}
        histograms[name] = Histogram(sums.counts.tolist(), **scalars)
    return histograms


def append_histograms(workdir: Workdir, step: int, histograms: Mapping[str, Histogram]) -> None:
    """Appends the histograms of a step to the file of the workdir, with the edges of the buckets."""
    rows = {}
    for name, histogram in histograms.items():
        row = dataclasses.asdict(histogram)
        rows[name] = {"counts": row.pop("counts"), **finite_or_none(row)}
    append_row(workdir.histograms, {"step": step, "edges": EDGES.tolist(), "histograms": rows})
