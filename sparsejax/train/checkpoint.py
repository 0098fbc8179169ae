"""Checkpoints: state, data iterator and metadata saved as one step, whole or not at all (Orbax)."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sparsejax.config import CheckpointConfig
from sparsejax.train.state import TrainState

METRIC = "eval/loss"
# Free space asked for before a save: the files are a little larger than the arrays, and many are small.
ROOM = 1.2
MARGIN = 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the configuration."""


class Checkpoints:
    """The checkpoints of one run, in `folder`, each with `meta`; a context manager that waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig, meta: dict[str, Any]):
        self.folder, self.meta = folder, meta
        keep = AnyPreservationPolicy(
            [
                LatestN(config.keep_last),
                BestN(
                    get_metric_fn=_rank,
                    reverse=True,
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        # best_fn: without it the metrics are not written, and a resumed run would delete the best checkpoint.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=_rank, best_mode="min", cleanup_tmp_directories=True
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            # Batches are a function of the step, so one state serves every process, however many there are.
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        _require_readable_metrics(folder)
        self._manager = ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        with _full_disk_named(self.folder):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: grain.DatasetIterator, loss: float | None) -> None:
        """Starts saving in the background; at most one save runs at a time. `loss` ranks it for keep_best.

        Raises:
          CheckpointError: the disk has too little room for another checkpoint.
        """
        step, state = int(state.step), _savable(state)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(iterator.get_state())),
            meta=ocp.args.JsonSave(self.meta),
        )
        with _full_disk_named(self.folder):
            self._manager.wait_until_finished()
            _require_room(self.folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(step, args=args, metrics=None if loss is None else {METRIC: loss})

    def restore(self, shapes: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest state, placed by the shardings of `shapes`; sets `iterator` to where it was.

        Raises:
          CheckpointError: the files are damaged, the state does not fit `shapes` (with the first parameter that
            differs), or it was trained on another text.
        """
        step = self.latest
        place = self.folder / str(step)
        wanted = _savable(shapes)
        try:
            saved = self._manager.item_metadata(step)["state"].tree
            problem = _first_difference(saved, wanted)
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            text, now = meta["corpus"], self.meta["corpus"]
        except Exception as error:
            raise CheckpointError(_damaged(place, error)) from error
        if problem:
            raise CheckpointError(f"checkpoint {place} does not fit this configuration: {problem}")
        if text != now:
            raise CheckpointError(
                f"data.files: not the text that checkpoint {place} was trained on: its digest was {text}, is {now}"
            )
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore()),
            )
            iterator.set_state(found["data"])
        except Exception as error:
            raise CheckpointError(_damaged(place, error)) from error
        return _restored(found["state"])


def list_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a `checkpoints` folder, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by path, such as `parameters.embedding`; each has the shape it was saved with."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / str(step) / "state").absolute())
    return {_path(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _require_readable_metrics(folder: Path) -> None:
    """Orbax reads those of all checkpoints when it opens them, and does not say which it could not read."""
    for file in folder.glob("*/metrics/metrics"):
        place = file.parents[1]
        try:
            if place.name.isdigit():
                _rank(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(_damaged(place, error)) from error


def _rank(metrics: dict[str, float]) -> float:
    """Lower is better; a loss that is not finite is the worst."""
    return metrics[METRIC] if math.isfinite(metrics[METRIC]) else math.inf


def _savable(state: TrainState) -> dict[str, Any]:
    """The state as plain nested dicts of arrays: keys as their data, optax's tuples by position."""
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    return {
        "step": state.step,
        "skipped": state.skipped,
        "loss_mean": state.loss_mean,
        "key": data,
        "parameters": state.parameters,
        "optimizer": state.optimizer,
    }


def _restored(saved: dict[str, Any]) -> TrainState:
    return TrainState(**{**saved, "key": jax.random.wrap_key_data(saved["key"])})


def _first_difference(saved: Any, wanted: Any) -> str | None:
    """The first array, by path, that only one side has or whose shape or dtype differs."""
    old, new = (
        {_path(path): (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    for path in [*new, *old]:
        if path not in old or path not in new:
            return f"{path} is only in the {'configuration' if path in new else 'checkpoint'}"
        if old[path] != new[path]:
            shown = (f"{dtype.name}{list(shape)}" for shape, dtype in (old[path], new[path]))
            return f"{path} is {next(shown)} in the checkpoint and {next(shown)} in the configuration"
    return None


def _path(path: tuple) -> str:
    names = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return ".".join(names)


def _damaged(place: Path, error: Exception) -> str:
    cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    return (
        f"checkpoint {place} is damaged ({type(error).__name__}: {cause}); delete that folder to go on from"
        " the one before it"
    )


def _require_room(folder: Path, size: int) -> None:
    needed, free = ROOM * size + MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space left on the workdir's disk: a checkpoint needs {needed / 2**20:.1f} MiB, {folder} has"
            f" {free / 2**20:.1f} MiB free"
        )


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Says a full disk in one line, whatever library runs into it, and in whichever thread."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise CheckpointError(f"no space left on the workdir's disk: saving to {folder} failed") from error
        raise
