"""Layers of a sequence model, as thin Flax NNX modules."""

from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.conv import Conv, ConvConfig, ShortConv
from sparsejax.layers.delta import Delta, DeltaConfig
from sparsejax.layers.experts import Experts, ExpertsConfig
from sparsejax.layers.latent import IndexerConfig, Latent, LatentConfig
from sparsejax.layers.layer import FEEDFORWARDS, FeedForwardConfig, Layer, LayerConfig, Losses, ResidualConfig
from sparsejax.layers.lightning import Lightning, LightningConfig
from sparsejax.layers.lsh import Lsh, LshConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mamba2 import Mamba2, Mamba2Config
from sparsejax.layers.mixers import MIXERS, BranchConfig, MixerConfig, Parallel, ParallelConfig
from sparsejax.layers.mlp import ACTIVATIONS, Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.rglru import RgLru, RgLruConfig
from sparsejax.layers.rotary import RopeConfig, RopeScaling, yarn_growth
from sparsejax.layers.shared import Shared, SharedConfig, Side, SideConfig
from sparsejax.layers.stream import EMPTY, Context, Cost, Dropout, Linear, Stream, parameter

__all__ = [
    "ACTIVATIONS",
    "FEEDFORWARDS",
    "MIXERS",
    "EMPTY",
    "Attention",
    "AttentionConfig",
    "BranchConfig",
    "Context",
    "Conv",
    "ConvConfig",
    "Cost",
    "Delta",
    "DeltaConfig",
    "Dropout",
    "Experts",
    "ExpertsConfig",
    "FeedForwardConfig",
    "IndexerConfig",
    "Latent",
    "LatentConfig",
    "Layer",
    "LayerConfig",
    "Lightning",
    "LightningConfig",
    "Linear",
    "Losses",
    "Lsh",
    "LshConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MixerConfig",
    "Mlp",
    "MlpConfig",
    "Norm",
    "NormConfig",
    "Parallel",
    "ParallelConfig",
    "ResidualConfig",
    "RgLru",
    "RgLruConfig",
    "RopeConfig",
    "RopeScaling",
    "Shared",
    "SharedConfig",
    "ShortConv",
    "Side",
    "SideConfig",
    "Stream",
    "parameter",
    "yarn_growth",
]
