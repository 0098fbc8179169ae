"""Nemotron-H (arXiv:2504.03624): layers of Mamba-2, attention without positions, MLPs or experts, one branch each."""

from __future__ import annotations

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.mamba import backbone_tensors, mamba2_tensors, read_limits
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, linears
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
)
from sparsejax.layers import ExpertsConfig, Mamba2Config, MlpConfig, NormConfig

# Layer types, letters in older files and names in newer ones -> names in a schedule.
LETTERS = {"M": "ssm", "*": "full", "-": "mlp", "E": "experts"}
TYPES = {
    "linear_attention": "ssm",
    "mamba": "ssm",
    "full_attention": "full",
    "attention": "full",
    "mlp": "mlp",
    "moe": "experts",
}
# Initial step sizes, implementation choices, redundant keys, and multi-token prediction, which a forward pass omits.
IGNORED = """
    chunk_size time_step_min time_step_max time_step_floor time_step_rank rescale_prenorm_residual residual_in_fp32
    mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_layers_block_type mtp_hybrid_override_pattern
    num_nextn_predict_layers n_shared_experts expand num_hidden_layers rms_norm_eps norm_eps mamba_proj_bias
    rope_theta partial_rotary_factor
"""


def translate(fields: Fields) -> Translation:
    """Translates a `NemotronHConfig`."""
    fields.ignore(*IGNORED.split())
    fields.require("mamba_hidden_act", "silu")
    width, names = fields.take("hidden_size", 4096), _read_types(fields)
    norm = NormConfig(kind="rms", eps=fields.take("layer_norm_epsilon", 1e-5))
    activation = fields.choose("mlp_hidden_act", ACTIVATIONS, "relu2")
    inner, bias = fields.take("intermediate_size", 21504), fields.take("mlp_bias", False)
    mamba, experts = _read_mamba2(fields, norm.eps), _read_experts(fields, activation, inner, bias)
    fields.ignore("attention_bias")  # the reference never has biases
    attention = read_attention(fields, width, None, heads=32, head_width=128)
    fields.require("attention_head_dim", attention.head_width)
    mlp = MlpConfig(kind="plain", width=inner, activation=activation, bias=bias)
    layers = {
        "ssm": pre_norm_layer(mamba, None, norm),
        "full": pre_norm_layer(attention, None, norm),
        "mlp": pre_norm_layer(None, mlp, norm),
        "experts": pre_norm_layer(None, experts, norm),
    }
    fields.ignore("tie_word_embeddings")  # the reference never ties the head
    model = build_model(fields, width, [(name, layers[name]) for name in names], norm, tied=False)
    maps = backbone_tensors(tied=False)
    for i, name in enumerate(names):
        source, target = f"backbone.layers.{i}", f"layers.{i}"
        residual = "mixer_residual" if name in ("ssm", "full") else "mlp_residual"
        maps += tensors.norm(f"{source}.norm", f"{target}.{residual}.before")
        if name == "ssm":
            maps += mamba2_tensors(f"{source}.mixer", f"{target}.mixer", mamba)
        elif name == "full":
            maps += tensors.attention(f"{source}.mixer", f"{target}.mixer")
        elif name == "mlp":
            maps += _mlp_tensors(f"{source}.mixer", f"{target}.mlp", bias)
        else:
            maps += _experts_tensors(f"{source}.mixer", f"{target}.mlp", experts)
    return Translation(model, maps, unused=(r"mtp\..*",))


def _read_types(fields: Fields) -> list[str]:
    letters, names = fields.take("hybrid_override_pattern", None), fields.take("layers_block_type", None)
    if names is not None:
        types, known, key = names, TYPES, "layers_block_type"
    elif letters is not None:
        types, known, key = letters, LETTERS, "hybrid_override_pattern"
    else:
        raise fields.error("layers_block_type", "missing")
    for layer_type in types:
        if layer_type not in known:
            raise fields.unsupported(key, layer_type, known)
    return [known[layer_type] for layer_type in types]


def _read_mamba2(fields: Fields, eps: float) -> Mamba2Config:
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
        bias=bias,
        out_bias=bias,
        conv_bias=fields.take("use_conv_bias", True),
        **read_limits(fields),
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
        latent=fields.take("moe_latent_size", None, int),
    )


def _experts_tensors(source: str, target: str, config: ExpertsConfig) -> list[TensorMap]:
    maps = [
        *linear(f"{source}.gate", f"{target}.router"),
        identity(f"{source}.gate.e_score_correction_bias", f"{target}.selection_bias"),
        *tensors.experts(f"{source}.experts", target, config.experts, names=(None, "up_proj", "down_proj")),
        *_mlp_tensors(f"{source}.shared_experts", f"{target}.shared", config.shared_bias),
    ]
    if config.latent is not None:
        maps += linear(f"{source}.fc1_latent_proj", f"{target}.enter", config.shared_bias)
        maps += linear(f"{source}.fc2_latent_proj", f"{target}.leave", config.shared_bias)
    return maps


def _mlp_tensors(source: str, target: str, bias: bool) -> list[TensorMap]:
    return linears(source, target, {"up_proj": "up", "down_proj": "down"}, bias)
