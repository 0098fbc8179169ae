"""Hugging Face checkpoints: a folder of config.json and safetensors, as a model of this project and back.

A model family is one module in `families`: it translates a config.json into a `ModelConfig` and maps tensors to
parameters. A config.json is converted exactly or rejected: an unknown key or value is an error that names it.
"""

from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.export import Exported, export
from sparsejax.interop.huggingface.pretrained import (
    HuggingFaceSource,
    describe,
    load,
    open_parameters,
    read_config,
    save,
    to_tensors,
)

__all__ = [
    "ConversionError",
    "Exported",
    "HuggingFaceSource",
    "describe",
    "export",
    "load",
    "open_parameters",
    "read_config",
    "save",
    "to_tensors",
]
