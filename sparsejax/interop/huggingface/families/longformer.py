"""Longformer (arXiv:2004.05150): windows, and global tokens that `global_attention_mask` marks.

An `attention_window` of w has w / 2 keys on either side of the query. Global tokens have separate projections.
transformers supports neither the dilated windows nor the causal models of the paper.
"""

from __future__ import annotations

from sparsejax.interop.huggingface.families.bert import (
    GLOBAL_PROJECTIONS,
    PROJECTIONS,
    build_encoder,
    encoder_tensors,
    head_tensors,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation


def translate(fields: Fields) -> Translation:
    """Translates a `LongformerConfig` with a masked language model head."""
    fields.ignore("onnx_export", "attention_mode", "ignore_attention_mask")
    fields.require("position_embedding_type", "absolute")
    depth, windows = fields.take("num_hidden_layers", 12), fields.take("attention_window", 512)
    windows = windows if isinstance(windows, list) else [windows] * depth
    if len(windows) != depth:
        raise fields.error("attention_window", f"{len(windows)} windows for {depth} layers")
    for window in windows:
        if window < 2 or window % 2:
            raise fields.error("attention_window", f"{window} is not a positive even number")
    patterns = [f"longformer({window // 2})" for window in windows]
    padding = fields.take("pad_token_id", 1)
    # The activation of the head is gelu for any `hidden_act`.
    model = build_encoder(fields, patterns, global_projections=True, head_activation="gelu", padding=padding)
    head, unused = head_tensors("lm_head", "dense", "layer_norm", model.tied)
    projections = dict.fromkeys((*PROJECTIONS, *GLOBAL_PROJECTIONS), True)
    return Translation(
        model,
        [*encoder_tensors("longformer", model, projections), *head],
        keywords=frozenset({"attention_mask", "global_attention_mask"}),
        unused=(*unused, r"longformer\.embeddings\.position_ids", r"longformer\.pooler\..*"),
    )
