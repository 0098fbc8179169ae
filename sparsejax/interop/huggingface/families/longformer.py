"""Longformer (arXiv:2004.05150): windows, and tokens that are global by `global_attention_mask`.

`attention_window` w counts w / 2 keys on either side. Global rows have projections of their own. Hugging Face has
neither the dilated windows nor the causal models of the paper.
"""

from __future__ import annotations

from sparsejax.interop.huggingface.families.bert import (
    GLOBAL,
    PROJECTIONS,
    build_encoder,
    pieces_of_encoder,
    pieces_of_head,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation


def translate(fields: Fields) -> Translation:
    """From the keys of a `LongformerConfig`, with the head of its masked language model."""
    fields.ignore("onnx_export", "attention_mode", "ignore_attention_mask")
    fields.require("position_embedding_type", "absolute")
    depth, windows = fields.take("num_hidden_layers", 12), fields.take("attention_window", 512)
    windows = windows if isinstance(windows, list) else [windows] * depth
    if len(windows) != depth:
        raise fields.error("attention_window", f"{len(windows)} windows for {depth} layers")
    for window in windows:
        if window < 2 or window % 2:
            raise fields.error("attention_window", f"must be even and above 0, got {window}")
    patterns = [f"window({window // 2}, {window // 2})" for window in windows]
    padding = fields.take("pad_token_id", 1)
    # The head has a gelu of its own, whatever `hidden_act` is.
    model = build_encoder(fields, patterns, global_projections=True, head_activation="gelu", padding=padding)
    head, unused = pieces_of_head("lm_head", "dense", "layer_norm", model.tied)
    pieces = [*pieces_of_encoder("longformer", model, dict.fromkeys((*PROJECTIONS, *GLOBAL), True)), *head]
    unused += (r"longformer\.embeddings\.position_ids", r"longformer\.pooler\..*")
    keywords = frozenset({"attention_mask", "global_attention_mask"})
    return Translation(model, pieces, keywords=keywords, unused=unused)
