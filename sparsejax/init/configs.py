"""Configurations of runs that start from a trained model: `hf:FOLDER` and `run:WORKDIR`."""

from __future__ import annotations

from typing import Any

from sparsejax import extensions
from sparsejax.config import ModelConfig, ModelSource, build, complete, to_section
from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.workdir import Workdir, read_json

LENGTH = 1024  # most tokens per window by default
SAMPLE = 200  # most tokens of text to generate at the end by default


def get_config(source: ModelSource) -> dict[str, Any]:
    """Returns the configuration of a run that starts from a model and has its architecture and tokenizer.

    That of `run:WORKDIR` is the configuration of the run, without phases. That of `hf:FOLDER` has the model of
    config.json, which computes in float32, windows of its length up to `LENGTH` tokens, the objective "masked" for an
    encoder, and a learning rate for fine-tuning.

    Raises:
      InputError: There is no such folder, or config.json is damaged or not supported.
    """
    return _extend_run(source) if source.kind == "run" else _describe_folder(source)


def _extend_run(source: ModelSource) -> dict[str, Any]:
    workdir = Workdir(local_path(source.path, "source"))
    recorded = read_json(workdir.config) if workdir.exists() else {}
    if not {"model", "data", "train"} <= set(recorded):
        problem = f"{source}: {source.path} is not the workdir of a run"
        raise InputError("source", f"{problem}; write hf:{source.path}" if recorded else problem)
    extensions.restore(workdir)
    config = complete(recorded)
    tokenizer = source.find_tokenizer()
    data = config["data"] if tokenizer is None else config["data"] | {"tokenizer": tokenizer}
    train = config["train"] | {"phases": {}}
    return config | {"data": data, "train": train, "init": {"source": str(source)}}


def _describe_folder(source: ModelSource) -> dict[str, Any]:
    from sparsejax.interop import huggingface  # needs safetensors

    if not source.exists():
        raise InputError("source", f"{source}: no folder {source.path!r}")
    if Workdir(local_path(source.path)).schedule.exists():
        raise InputError("source", f"{source}: is the workdir of a run; write run:{source.path}")
    _, longest = huggingface.describe(source.path)
    described, length = huggingface.describe(source.path, min(longest, LENGTH))
    model = to_section(described) | {"dtype": "float32"}
    built = build(ModelConfig, complete(model, ModelConfig))
    if built.connectivity != described.connectivity:  # such as a plan of random tiles
        raise InputError("source", f"{source}: a configuration cannot express the patterns of this model")
    data = {"task": "text", "files": "", "length": length, "objective": "causal" if described.causal else "masked"}
    tokenizer = source.find_tokenizer()
    optimizer = {"learning_rate": 1e-4, "final_rate": 0.1, "warmup": 50, "weight_decay": 0.1, "clip": 1.0}
    sample = min(length, SAMPLE) if described.causal else 0
    return {
        "model": model,
        "data": data if tokenizer is None else data | {"tokenizer": tokenizer},
        "train": {
            "steps": 450, "batch": 8, "accumulate": 1, "seed": 0, "log_every": 50, "bad_loss": "stop", "spike": 0.0
        },
        "optimizer": optimizer,
        "checkpoint": {"every": 150, "keep_last": 2, "keep_best": 1},
        "sharding": {"data": -1, "fsdp": 1, "tensor": 1},
        "eval": {"every": 150, "batch": 8, "batches": 8, "sample": sample},
        "init": {"source": str(source)},
    }  # fmt: skip
