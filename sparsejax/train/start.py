"""The start of a run: its workdir, its records and its state."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from sparsejax import buckets, extensions, sharding
from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.data import BatchIterator
from sparsejax.data.tokenizers import write_tokenizer
from sparsejax.errors import InputError
from sparsejax.init.plan import Plan, plan
from sparsejax.metrics import EVAL_LOSS
from sparsejax.model import Functional
from sparsejax.paths import bucket_address, local_path
from sparsejax.runs.checkpoint import Checkpoints, list_steps, read_meta
from sparsejax.runs.lora import adapt
from sparsejax.runs.optimizer import build_optimizer, build_schedule
from sparsejax.runs.phases import plan_phases
from sparsejax.runs.state import TrainState, init_state, restack_state, state_shapes
from sparsejax.train.runtime import PhaseRuntime
from sparsejax.train.writers import describe_versions
from sparsejax.workdir import LOCK_TIMEOUT, PART, Workdir, busy, is_held, read_json, read_rows, write_json

STEPS = "train.steps"


def read_recorded(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the configuration that a run recorded in a workdir of this machine; None if there is none."""
    files = None if bucket_address(workdir, "workdir") else Workdir(local_path(workdir, "workdir"))
    return read_json(files.config) if files is not None and files.exists() else None


def find_changes(workdir: Path, settings: ConfigDict) -> list[configs.Change]:
    """Returns the keys in which a run differs from the run of a workdir; none for a workdir that does not exist."""
    files = Workdir(workdir)
    if not files.exists():
        return []
    return configs.find_changes(configs.complete(read_json(files.config)), configs.complete(_resolve(settings)))


def find_change(workdir: Path, settings: ConfigDict, extend: bool = False) -> ConfigError | None:
    """Returns the error about the first change with which the run of a workdir cannot resume, if there is one.

    Args:
      workdir: The workdir.
      settings: The configuration of the run.
      extend: Whether the run may have more steps than before.
    """
    return _find_refused(workdir, find_changes(workdir, settings), settings, extend)


def _find_refused(
    workdir: Path, changes: Sequence[configs.Change], settings: ConfigDict, extend: bool
) -> ConfigError | None:
    for change in changes:
        if change.effect is not None:
            continue
        if change.key != STEPS or change.new < change.old:
            keys = ", ".join(configs.resumable_keys())
            problem = f"{workdir} belongs to another configuration: {change}; undo it, or use another workdir; a resume"
            return ConfigError("workdir", f"{problem} can change {keys}, and add steps with extend")
        if not extend:
            schedule = settings.optimizer.get("schedule", "cosine")
            effect = f"whose learning rate then follows the {schedule} schedule over {change.new} steps"
            return ConfigError("extend", f"{change} in {workdir}; extend the run, {effect}, or use another workdir")
    return None


def check_workdir(workdir: Workdir, settings: ConfigDict, extend: bool = False) -> None:
    """Checks that a workdir is new or belongs to the same run, and that no process works on it; changes nothing.

    Raises:
      ConfigError: The workdir belongs to another run, or is a folder of something else.
      InputError: A process works on the run.
    """
    if error := find_change(workdir.path, settings, extend):
        raise error
    if not workdir.exists() and workdir.path.exists():
        others = (path for path in workdir.path.iterdir() if path.suffix != PART and path != workdir.lock)
        if any(others):
            raise ConfigError("workdir", f"{workdir.path} is not empty and has no {workdir.config.name}")
    # A process may look only when the coordinator does not hold the lock yet.
    if sharding.from_coordinator(sharding.is_coordinator() and is_held(workdir.lock, LOCK_TIMEOUT)):
        raise busy(workdir.lock, workdir.path)


def _check_same_text(workdir: Workdir, runtime: PhaseRuntime) -> None:
    if not list_steps(workdir.checkpoints) or not workdir.data.exists():
        return
    recorded, digest = read_json(workdir.data).get("digest"), runtime.dataset.digest
    if recorded not in (None, digest):
        raise ConfigError(
            "data.files", f"the digest of the text is {digest}, but {workdir.path} is trained on {recorded}"
        )


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[tuple[Path, buckets.Uploads]]:
    """As `buckets.open_workdir`; several processes need a folder that all of them see."""
    if jax.process_count() > 1 and bucket_address(path, "workdir"):
        raise InputError("workdir", f"{path}: several processes cannot share a bucket; use a folder that all can write")
    with buckets.open_workdir(path) as opened:
        yield opened


@contextlib.contextmanager
def hold(workdir: Workdir) -> Iterator[None]:
    """Holds the lock of a run in the coordinator; raises InputError in all processes if it is held."""
    with contextlib.ExitStack() as stack:
        problem = None
        if sharding.is_coordinator():
            try:
                stack.enter_context(workdir.hold())
            except InputError as error:
                problem = error.problem
        if problem := sharding.from_coordinator(problem):
            raise InputError("workdir", problem)
        yield


def read_losses(workdir: Workdir, runtimes: Sequence[PhaseRuntime]) -> dict[int, float | None]:
    """Returns the evaluation loss of each step at which a checkpoint is due."""
    losses: dict[int, float | None] = {}
    for row in read_rows(workdir.metrics) if sharding.is_coordinator() else []:
        step = int(row["step"])
        if EVAL_LOSS in row and any(runtime.phase.contains(step) and runtime.saves_after(step) for runtime in runtimes):
            losses[step] = row[EVAL_LOSS]
    return dict(sharding.from_coordinator(list(losses.items())))


def claim_workdir(
    workdir: Workdir, settings: ConfigDict, runtimes: Sequence[PhaseRuntime], extend: bool = False
) -> list[configs.Change]:
    """Records the configuration, the schedule, the tokenizer and the data in a workdir that is held.

    Returns:
      The changes since the last start.

    Raises:
      ConfigError: As `check_workdir`; another process may have written it since. Or the text is another one.
    """
    changes = find_changes(workdir.path, settings)
    if error := _find_refused(workdir.path, changes, settings, extend):
        raise error
    _check_same_text(workdir, runtimes[0])
    if not sharding.is_coordinator():
        return changes
    if any(change.key == STEPS for change in changes):
        workdir.result.unlink(missing_ok=True)  # the run has not ended
    write_json(workdir.config, _resolve(settings))
    extensions.record(workdir)
    names = runtimes[0].config.model.names
    workdir.schedule.write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    write_tokenizer(workdir, runtimes[0].dataset.tokenizer)
    write_json(workdir.data, _count_data(runtimes))
    return changes


def describe_changes(changes: Sequence[configs.Change], runtime: PhaseRuntime, step: int) -> list[str]:
    """Describes each change with which a run resumes at `step`, in the phase of `runtime`."""
    lines = []
    for change in changes:
        effect = configs.EFFECTS.get(change.effect or "") or _describe_extension(runtime, change, step)
        lines.append(f"resuming with a change: {change}: {effect}")
    return lines


def _describe_extension(runtime: PhaseRuntime, change: configs.Change, step: int) -> str:
    """Describes the learning rates of the schedule over the new number of steps."""
    optimizer = runtime.config.optimizer
    if optimizer.schedule in configs.UNBOUNDED_SCHEDULES:
        stays = "stays constant" if optimizer.schedule == "constant" else f"follows {optimizer.schedule} as before"
        return f"the learning rate {stays}"
    old, new = (
        float(build_schedule(optimizer, steps, runtime.phase.restart)(step)) for steps in (change.old, change.new)
    )
    return (
        f"the {optimizer.schedule} schedule now ends at step {change.new}, so that the learning rate after step {step}"
        f" is {new:.3g} instead of {old:.3g}"
    )


def plan_init(runtime: PhaseRuntime, workdir: Workdir) -> Plan | None:
    """Plans where the parameters of a new run come from; None without a source, or for a run that resumes.

    Raises:
      InputError: See `init.plan.plan`.
    """
    config = runtime.config.init
    if config.source is None or sharding.from_coordinator(bool(list_steps(workdir.checkpoints))):
        return None
    return plan(config, runtime.base)


def start_state(
    runtimes: Sequence[PhaseRuntime],
    checkpoints: Checkpoints,
    mesh: Mesh,
    parameters: dict[str, Any] | None = None,
) -> tuple[TrainState[Array], BatchIterator, dict[str, float] | None]:
    """Returns the newest state, the batches that follow it, and the training metrics of its step, see `Restored`.

    Without a checkpoint they are those of a new run, which starts from `parameters` or at random.
    """
    first, latest = runtimes[0], checkpoints.latest
    if latest is None:
        state = init_state(first.model, first.optimizer, first.config.train.seed, mesh, parameters)
        return state, first.train_batches(), None
    # A checkpoint at the end of a phase holds the iterator of that phase, and the state of its optimizer.
    current = next(runtime for runtime in runtimes if latest <= runtime.phase.stop)
    batches = current.train_batches()
    recorded = plan_phases(ConfigDict(configs.complete(read_meta(checkpoints.folder / str(latest))["config"])))
    source = next(phase for phase in recorded if latest <= phase.stop).config
    if source.model.fold == current.config.model.fold:
        state, metrics = checkpoints.restore(state_shapes(current.model, current.optimizer, mesh), batches)
        return state, batches, metrics
    model = adapt(Functional(source.model), source.optimizer)
    optimizer = build_optimizer(source.optimizer, source.train.steps, decay=model.decay, axes=model.axes)
    state, metrics = checkpoints.restore(state_shapes(model, optimizer, mesh), batches)
    return restack_state(state, model, current.model, current.optimizer, mesh), batches, metrics


def record_versions(workdir: Workdir, changes: Sequence[configs.Change]) -> None:
    """Appends the software, the devices and the changes of this start, which can differ from those of earlier ones."""
    path, versions = workdir.versions, describe_versions()
    if changes:
        versions["changes"] = {change.key: [change.old, change.new] for change in changes}
    if registered := extensions.describe_versions():
        versions["extensions"] = registered
    write_json(path, [*(read_json(path) if path.exists() else []), versions])


def _resolve(settings: ConfigDict) -> dict[str, Any]:
    """Returns the configuration with the types of JSON."""
    return json.loads(json.dumps(settings.to_dict()))


def _count_data(runtimes: Sequence[PhaseRuntime]) -> dict[str, Any]:
    """Returns the counts of documents and tokens, and those of each phase."""
    phases = {runtime.phase.name: runtime.dataset.counts for runtime in runtimes if runtime.phase.name is not None}
    return runtimes[0].dataset.counts | ({"phases": phases} if phases else {})
