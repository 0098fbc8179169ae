"""Layers of a sequence model, as thin Flax NNX modules."""

from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.compressed import Compressed, CompressedConfig, CompressionConfig, EntryIndexerConfig
from sparsejax.layers.context import EMPTY, Context, Dropout, Extras, Tokens
from sparsejax.layers.conv import Conv, ConvConfig, ShortConv
from sparsejax.layers.delta import Delta, DeltaConfig
from sparsejax.layers.experts import Experts, ExpertsConfig
from sparsejax.layers.hyper import HyperConfig
from sparsejax.layers.indexer import IndexerConfig
from sparsejax.layers.latent import Latent, LatentConfig
from sparsejax.layers.layer import FEEDFORWARDS, FeedForwardConfig, Layer, LayerConfig, ResidualConfig
from sparsejax.layers.lightning import Lightning, LightningConfig
from sparsejax.layers.lsh import Lsh, LshConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mamba2 import Mamba2, Mamba2Config
from sparsejax.layers.mixers import MIXERS, BranchConfig, Parallel, ParallelConfig, register
from sparsejax.layers.mlp import ACTIVATIONS, Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig, make_norm, normalize
from sparsejax.layers.nsa import Nsa, NsaConfig
from sparsejax.layers.protocols import INDEX_CACHES, Auxiliary, Cache, FeedForward, Mixer, MixerConfig, Trace
from sparsejax.layers.rglru import RgLru, RgLruConfig
from sparsejax.layers.rotary import RopeConfig, RopeScaling, yarn_growth
from sparsejax.layers.routing import Routing, RoutingConfig
from sparsejax.layers.select import SelectConfig
from sparsejax.layers.shared import Shared, SharedConfig, Side, SideConfig
from sparsejax.layers.stream import Cost, Linear, Stream, attention_cost, parameter

__all__ = [
    "ACTIVATIONS",
    "EMPTY",
    "FEEDFORWARDS",
    "INDEX_CACHES",
    "MIXERS",
    "Attention",
    "AttentionConfig",
    "Auxiliary",
    "BranchConfig",
    "Cache",
    "Compressed",
    "CompressedConfig",
    "CompressionConfig",
    "Context",
    "Conv",
    "ConvConfig",
    "Cost",
    "Delta",
    "DeltaConfig",
    "Dropout",
    "EntryIndexerConfig",
    "Experts",
    "ExpertsConfig",
    "Extras",
    "FeedForward",
    "FeedForwardConfig",
    "HyperConfig",
    "IndexerConfig",
    "Latent",
    "LatentConfig",
    "Layer",
    "LayerConfig",
    "Lightning",
    "LightningConfig",
    "Linear",
    "Lsh",
    "LshConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "Mlp",
    "MlpConfig",
    "Norm",
    "NormConfig",
    "Nsa",
    "NsaConfig",
    "Parallel",
    "ParallelConfig",
    "ResidualConfig",
    "RgLru",
    "RgLruConfig",
    "RopeConfig",
    "RopeScaling",
    "Routing",
    "RoutingConfig",
    "SelectConfig",
    "Shared",
    "SharedConfig",
    "ShortConv",
    "Side",
    "SideConfig",
    "Stream",
    "Tokens",
    "Trace",
    "attention_cost",
    "make_norm",
    "normalize",
    "parameter",
    "register",
    "yarn_growth",
]
