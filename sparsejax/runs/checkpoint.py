"""Checkpoints: state, data iterator and metadata, saved as one step by Orbax, completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array

from sparsejax import sharding
from sparsejax.config import CheckpointConfig
from sparsejax.data import BatchIterator
from sparsejax.errors import InputError
from sparsejax.records import parse_json
from sparsejax.runs.optimizer import averaged_parameters, find_ema, is_averaging
from sparsejax.runs.state import TrainState
from sparsejax.workdir import read_json, write_json

# A save needs this multiple of the size of the arrays, plus a margin for many small files.
SIZE_FACTOR = 1.2
SIZE_MARGIN = 2**20  # bytes
CHECKSUMS = "checksums.json"  # CRC-32 by file, in the folder of a checkpoint
REMEDY = "delete the folder of the step to resume from the previous checkpoint"


class CheckpointError(InputError):
    """A checkpoint that cannot be written or read, or does not fit the configuration."""


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      state: The state.
      metrics: Training metrics of its step, if a row of them follows the checkpoint; else None.
    """

    state: TrainState[Array]
    metrics: dict[str, float] | None


class Checkpoints:
    """The checkpoints of a run in a folder; a context manager that waits for the last save.

    The `keep_last` newest checkpoints are kept, and the `keep_best` best. A checkpoint is saved before its loss is
    known, so that those that are not kept are deleted before the next save, and at the end.

    Args:
      folder: The folder.
      config: Numbers of checkpoints to keep.
      meta: Saved with every checkpoint.
      losses: Evaluation losses of earlier checkpoints by step, None for a loss that is not finite.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        meta: dict[str, Any],
        losses: Mapping[int, float | None] | None = None,
    ):
        self.folder, self.meta = folder, meta
        self._config, self._losses = config, dict(losses or {})
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            # Else threads wait for a folder that cannot be made, and the process does not end for minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=self._write_checksums
            ),
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "averages": ocp.StandardCheckpointHandler(),
            # Batches do not depend on the number of processes, so that one iterator state serves any number of them.
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        with _report_failure(folder):
            self._manager = ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        with _report_failure(self.folder):
            try:
                self._prune()
            finally:
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState[Array], iterator: BatchIterator, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts a save in the background, after the previous one has finished; a step is saved once.

        Args:
          state: The state; its buffers may be donated at once.
          iterator: The data iterator.
          metrics: Training metrics of the step, if a row of them follows.

        Raises:
          CheckpointError: This checkpoint or the previous one cannot be written.
        """
        step, arrays = int(state.step), _to_arrays(state)
        if step in self._manager.all_steps():
            return
        averages = _average(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            **({"averages": ocp.args.StandardSave(averages)} if averages else {}),
            data=ocp.args.JsonSave(_gather_readers(dict(iterator.get_state()))),
            meta=ocp.args.JsonSave(self.meta | {"metrics": None if metrics is None else dict(metrics)}),
        )
        with _report_failure(self.folder):
            self._prune()
            _require_space(self.folder, sum(leaf.nbytes for leaf in jax.tree.leaves((arrays, averages))))
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Waits for the last save; raises CheckpointError if it failed."""
        with _report_failure(self.folder):
            self._manager.wait_until_finished()

    def rank(self, step: int, loss: float | None) -> None:
        """Sets the evaluation loss of a checkpoint; `keep_best` ignores checkpoints without one."""
        self._losses[step] = loss

    def _write_checksums(self) -> None:
        """Writes the checksums of the checkpoint whose files are complete, before it gets its name."""
        for folder in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            write_json(folder / CHECKSUMS, _checksums(folder))

    def _prune(self) -> None:
        """Waits for the last save, and deletes the checkpoints that are not kept."""
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        ranked = sorted((_rank(self._losses[step]), -step) for step in steps if step in self._losses)
        kept = {*steps[-self._config.keep_last :], *(-step for _, step in ranked[: self._config.keep_best])}
        for step in steps:
            if step not in kept:
                self._manager.delete(step)

    def restore(self, shapes: TrainState[jax.ShapeDtypeStruct], iterator: BatchIterator) -> Restored:
        """Restores the newest state with the shardings of `shapes`, and the position of `iterator`.

        Raises:
          CheckpointError: The checkpoint is damaged, does not fit `shapes`, or was trained on another text.
        """
        step = self.latest
        path = self.folder / str(step)
        expected = _to_arrays(shapes)
        meta = read_meta(path)
        try:
            saved = self._manager.item_metadata(step)["state"].tree
            difference = _find_difference(saved, expected)
        except Exception as error:
            raise _damaged(path, error) from error
        if difference:
            raise CheckpointError(path, f"does not fit the configuration: {difference}")
        if meta["corpus"] != self.meta["corpus"]:
            raise CheckpointError(
                "data.files",
                f"the digest of the text is {self.meta['corpus']}, but that of the text of {path} is {meta['corpus']}",
            )
        compare_checksums(path)
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(expected), data=ocp.args.JsonRestore()),
            )
            iterator.set_state(items["data"])
        except Exception as error:
            raise _damaged(path, error) from error
        return Restored(_from_arrays(items["state"]), meta.get("metrics"))


def list_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder of checkpoints, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint by path, such as `parameters.embedding`."""
    compare_checksums(folder / str(step))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / str(step) / "state").absolute())
    return {_join(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads what the checkpoint in a folder holds besides its state; raises CheckpointError if it is damaged."""
    try:
        return parse_json((folder / "meta" / "metadata").read_bytes(), folder, {"config": dict, "corpus": str})
    except (OSError, InputError) as error:
        raise _damaged(folder, error) from error


def read_iterator(folder: Path, step: int) -> dict[str, Any]:
    """Reads the state of the data iterator of a checkpoint."""
    compare_checksums(folder / str(step))
    return json.loads((folder / str(step) / "data" / "metadata").read_text())


def compare_checksums(folder: Path) -> None:
    """Compares the files of a checkpoint with their checksums; checkpoints of older versions have none.

    Arrays are compressed without a checksum, so that a damaged byte could otherwise change a number unnoticed.

    Raises:
      CheckpointError: A file is missing, unknown or damaged.
    """
    if not (folder / CHECKSUMS).exists():
        return
    try:
        recorded, actual = read_json(folder / CHECKSUMS, {...: int}), _checksums(folder)
    except (OSError, InputError) as error:  # such as a folder that a run replaces
        raise CheckpointError(folder, describe_damage(error)) from error
    for name in [*recorded, *actual]:
        if recorded.get(name) != actual.get(name):
            raise CheckpointError(folder, f"damaged checkpoint: {name} differs from {CHECKSUMS}; {REMEDY}")


def _checksums(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.glob("*/**/*") if path.is_file())  # the library changes files beside them
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in paths}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _rank(loss: float | None) -> float:
    """Returns the sort key of a loss; one that is not finite is the worst."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


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
        "losses": state.losses,
        "key": data,
        "parameters": state.parameters,
        "optimizer": state.optimizer,
    }


def _gather_readers(state: dict[str, Any]) -> dict[str, Any]:
    """Adds to the state of a stream the readers of other processes, so that any number of processes can resume."""
    if "readers" in state:
        for other in sharding.gather(state["readers"]):
            state["readers"] = other | state["readers"]
    return state


def _average(state: TrainState[Array]) -> dict[str, Any]:
    """Returns the averages of parameters that a reader of the checkpoint needs beside the state, if there are any.

    They are functions of the state, but without them a reader would have to know and restore the optimizer.
    """
    if is_averaging(state.optimizer):
        return {"parameters": jax.jit(averaged_parameters)(state.optimizer, state.parameters)}
    ema = find_ema(state.optimizer)
    return {} if ema is None else {"ema": ema}


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
    return f"damaged checkpoint ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return "".join(str(error).strip().splitlines()[:1])[:200]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(path, f"{describe_damage(error)}; {REMEDY}")


def _require_space(folder: Path, size: int) -> None:
    needed, free = SIZE_FACTOR * size + SIZE_MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            folder,
            f"no space left on the disk of the workdir: a checkpoint needs {needed / 2**20:.1f} MiB,"
            f" {free / 2**20:.1f} MiB is free",
        )


@contextlib.contextmanager
def _report_failure(folder: Path) -> Iterator[None]:
    """Turns an error in a save, which any library and any thread can raise, into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        stated = re.search(r"os_error_code='(\d+)'", str(error))  # by TensorStore
        code = int(stated[1]) if stated else getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(folder, "no space left on the disk of the workdir") from error
        reason = os.strerror(code) if code else f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(folder, f"cannot write a checkpoint: {reason}") from error
