"""Loading of trained models: the workdirs of this project and folders of Hugging Face."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import extensions, sharding
from sparsejax.buckets import read_workdir
from sparsejax.config import Config
from sparsejax.data.tokenizers import Tokenizer, recorded_tokenizer
from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel, Parameters
from sparsejax.model import Functional
from sparsejax.train import CheckpointError, plan_phases
from sparsejax.train.checkpoint import describe_damage, list_steps, read_meta
from sparsejax.workdir import SweepFolder, Workdir, read_json


class TrainedModel(LoadedModel):
    """The model of a workdir; `model(input_ids)` returns logits.

    Attributes:
      run: The configuration of the last phase of the run.
      step: The step of the checkpoint.
    """

    def __init__(self, run: Config, step: int, parameters: Parameters, workdir: Workdir):
        super().__init__(run.model, parameters)
        self.run, self.step, self._workdir = run, step, workdir

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, from its workdir: `encode(text: bytes)` and `decode(tokens)`.

        Raises:
          InputError: The run has no text, or its workdir does not hold the tokenizer.
        """
        if self.run.data.task != "text":
            raise InputError("data.task", f"the probe {self.run.data.task} has no tokenizer")
        return recorded_tokenizer(self._workdir, self.run.data.tokenizer)


def load(path: str | Path, *, mesh: Mesh | None = None, **options: Any) -> LoadedModel:
    """Loads a model: the newest checkpoint of a workdir, or a Hugging Face folder, to compute in float32.

    Args:
      path: A workdir, or a folder with config.json and safetensors.
      mesh: Shards the parameters over this mesh; by default they are on one device.
      **options: Options of a Hugging Face family, see `sparsejax.interop.huggingface.load`.

    Returns:
      A `TrainedModel`, or a `sparsejax.interop.huggingface.Pretrained`.

    Raises:
      InputError: The folder is neither, a workdir has no checkpoint, or a file is damaged.
    """
    workdir = Workdir(read_workdir(path, checkpoints=True))
    if not workdir.path.is_dir():
        raise InputError("path", f"no folder {str(path)!r}")
    if SweepFolder(workdir.path).exists():
        raise InputError("path", f"{path} is a sweep; load one of its runs, {SweepFolder(workdir.path).runs}/NAME")
    recorded = read_json(workdir.config) if workdir.exists() else {}
    if "model_type" in recorded:
        from sparsejax.interop import huggingface  # needs safetensors

        return huggingface.load(path, mesh=mesh, **options)
    if not {"model", "train"} <= set(recorded):
        raise InputError("path", f"{path} is neither a workdir nor a Hugging Face folder")
    if options:
        raise InputError(next(iter(options)), "not an option of a workdir")
    return _load_workdir(workdir, recorded, mesh)


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


def _load_workdir(workdir: Workdir, recorded: dict[str, Any], mesh: Mesh | None) -> TrainedModel:
    run = _read_run(workdir, recorded)
    while steps := list_steps(workdir.checkpoints):
        folder = workdir.checkpoints / str(steps[-1])
        try:
            # A run that resumed with another `model.scan` has checkpoints of the old layout until the next save.
            saved = plan_phases(ConfigDict(configs.complete(read_meta(folder)["config"])))[-1].config
            parameters = _read_parameters(folder, Functional(saved.model), mesh)
        except CheckpointError:
            if folder.exists():
                raise
            continue  # the run, which is training, has replaced it by a newer one
        return TrainedModel(dataclasses.replace(run, model=saved.model), steps[-1], parameters, workdir)
    raise InputError("path", f"{workdir.path} has no checkpoint yet")


def _read_parameters(folder: Path, model: Functional, mesh: Mesh | None) -> Parameters:
    """Reads the parameters of a checkpoint, and not its optimizer."""
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.shapes)
    else:
        shardings = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    shapes = jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        model.shapes,
        shardings,
    )
    item = {"parameters": shapes}
    arguments = functools.partial(
        ocp.args.PyTreeRestore, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = checkpointer.restore((folder / "state").absolute(), args=arguments(item, partial_restore=True))
    except Exception as error:
        raise CheckpointError(folder, describe_damage(error)) from error
    return state["parameters"]
