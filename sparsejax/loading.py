"""Loading of trained models: the workdirs of this project and folders of Hugging Face."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import extensions, sharding
from sparsejax.buckets import read_workdir
from sparsejax.config import Config, ModelConfig, ModelSource
from sparsejax.data.tokenizers import Tokenizer, read_tokenizer, recorded_tokenizer
from sparsejax.errors import InputError, argument_path
from sparsejax.loaded import LoadedModel, Parameters, Source, set_dtype
from sparsejax.metrics import EVAL_LOSS
from sparsejax.model import Functional
from sparsejax.runs import CheckpointError, plan_phases
from sparsejax.runs.checkpoint import compare_checksums, describe_damage, list_steps, read_meta
from sparsejax.runs.lora import LowRank, adapt
from sparsejax.workdir import SweepFolder, Workdir, read_json, read_rows

Step = int | Literal["last", "best"]


@dataclasses.dataclass
class RunSource(Source):
    """The workdir from which a model was loaded.

    Attributes:
      workdir: Its files.
    """

    workdir: Workdir | None = None

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of the run from its workdir.

        Raises:
          InputError: The run has no text, or its workdir does not hold the tokenizer.
        """
        assert self.run is not None and self.workdir is not None  # noqa: PT018
        if self.run.data.task != "text":
            raise InputError("data.task", f"the probe {self.run.data.task} has no tokenizer; use token ids")
        return recorded_tokenizer(self.workdir, self.run.data.tokenizer)


def load(
    path: str | Path,
    *,
    step: Step | None = None,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    ema: bool = False,
    **options: Any,
) -> LoadedModel:
    """Loads a model: a checkpoint of a workdir, or a Hugging Face folder.

    Args:
      path: A workdir, or a folder with config.json and safetensors.
      step: Step of the checkpoint of a workdir: a step that is kept, "last" (the default), or "best", that of the least
        evaluation loss.
      tokenizer: For a Hugging Face folder: "bytes", or a file, instead of the tokenizer of the folder.
      mesh: Shards the parameters over this mesh; by default they are on one device.
      dtype: "float32" or "bfloat16", in which the model computes and keeps linear maps and embeddings. By default, a
        workdir computes in the dtype of its run and a Hugging Face folder in float32, both with float32 parameters.
      ema: Load the exponential moving average of the parameters of a run with `optimizer.ema`.
      **options: Options of a Hugging Face family, see `sparsejax.interop.huggingface.load`.

    Raises:
      InputError: The folder is neither, a workdir has no checkpoint or not that of the step, or a file is damaged.
    """
    every = "all" if step not in (None, "last") else "newest"
    workdir = Workdir(read_workdir(path, checkpoints=every))
    if not workdir.path.is_dir():
        raise InputError("path", f"no folder {str(path)!r}")
    if SweepFolder(workdir.path).exists():
        raise InputError("path", f"{path} is a sweep; load one of its runs, {SweepFolder(workdir.path).runs}/NAME")
    recorded = read_json(workdir.config) if workdir.exists() else {}
    if {"model_type", "ssm_cfg"} & set(recorded):  # the original Mamba has no `model_type`
        if ema:
            raise InputError("ema", f"{path} is a Hugging Face folder, which has no averages")
        from sparsejax.interop import huggingface  # needs safetensors

        if step is not None:
            raise InputError("step", f"{step}: {path} is a Hugging Face folder, which has no steps")
        return huggingface.load(path, tokenizer=tokenizer, mesh=mesh, dtype=dtype, **options)
    if not {"model", "train"} <= set(recorded):
        raise InputError("path", f"{path} is neither a workdir nor a Hugging Face folder")
    if tokenizer is not None:
        options = {"tokenizer": tokenizer} | options
    if options:
        raise InputError(next(iter(options)), "not an option of a workdir")
    return _load_workdir(workdir, recorded, "last" if step is None else step, mesh, dtype, ema)


def load_source(source: ModelSource, *, mesh: Mesh | None = None, dtype: str | None = None) -> LoadedModel:
    """Loads the model of a source, see `load`.

    Raises:
      InputError: As `load`; or a workdir is named as a Hugging Face folder, or the reverse.
    """
    step = None if source.kind == "hf" else source.step
    model = load(source.path, step=step, mesh=mesh, dtype=dtype)
    if source.kind == "hf" and model.source.run is not None:
        raise InputError("source", f"{source}: is a workdir; write run:{source.path}")
    return model


def read_model(source: ModelSource, length: int) -> ModelConfig:
    """Returns the model of a source for sequences of `length` tokens; reads no parameter.

    Raises:
      InputError: As `load_source`.
    """
    if source.kind == "run":
        return open_checkpoint(source).run.model
    from sparsejax.interop import huggingface  # needs safetensors

    if not source.exists():
        raise InputError("source", f"{source}: no folder {source.path!r}")
    return huggingface.describe(source.path, length)[0]


def read_teacher(config: Config) -> ModelConfig | None:
    """Returns the model of the teacher of a run or a phase; None if no loss depends on it. Reads no parameter.

    Raises:
      InputError: There is no such model.
    """
    section = config.train.active_teacher
    if section is None:
        return None
    with argument_path("train.teacher"):
        return read_model(ModelSource.parse(section.source), config.data.length)


def read_run(path: str | Path) -> Config:
    """Returns the configuration of the last phase of the run in a workdir.

    Raises:
      InputError: The folder is not the workdir of a run.
    """
    workdir = Workdir(read_workdir(path))
    if not workdir.exists():
        raise InputError("path", f"{path} is not the workdir of a run")
    return _read_run(workdir, read_json(workdir.config))


def _read_run(workdir: Workdir, recorded: dict[str, Any]) -> Config:
    extensions.restore(workdir)
    return plan_phases(ConfigDict(configs.complete(recorded)))[-1].config


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, whose parameters are read on demand.

    Attributes:
      run: Configuration of the last phase of the run, with the model of the checkpoint.
      step: Its step.
      folder: Its folder.
      item: Folder in it, and key of the parameters there.
    """

    run: Config
    step: int
    folder: Path
    item: tuple[str, str]

    def read(self, shapes: Parameters) -> Parameters:
        """Reads parameters, and not the optimizer.

        Args:
          shapes: Shape, dtype and sharding of each parameter, or of some of them.

        Raises:
          CheckpointError: The checkpoint is damaged.
        """
        name, key = self.item
        expected = {key: shapes}
        arguments = functools.partial(
            ocp.args.PyTreeRestore, restore_args=ocp.checkpoint_utils.construct_restore_args(expected)
        )
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                arrays = checkpointer.restore(
                    (self.folder / name).absolute(), args=arguments(expected, partial_restore=True)
                )
        except Exception as error:
            raise CheckpointError(self.folder, describe_damage(error)) from error
        return arrays[key]


def open_checkpoint(source: ModelSource) -> RunCheckpoint:
    """Opens the checkpoint of a source `run:WORKDIR`.

    Raises:
      InputError: The folder is not the workdir of a run, has no checkpoint or not that of the step, or is damaged.
    """
    every = "newest" if source.step == "last" else "all"
    workdir = Workdir(read_workdir(source.path, checkpoints=every))
    recorded = read_json(workdir.config) if workdir.exists() else {}
    if not {"model", "train"} <= set(recorded):
        raise InputError("source", f"{source}: {source.path} is not the workdir of a run")
    return _open_checkpoint(workdir, _read_run(workdir, recorded), source.step, ema=False)


def _open_checkpoint(workdir: Workdir, run: Config, step: Step, ema: bool) -> RunCheckpoint:
    averages = ema or run.optimizer.name == "schedule_free_adamw"
    item = "averages" if averages else "state", "ema" if ema else "parameters"
    number = _choose_step(workdir, step)
    folder = workdir.checkpoints / str(number)
    # A run that resumed with another `model.scan` has checkpoints of the old layout until the next save.
    saved = plan_phases(ConfigDict(configs.complete(read_meta(folder)["config"])))[-1].config
    compare_checksums(folder)
    return RunCheckpoint(dataclasses.replace(run, model=saved.model), number, folder, item)


def _load_workdir(
    workdir: Workdir, recorded: dict[str, Any], step: Step, mesh: Mesh | None, dtype: str | None, ema: bool
) -> LoadedModel:
    run = _read_run(workdir, recorded)
    if ema and run.optimizer.ema is None:
        raise InputError("ema", f"{workdir.path} has no average of its parameters; train with optimizer.ema")
    while True:
        try:
            checkpoint = _open_checkpoint(workdir, run, step, ema)
            config = set_dtype(checkpoint.run.model, dtype)
            model = adapt(Functional(config), run.optimizer)
            parameters = checkpoint.read(_shapes_on(model, mesh, dtype or "float32"))
        except CheckpointError as error:
            if Path(error.argument or "").exists():
                raise
            continue  # the run, which is training, has replaced it by a newer one
        if isinstance(model, LowRank):
            shapes = _shapes_on(model.base, mesh, dtype or "float32")
            merged = jax.jit(model.merge)(parameters)
            parameters = jax.tree.map(
                lambda x, leaf: jax.device_put(x.astype(leaf.dtype), leaf.sharding), merged, shapes
            )
        source = RunSource(
            kind="the model",
            length=run.data.length,
            step=checkpoint.step,
            run=checkpoint.run,
            data=dataclasses.asdict(run.data),
            tokenizer_data=read_tokenizer(workdir),
            workdir=workdir,
        )
        return LoadedModel(config, parameters, source)


def _choose_step(workdir: Workdir, step: Step) -> int:
    """Returns the step of a checkpoint that exists."""
    steps = list_steps(workdir.checkpoints)
    if not steps:
        raise InputError("path", f"{workdir.path} has no checkpoint yet")
    if step == "last":
        return steps[-1]
    if step == "best":
        losses = {row["step"]: row[EVAL_LOSS] for row in read_rows(workdir.metrics) if row.get(EVAL_LOSS) is not None}
        evaluated = [number for number in steps if number in losses]
        if not evaluated:
            raise InputError("step", f"best: no checkpoint of {workdir.path} has been evaluated; use last")
        return min(evaluated, key=losses.__getitem__)
    if step not in steps:
        kept = ", ".join(map(str, steps))
        raise InputError("step", f"{step}: {workdir.path} has no such checkpoint; it has {kept}")
    return int(step)


def _shapes_on(model: Functional, mesh: Mesh | None, dtype: str) -> Parameters:
    """Returns shape, dtype and sharding per parameter, in the dtypes of `Functional.shapes_in`.

    Args:
      model: The model.
      mesh: The mesh; None for one device.
      dtype: Dtype of linear maps and embeddings.
    """
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.shapes)
    else:
        shardings = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        model.shapes_in(dtype),
        shardings,
    )
