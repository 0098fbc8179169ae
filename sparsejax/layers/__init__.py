"""Layers of a sequence model, as thin Flax NNX modules."""

from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.layer import MIXERS, Layer, LayerConfig, MixerConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.stream import NOTHING, Context, Cost, Linear, Stream, parameter

__all__ = [
    "MIXERS",
    "NOTHING",
    "Attention",
    "AttentionConfig",
    "Context",
    "Cost",
    "Layer",
    "LayerConfig",
    "Linear",
    "Mamba",
    "MambaConfig",
    "MixerConfig",
    "Mlp",
    "MlpConfig",
    "Norm",
    "NormConfig",
    "Stream",
    "parameter",
]
