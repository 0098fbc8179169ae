"""Hugging Face checkpoints: a folder of config.json and safetensors, as a model of this project and back.

A model family is one module in `families`: it translates a config.json into a `ModelConfig` and maps tensors to
parameters. A config.json is converted exactly or rejected: an unknown key or value is an error that names it.
"""

from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.pretrained import HuggingFaceSource, describe, load, read_config, save, to_tensors

__all__ = ["ConversionError", "HuggingFaceSource", "describe", "load", "read_config", "save", "to_tensors"]
