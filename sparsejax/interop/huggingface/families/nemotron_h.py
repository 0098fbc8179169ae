"""Nemotron-H (arXiv:2504.03624): every layer is one of Mamba-2, attention without positions, an MLP, or experts."""

from __future__ import annotations

from sparsejax.interop.huggingface.families.mamba import pieces_of_mamba2
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_experts,
)
from sparsejax.layers import AttentionConfig, ExpertsConfig, LayerConfig, Mamba2Config, MlpConfig, NormConfig

# Kinds of layers, by their letter in older files and by their names in newer ones -> names in a schedule.
LETTERS = {"M": "ssm", "*": "full", "-": "mlp", "E": "experts"}
KINDS = {
    "linear_attention": "ssm",
    "mamba": "ssm",
    "full_attention": "full",
    "attention": "full",
    "mlp": "mlp",
    "moe": "experts",
}
# How step sizes start and what is computed how; other names of other keys; layers that predict more than one token
# ahead, which a forward pass leaves out.
IGNORED = """
    chunk_size time_step_max time_step_floor time_step_limit time_step_rank rescale_prenorm_residual residual_in_fp32
    mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_layers_block_type mtp_hybrid_override_pattern
    num_nextn_predict_layers n_shared_experts expand num_hidden_layers rms_norm_eps mamba_proj_bias
"""


def translate(fields: Fields) -> Translation:
    """From the keys of a `NemotronHConfig`."""
    fields.ignore(*IGNORED.split())
    fields.require("mamba_hidden_act", "silu")
    width, kinds = fields.take("hidden_size", 4096), _read_kinds(fields)
    norm = NormConfig("rms", fields.take("layer_norm_epsilon", 1e-5))
    activation = fields.choose("mlp_hidden_act", ACTIVATIONS, "relu2")
    inner, bias = fields.take("intermediate_size", 21504), fields.take("mlp_bias", False)
    parts = {
        "ssm": _read_mamba(fields, norm.eps),
        "full": _read_attention(fields),
        "mlp": MlpConfig("plain", inner, activation, bias=bias),
        "experts": _read_experts(fields, activation, inner, bias),
    }
    layers = [
        (kind, LayerConfig(parts[kind], None, norm, "pre", remat=False))
        if kind in ("ssm", "full")
        else (kind, LayerConfig(None, parts[kind], norm, "pre", remat=False))
        for kind in kinds
    ]
    fields.ignore("tie_word_embeddings")  # the reference ties nothing, whatever it says
    model = build_model(fields, width, layers, norm, tied=False)
    pieces = [
        same("backbone.embeddings.weight", "embedding.tokens"),
        same("backbone.norm_f.weight", "norm.scale"),
        transposed("lm_head.weight", "head.weight"),
    ]
    for i, kind in enumerate(kinds):
        pieces += _pieces_of_layer(f"backbone.layers.{i}", f"layers.{i}", kind, parts[kind])
    return Translation(model, pieces, unused=(r"mtp\..*",))


def _read_kinds(fields: Fields) -> list[str]:
    letters, names = fields.take("hybrid_override_pattern", None), fields.take("layers_block_type", None)
    if names is not None:
        given, known, key = names, KINDS, "layers_block_type"
    elif letters is not None:
        given, known, key = letters, LETTERS, "hybrid_override_pattern"
    else:
        raise fields.error("layers_block_type", "missing")
    for kind in given:
        if kind not in known:
            raise fields.error(key, f"{kind!r} is not supported; only {', '.join(known)}")
    return [known[kind] for kind in given]


def _read_mamba(fields: Fields, eps: float) -> Mamba2Config:
    groups, bias = fields.take("n_groups", 8), fields.take("use_bias", False)
    return Mamba2Config(
        heads=fields.take("mamba_num_heads", 128),
        head_width=fields.take("mamba_head_dim", 64),
        state=fields.take("ssm_state_size", 128),
        groups=groups,
        conv=fields.take("conv_kernel", 4),
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=eps,
        norm_groups=groups,
        dt_floor=fields.take("time_step_min", 1e-3),  # of every step size, not only as they start
        bias=bias,
        out_bias=bias,
        conv_bias=fields.take("use_conv_bias", True),
    )


def _read_attention(fields: Fields) -> AttentionConfig:
    fields.ignore("attention_bias")  # the reference has none, whatever it says
    heads = fields.take("num_attention_heads", 32)
    head_width = fields.take("head_dim", 128)
    fields.require("attention_head_dim", head_width)
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=head_width,
        rope=None,
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
    )


def _read_experts(fields: Fields, activation: str, inner: int, bias: bool) -> ExpertsConfig:
    return ExpertsConfig(
        experts=fields.take("n_routed_experts", 8),
        top_k=fields.take("num_experts_per_tok", 2),
        width=fields.take("moe_intermediate_size", 7688),
        activation=activation,
        gated=False,
        router="sigmoid",
        renormalize=fields.take("norm_topk_prob", True),
        scale=float(fields.take("routed_scaling_factor", 1.0)),
        selection_bias=True,
        groups=fields.take("n_group", 1),
        top_groups=fields.take("topk_group", 1),
        shared_width=fields.take("moe_shared_expert_intermediate_size", 7688) or inner,
        shared_bias=bias,
        latent=fields.take("moe_latent_size", None),
    )


def _pieces_of_layer(theirs: str, ours: str, kind: str, part) -> list[Piece]:
    mixer, residual = f"{theirs}.mixer", "mixer_residual" if kind in ("ssm", "full") else "mlp_residual"
    pieces = [same(f"{theirs}.norm.weight", f"{ours}.{residual}.before.scale")]
    if kind == "ssm":
        return pieces + pieces_of_mamba2(mixer, f"{ours}.mixer", part)
    if kind == "full":
        return pieces + pieces_of_attention(mixer, f"{ours}.mixer")
    if kind == "mlp":
        return pieces + _pieces_of_mlp(mixer, f"{ours}.mlp", part.bias)
    pieces += [
        transposed(f"{mixer}.gate.weight", f"{ours}.mlp.router.weight"),
        same(f"{mixer}.gate.e_score_correction_bias", f"{ours}.mlp.selection_bias"),
        *pieces_of_experts(f"{mixer}.experts", f"{ours}.mlp", part.experts, names=(None, "up_proj", "down_proj")),
        *_pieces_of_mlp(f"{mixer}.shared_experts", f"{ours}.mlp.shared", part.shared_bias),
    ]
    if part.latent is not None:
        pieces += linear(f"{mixer}.fc1_latent_proj", f"{ours}.mlp.enter", part.shared_bias)
        pieces += linear(f"{mixer}.fc2_latent_proj", f"{ours}.mlp.leave", part.shared_bias)
    return pieces


def _pieces_of_mlp(theirs: str, ours: str, bias: bool) -> list[Piece]:
    return [piece for n in ("up", "down") for piece in linear(f"{theirs}.{n}_proj", f"{ours}.{n}", bias)]
