"""GPT-2: learned positions, norms before attention and before a plain MLP, and biases in all linear layers."""

from __future__ import annotations

import dataclasses

from sparsejax.config import EmbeddingConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap, identity, norm, split_last, tied_head, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, Translation, build_model, pre_norm_layer
from sparsejax.layers import AttentionConfig, MlpConfig, NormConfig

PREFIX = "transformer."
BUFFERS = rf"({PREFIX})?h\.\d+\.attn\.(masked_)?bias"  # causal masks of older files


def translate(fields: Fields) -> Translation:
    """Translates a `GPT2Config`; files of the bare model lack the prefix of tensors."""
    fields.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation")
    fields.ignore("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj")
    width, depth, heads = fields.take("n_embd", 768), fields.take("n_layer", 12), fields.take("n_head", 12)
    layer_norm = NormConfig(kind="layer", eps=fields.take("layer_norm_epsilon", 1e-5))
    mixer = AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        rope=None,
        qk_norm=None,
        impl="auto",
        bias=True,
        out_bias=True,
    )
    mlp = MlpConfig(
        kind="plain",
        width=fields.take("n_inner", None, int) or 4 * width,
        activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        bias=True,
    )
    scale = mixer.head_width**-0.5 if fields.take("scale_attn_weights", True) else 1.0
    by_layer = fields.take("scale_attn_by_inverse_layer_idx", False)
    layers = []
    for i in range(depth):
        scaled = dataclasses.replace(mixer, scale=scale / (i + 1) if by_layer else scale)
        layers.append(("full", pre_norm_layer(scaled, mlp, layer_norm)))
    tied = fields.take("tie_word_embeddings", True)
    embedding = EmbeddingConfig(positions=fields.take("n_positions", 1024))
    model = build_model(fields, width, layers, layer_norm, tied=tied, embedding=embedding)
    maps = [
        identity(f"{PREFIX}wte.weight", "embedding.tokens"),
        identity(f"{PREFIX}wpe.weight", "embedding.positions"),
        *norm(f"{PREFIX}ln_f", "norm", bias=True),
        *([] if tied else [transposed("lm_head.weight", "head.weight")]),
    ]
    for i in range(depth):
        maps += _layer_tensors(f"{PREFIX}h.{i}", f"layers.{i}", width)
    return Translation(model, maps, unused=(*tied_head(tied), BUFFERS), older_names=((rf"^{PREFIX}", ""),))


def _layer_tensors(source: str, target: str, width: int) -> list[TensorMap]:
    """A layer, whose matrices are stored as [in, out]."""
    projections = [f"{target}.mixer.{name}" for name in ("query", "key", "value")]
    linears = {"attn.c_proj": "mixer.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    maps = [
        *norm(f"{source}.ln_1", f"{target}.mixer_residual.before", bias=True),
        *norm(f"{source}.ln_2", f"{target}.mlp_residual.before", bias=True),
    ]
    for part in ("weight", "bias"):
        names = [f"{projection}.{part}" for projection in projections]
        maps.append(split_last(f"{source}.attn.c_attn.{part}", names, [width] * 3))
        maps += [identity(f"{source}.{a}.{part}", f"{target}.{b}.{part}") for a, b in linears.items()]
    return maps
