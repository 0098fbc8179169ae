"""Zamba2 (arXiv:2411.15242): Mamba-2 layers, some of which add the output of a shared transformer block."""

from __future__ import annotations

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.mamba import mamba2_tensors, read_limits
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import QKV, TensorMap, linear, norm, split, split_linear, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, Translation, build_model, pre_norm_layer
from sparsejax.layers import AttentionConfig, Mamba2Config, MlpConfig, NormConfig, SharedConfig, SideConfig

GATED_NORM_EPS = 1e-5  # for any `rms_norm_eps`
TYPES = ("mamba", "linear_attention", "hybrid")
DEFAULT_TYPES = "m mmmmmh mmmmmh mmmmmh mmmmmh mmmmmh mmmmmh mmmmmh mmmmh mmmh mm"  # m: "mamba", h: "hybrid"


def translate(fields: Fields) -> Translation:
    """Translates a `Zamba2Config`."""
    fields.ignore("chunk_size", "time_step_min", "time_step_max", "time_step_floor", "use_mem_eff_path")
    fields.ignore("kv_channels", "attention_hidden_size", "hybrid_layer_ids", "num_hidden_layers", "mamba_headdim")
    fields.ignore("num_query_groups", "use_conv_bias")  # the reference always has biases
    fields.require("use_long_context", False)
    width, types = fields.take("hidden_size", 2560), _read_types(fields)
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    mixer, mlp = _read_mamba2(fields, width), _read_mlp(fields, width)
    block = SharedConfig(mixer=_read_attention(fields, width), mlp=mlp, norm=layer_norm)
    tied, rank = fields.take("tie_word_embeddings", True), fields.take("adapter_rank", 128)
    mixer_rank = rank if fields.take("use_shared_attention_adapter", False) else None
    hybrids = [i for i, layer_type in enumerate(types) if layer_type == "hybrid"]
    # The reference shares blocks only if it ties embeddings; otherwise every hybrid layer has a separate block.
    blocks = fields.take("num_mem_blocks", 1)
    blocks = min(blocks, len(hybrids)) if tied else len(hybrids)
    layers = []
    for i in range(len(types)):
        name, side = "ssm", None
        if i in hybrids:
            number = hybrids.index(i) % blocks
            name, side = f"hybrid_{number}", SideConfig(shared=f"block_{number}", mixer_rank=mixer_rank, mlp_rank=rank)
        layers.append((name, pre_norm_layer(mixer, None, layer_norm, side=side)))
    shared = {f"block_{number}": block for number in range(blocks)}
    model = build_model(fields, width, layers, layer_norm, tied=tied, shared=shared)
    maps = tensors.embedding_and_head(tied, norm="model.final_layernorm")
    for i in range(len(types)):
        source = f"model.layers.{i}.mamba_decoder" if i in hybrids else f"model.layers.{i}"
        maps += norm(f"{source}.input_layernorm", f"layers.{i}.mixer_residual.before")
        maps += mamba2_tensors(f"{source}.mamba", f"layers.{i}.mixer", mixer)
    for number, i in enumerate(hybrids):
        # A block and the adapters of all its layers are stored with the first layer that uses it.
        source = f"model.layers.{hybrids[number % blocks]}.shared_transformer"
        if number < blocks:
            maps += _block_tensors(source, f"shared.block_{number}", mlp)
        maps += linear(f"model.layers.{i}.linear", f"layers.{i}.side.out")
        adapters = f"layers.{i}.side.adapters"
        maps += _adapter_tensors(source, adapters, number, mlp.width, with_mixer=mixer_rank is not None)
    # Adapters of layers that do not use the block.
    foreign = r"model\.layers\.\d+\.shared_transformer\..*_adapter_list\.\d+\..*"
    return Translation(model, maps, unused=tensors.tied_head(True) if tied else (foreign,))


def _read_types(fields: Fields) -> list[str]:
    default = [{"m": "mamba", "h": "hybrid"}[letter] for letter in DEFAULT_TYPES.replace(" ", "")]
    types = fields.take("layers_block_type", None)
    for layer_type in types or ():
        if layer_type not in TYPES:
            raise fields.unsupported("layers_block_type", layer_type, TYPES)
    return default if types is None else types


def _read_mamba2(fields: Fields, width: int) -> Mamba2Config:
    heads, groups = fields.take("n_mamba_heads", 8), fields.take("mamba_ngroups", 1)
    bias = fields.take("add_bias_linear", False)
    return Mamba2Config(
        heads=heads,
        head_width=int(fields.take("mamba_expand", 2) * width) // heads,
        state=fields.take("mamba_d_state", 64),
        groups=groups,
        conv=fields.take("mamba_d_conv", 4),
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=GATED_NORM_EPS,
        norm_groups=groups,
        bias=bias,
        out_bias=bias,
        conv_bias=True,
        **read_limits(fields),
    )


def _read_attention(fields: Fields, width: int) -> AttentionConfig:
    heads = fields.take("num_attention_heads", 32)
    head_width = fields.take("attention_head_dim", None, int) or 2 * width // heads
    rope = read_rope(fields)
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", None, int) or heads,
        head_width=head_width,
        rope=rope if fields.take("use_mem_rope", False) else None,
        qk_norm=None,
        impl="auto",
        scale=(head_width / 2) ** -0.5,
    )


def _read_mlp(fields: Fields, width: int) -> MlpConfig:
    return MlpConfig(
        kind="gated",
        width=fields.take("intermediate_size", None, int) or 4 * width,
        activation=fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        bias=fields.take("add_bias_linear", False),
    )


def _block_tensors(source: str, target: str, mlp: MlpConfig) -> list[TensorMap]:
    gate_up = [f"{target}.mlp.gate", f"{target}.mlp.up"]
    return [
        *norm(f"{source}.input_layernorm", f"{target}.mixer_norm"),
        *norm(f"{source}.pre_ff_layernorm", f"{target}.mlp_norm"),
        *tensors.attention(f"{source}.self_attn", f"{target}.mixer"),
        *split_linear(f"{source}.feed_forward.gate_up_proj", gate_up, [mlp.width] * 2, mlp.bias),
        *linear(f"{source}.feed_forward.down_proj", f"{target}.mlp.down", mlp.bias),
    ]


def _adapter_tensors(source: str, target: str, number: int, inner: int, *, with_mixer: bool) -> list[TensorMap]:
    mlp = f"{source}.feed_forward.gate_up_proj_adapter_list.{number}"
    gate_up = [f"{target}.mlp.up.0", f"{target}.mlp.up.1"]
    maps = [transposed(f"{mlp}.0.weight", f"{target}.mlp.down"), split(f"{mlp}.1.weight", gate_up, [inner] * 2)]
    for short, name in QKV.items() if with_mixer else ():
        adapter = f"{source}.self_attn.linear_{short}_adapter_list.{number}"
        maps += [
            transposed(f"{adapter}.0.weight", f"{target}.{name}.down"),
            transposed(f"{adapter}.1.weight", f"{target}.{name}.up.0"),
        ]
    return maps
