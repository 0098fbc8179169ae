"""Hugging Face checkpoints: a folder of config.json and safetensors, as a model of this project and back.

A family of models is one file in `families`: it translates a config.json into a `ModelConfig` and says which tensors
hold which parameters. Whatever in a config.json is not understood is refused by name; nothing is loaded approximately.
"""

from sparsejax.interop.huggingface.checkpoint import CheckpointError
from sparsejax.interop.huggingface.pretrained import Pretrained, describe, load, read_config, save

__all__ = ["CheckpointError", "Pretrained", "describe", "load", "read_config", "save"]
