"""Checkpoints: state, data iterator and metadata, saved as one step by Orbax, completely or not at all."""

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
from jaxtyping import Array
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sparsejax.config import CheckpointConfig
from sparsejax.errors import InputError
from sparsejax.metrics import EVAL_LOSS, direction
from sparsejax.train.state import TrainState

RANKED_BY = EVAL_LOSS
BEST = direction(RANKED_BY)
# A save needs this multiple of the size of the arrays, plus a margin for many small files.
SIZE_FACTOR = 1.2
SIZE_MARGIN = 2**20  # bytes


class CheckpointError(InputError):
    """A checkpoint that cannot be written or read, or does not fit the configuration."""


class Checkpoints:
    """The checkpoints of a run in `folder`, each with `meta`; a context manager that waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig, meta: dict[str, Any]):
        self.folder, self.meta = folder, meta
        best = BestN(
            get_metric_fn=_rank, reverse=BEST == "min", n=config.keep_best, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(config.keep_last), best]),
            # Without best_fn Orbax does not write the metrics, and a resumed run would delete the best checkpoint.
            best_fn=_rank,
            best_mode=BEST,
            cleanup_tmp_directories=True,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            # Batches are a function of the step, so one iterator state serves any number of processes.
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        _require_readable_metrics(folder)
        self._manager = ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        with _report_full_disk(self.folder):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState[Array], iterator: grain.DatasetIterator, loss: float | None) -> None:
        """Starts a save in the background, after the previous one has finished.

        Args:
          state: The state; its buffers may be donated at once.
          iterator: The data iterator.
          loss: Evaluation loss, by which `keep_best` ranks checkpoints; None leaves the checkpoint out of the ranking.

        Raises:
          CheckpointError: The disk is full.
        """
        step, arrays = int(state.step), _to_arrays(state)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            data=ocp.args.JsonSave(dict(iterator.get_state())),
            meta=ocp.args.JsonSave(self.meta),
        )
        with _report_full_disk(self.folder):
            self._manager.wait_until_finished()
            _require_space(self.folder, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
            self._manager.save(step, args=args, metrics=None if loss is None else {RANKED_BY: loss})

    def restore(self, shapes: TrainState[jax.ShapeDtypeStruct], iterator: grain.DatasetIterator) -> TrainState[Array]:
        """Restores the newest state with the shardings of `shapes`, and the position of `iterator`.

        Raises:
          CheckpointError: The checkpoint is damaged, does not fit `shapes`, or was trained on another text.
        """
        step = self.latest
        path = self.folder / str(step)
        expected = _to_arrays(shapes)
        try:
            saved = self._manager.item_metadata(step)["state"].tree
            difference = _find_difference(saved, expected)
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            corpus = meta["corpus"]
        except Exception as error:
            raise _damaged(path, error) from error
        if difference:
            raise CheckpointError(path, f"does not fit the configuration: {difference}")
        if corpus != self.meta["corpus"]:
            raise CheckpointError(
                "data.files",
                f"the digest of the text is {self.meta['corpus']}, but that of the text of {path} is {corpus}",
            )
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(expected), data=ocp.args.JsonRestore()),
            )
            iterator.set_state(items["data"])
        except Exception as error:
            raise _damaged(path, error) from error
        return _from_arrays(items["state"])


def list_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder of checkpoints, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint by path, such as `parameters.embedding`."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / str(step) / "state").absolute())
    return {_join(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def read_iterator(folder: Path, step: int) -> dict[str, Any]:
    """Reads the state of the data iterator of a checkpoint."""
    return json.loads((folder / str(step) / "data" / "metadata").read_text())


def _require_readable_metrics(folder: Path) -> None:
    """Checks the metrics of all checkpoints, because Orbax reads them without naming a damaged file."""
    for file in folder.glob("*/metrics/metrics"):
        path = file.parents[1]
        try:
            if path.name.isdigit():
                _rank(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error


def _rank(metrics: dict[str, float]) -> float:
    """Returns the metric that ranks checkpoints; a value that is not finite is the worst."""
    value = metrics[RANKED_BY]
    return value if math.isfinite(value) else math.inf if BEST == "min" else -math.inf


def _to_arrays(state: TrainState[Any]) -> dict[str, Any]:
    """Returns the state as nested dicts of arrays, with the data of the PRNG key, as Orbax saves them."""
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


def _from_arrays(arrays: dict[str, Any]) -> TrainState[Array]:
    return TrainState(**{**arrays, "key": jax.random.wrap_key_data(arrays["key"])})


def _find_difference(saved: Any, expected: Any) -> str | None:
    """Describes the first array that only one side has or whose shape or dtype differs."""
    old, new = (
        {_join(path): (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (saved, expected)
    )
    for path in [*new, *old]:
        if path not in old or path not in new:
            return f"{path} is only in the {'configuration' if path in new else 'checkpoint'}"
        if old[path] != new[path]:
            was, now = (f"{dtype.name}{list(shape)}" for shape, dtype in (old[path], new[path]))
            return f"{path} is {was} in the checkpoint and {now} in the configuration"
    return None


def _join(path: tuple[Any, ...]) -> str:
    names = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return ".".join(names)


def describe_damage(error: Exception) -> str:
    """Describes the error of a library that cannot read a checkpoint, by the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"damaged checkpoint ({type(error).__name__}: {''.join(lines[:1])[:200]})"


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(path, f"{describe_damage(error)}; delete the folder to resume from the previous checkpoint")


def _require_space(folder: Path, size: int) -> None:
    needed, free = SIZE_FACTOR * size + SIZE_MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            folder,
            f"no space left on the disk of the workdir: a checkpoint needs {needed / 2**20:.1f} MiB,"
            f" {free / 2**20:.1f} MiB is free",
        )


@contextlib.contextmanager
def _report_full_disk(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk, which any library and any thread can raise, into a CheckpointError."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise CheckpointError(folder, "no space left on the disk of the workdir") from error
        raise
