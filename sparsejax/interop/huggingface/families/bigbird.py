"""BigBird (arXiv:2007.14062): tiles of neighbours, global tiles and random tiles; repeated tiles count repeatedly.

The released model draws random tiles in training only. In evaluation, the random tiles of every inner query tile are
all the first tile, which therefore counts 1 + num_random_blocks times. Sequences of at most (5 + 2 num_random_blocks)
tiles use full attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.interop.huggingface.families.bert import (
    PROJECTIONS,
    build_encoder,
    encoder_tensors,
    head_tensors,
    with_pattern,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.patterns import Pattern, recipes


def translate(fields: Fields, random_plans: Sequence[np.ndarray] | None = None) -> Translation:
    """Translates a `BigBirdConfig` with a masked language model head.

    Args:
      fields: The config.json.
      random_plans: Random key tiles of the inner query tiles per layer, [h, tiles - 2, r]; sequences must then have
        this number of tiles. Defaults to the tiles of evaluation.
    """
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    fields.require("position_embedding_type", "absolute")
    depth, heads = fields.take("num_hidden_layers", 12), fields.take("num_attention_heads", 12)
    sparse = fields.choose("attention_type", {"block_sparse": True, "original_full": False}, "block_sparse")
    tile, r = fields.take("block_size", 64), fields.take("num_random_blocks", 3)
    bias = fields.take("use_bias", True)
    scale = fields.take("hidden_size", 768) ** 0.5 if fields.take("rescale_embeddings", False) else 1.0
    patterns: Sequence[str | Pattern] = ["full"] * depth
    if sparse:
        patterns = _choose_patterns(fields, depth, heads, tile, r, random_plans)
    model = build_encoder(fields, patterns, bias=bias, scale=scale)
    # The same schedule, hence the same parameters under the same paths.
    full_layers = {name: with_pattern(layer, "full") for name, layer in model.layers.items()}
    full_model = dataclasses.replace(model, layers=full_layers)

    def at_length(length: int) -> tuple[ModelConfig, int]:
        if length <= (5 + 2 * r) * tile:
            return full_model, 1
        tiles = -(-length // tile)
        for plan in random_plans or ():
            if len(plan[0]) != tiles - 2:
                raise InputError(
                    "random_plans", f"they are for {len(plan[0]) + 2} tiles, but {length} tokens are {tiles} tiles"
                )
        return model, tile

    head, unused = head_tensors("cls.predictions", "transform.dense", "transform.LayerNorm", model.tied)
    return Translation(
        model,
        [*encoder_tensors("bert", model, dict.fromkeys(PROJECTIONS, bias)), *head],
        unused=(*unused, r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
        at_length=at_length if sparse else None,
    )


def _choose_patterns(
    fields: Fields, depth: int, heads: int, tile: int, r: int, plans: Sequence[np.ndarray] | None
) -> list[Pattern]:
    if plans is None:
        return [recipes.bigbird(tile, r, seed=0, plan="evaluation", multiset=True)] * depth
    shapes = [np.shape(plan) for plan in plans]
    if len(shapes) != depth or any(len(shape) != 3 or shape[0] != heads or shape[2] != r for shape in shapes):
        raise fields.error("random_plans", f"expected {depth} arrays of shape [{heads}, tiles - 2, {r}], got {shapes}")
    return [recipes.bigbird(tile, r, seed=0, plan=np.asarray(plan).tolist(), multiset=True) for plan in plans]
