"""BigBird (arXiv:2007.14062): tiles of neighbours, ends and random draws, where a tile listed twice counts twice.

Outside of training the released model draws nothing: the random tiles of every inner row are the first one, so it
counts 1 + num_random_blocks times. Sequences of at most (5 + 2 num_random_blocks) tiles have full attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface.families.bert import PROJECTIONS, build_encoder, pieces_of_encoder, pieces_of_head
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.patterns import Pattern, recipes


def translate(fields: Fields, random_plans: Sequence[np.ndarray] | None = None) -> Translation:
    """From the keys of a `BigBirdConfig`, with the head of its masked language model.

    Args:
      fields: config.json.
      random_plans: for each layer the random key tiles of the inner query tiles, [h, tiles - 2, r]; sequences then have
        to have so many tiles. What evaluation has, if not given.
    """
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    fields.require("position_embedding_type", "absolute")
    depth, heads = fields.take("num_hidden_layers", 12), fields.take("num_attention_heads", 12)
    sparse = fields.choose("attention_type", {"block_sparse": True, "original_full": False}, "block_sparse")
    tile, r = fields.take("block_size", 64), fields.take("num_random_blocks", 3)
    bias = fields.take("use_bias", True)
    scale = fields.take("hidden_size", 768) ** 0.5 if fields.take("rescale_embeddings", False) else 1.0
    patterns = _choose_patterns(fields, depth, heads, tile, r, random_plans) if sparse else ["full"] * depth
    model = build_encoder(fields, patterns, bias=bias, scale=scale)
    full = _with_full_attention(model)
    most = (5 + 2 * r) * tile

    def at_length(length: int) -> tuple[ModelConfig, int]:
        if length <= most:
            return full, 1
        tiles = -(-length // tile)
        for plan in random_plans or ():
            if len(plan[0]) != tiles - 2:
                raise ValueError(f"random_plans: for {len(plan[0]) + 2} tiles, but {length} tokens are {tiles} tiles")
        return model, tile

    head, unused = pieces_of_head("cls.predictions", "transform.dense", "transform.LayerNorm", model.tied)
    pieces = [*pieces_of_encoder("bert", model, dict.fromkeys(PROJECTIONS, bias)), *head]
    unused += (r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*")
    return Translation(model, pieces, unused=unused, at_length=at_length if sparse else None)


def _choose_patterns(fields, depth: int, heads: int, tile: int, r: int, plans) -> list[Pattern]:
    if plans is None:
        return [recipes.bigbird(tile, r, seed=0, plan="evaluation", multiset=True)] * depth
    shapes = [np.shape(plan) for plan in plans]
    if len(shapes) != depth or any(len(shape) != 3 or shape[0] != heads or shape[2] != r for shape in shapes):
        raise fields.error("random_plans", f"expected {depth} of [{heads}, tiles - 2, {r}], got {shapes}")
    return [recipes.bigbird(tile, r, seed=0, plan=np.asarray(plan).tolist(), multiset=True) for plan in plans]


def _with_full_attention(model: ModelConfig) -> ModelConfig:
    """The same schedule, so the same parameters in the same places."""
    layers = {
        name: dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, pattern="full"))
        for name, layer in model.layers.items()
    }
    return dataclasses.replace(model, layers=layers)
