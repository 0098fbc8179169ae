"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786).

They alternate local and global layers, normalize before and after every branch with scales stored minus 1, multiply
embeddings by sqrt(width), and scale scores by `query_pre_attn_scalar`.
"""

from __future__ import annotations

import dataclasses
import functools

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope, read_ropes
from sparsejax.interop.huggingface.tensors import TensorMap
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    read_attention,
    read_layer_types,
    read_window,
    translate_text,
)
from sparsejax.layers import LayerConfig, MlpConfig, NormConfig

# Layer types of Gemma 3 -> the older key of the rotary base, and its default.
BASES = {
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
    "full_attention": ("rope_theta", 1_000_000.0),
}


def _translate(fields: Fields, generation: int) -> Translation:
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    fields.require("use_bidirectional_attention", None, False)
    period = fields.take("sliding_window_pattern", None, int) or 6 if generation == 3 else 2
    fields.ignore("_sliding_window_pattern", "sliding_window_size", "cache_implementation")
    fields.ignore("hidden_act")  # the reference reads `hidden_activation`
    types = read_layer_types(
        fields, ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(depth)]
    )
    if generation == 3:
        fields.require("attn_logit_softcapping", None)  # the reference has the key but does not apply it
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6), offset=True)
    bias = fields.take("attention_bias", False)
    window = read_window(fields, 4096, recipe="gemma_local")
    patterns = {"sliding_attention": window, "full_attention": "causal"}
    if generation == 3:
        ropes = read_ropes(fields, BASES, scaled=("full_attention",))
    else:
        ropes = dict.fromkeys(patterns, read_rope(fields))
    attention = read_attention(
        fields,
        width,
        None,
        heads=8,
        kv_heads=4,
        head_width=256,
        qk_norm=norm if generation == 3 else None,
        scale=fields.take("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=fields.take("attn_logit_softcapping", None if generation == 3 else 50.0),
        bias=bias,
        out_bias=bias,
    )
    activation = fields.choose("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size"), activation=activation)
    layers = {}
    for layer_type, pattern in patterns.items():
        mixer = dataclasses.replace(attention, pattern=pattern, rope=ropes[layer_type])
        layers[layer_type] = LayerConfig(mixer=mixer, mlp=mlp, norm=norm, norm_position="both", remat="none")
    tied = fields.take("tie_word_embeddings", True)
    model = build_model(
        fields,
        width,
        [(LAYER_NAMES[layer_type], layers[layer_type]) for layer_type in types],
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=width**0.5),
        head=HeadConfig(softcap=fields.take("final_logit_softcapping", None if generation == 3 else 30.0)),
    )
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        maps += _layer_tensors(f"model.layers.{i}", f"layers.{i}", bias, qk_norm=generation == 3)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def translate_multimodal(fields: Fields) -> Translation:
    """Translates the text model of a `Gemma3Config`, whose images are not supported."""
    fields.ignore("mm_tokens_per_image", "image_token_index", "image_token_id", "boi_token_id", "eoi_token_id")
    images = (r"vision_tower\..*", r"multi_modal_projector\..*")
    return translate_text(fields, translate_3, images, vocab_size=262_208)


def _layer_tensors(source: str, target: str, bias: bool, qk_norm: bool) -> list[TensorMap]:
    norms = {
        "input_layernorm": "mixer_residual.before",
        "post_attention_layernorm": "mixer_residual.within",
        "pre_feedforward_layernorm": "mlp_residual.before",
        "post_feedforward_layernorm": "mlp_residual.within",
    }
    if qk_norm:
        norms |= {"self_attn.q_norm": "mixer.query_norm", "self_attn.k_norm": "mixer.key_norm"}
    return [
        *(norm for a, b in norms.items() for norm in tensors.norm(f"{source}.{a}", f"{target}.{b}")),
        *tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias),
        *tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp"),
    ]


translate_2 = functools.partial(_translate, generation=2)
translate_3 = functools.partial(_translate, generation=3)
