"""Zamba2 (arXiv:2411.15242): Mamba-2 layers, some of which also read a transformer block that they share."""

from __future__ import annotations

from sparsejax.interop.huggingface.families.mamba import pieces_of_mamba2
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, split, split_linear, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    read_rope,
    tied_head,
)
from sparsejax.layers import (
    AttentionConfig,
    LayerConfig,
    Mamba2Config,
    MlpConfig,
    NormConfig,
    SharedConfig,
    SideConfig,
)

GATED_NORM_EPS = 1e-5  # whatever `rms_norm_eps` is


def translate(fields: Fields) -> Translation:
    """From the keys of a `Zamba2Config`."""
    fields.ignore("chunk_size", "time_step_max", "time_step_floor", "use_mem_eff_path", "num_query_groups")
    fields.ignore("kv_channels", "attention_hidden_size", "hybrid_layer_ids", "num_hidden_layers", "mamba_headdim")
    fields.ignore("use_conv_bias")  # there is one, whatever it says
    fields.require("use_long_context", False)
    width, kinds = fields.take("hidden_size", 2560), _read_kinds(fields)
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    mixer, block = _read_mixer(fields, width), _read_block(fields, width, norm)
    tied, rank = fields.take("tie_word_embeddings", True), fields.take("adapter_rank", 128)
    mixer_rank = rank if fields.take("use_shared_attention_adapter", False) else None
    hybrids = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    # The reference ties blocks as it ties embeddings: without that, each layer has a block of its own.
    blocks = fields.take("num_mem_blocks", 1)
    blocks = min(blocks, len(hybrids)) if tied else len(hybrids)
    layers = []
    for i in range(len(kinds)):
        side, name = None, "ssm"
        if i in hybrids:
            name = f"hybrid_{hybrids.index(i) % blocks}"
            side = SideConfig(f"block_{hybrids.index(i) % blocks}", mixer_rank=mixer_rank, mlp_rank=rank)
        layers.append((name, LayerConfig(mixer, None, norm, "pre", remat=False, side=side)))
    model = build_model(
        fields,
        width,
        layers,
        norm,
        tied=tied,
        shared={f"block_{i}": block for i in range(blocks)},
    )
    pieces = pieces_of_ends(tied, norm="model.final_layernorm")
    for i in range(len(kinds)):
        ours = f"layers.{i}"
        theirs = f"model.layers.{i}.mamba_decoder" if i in hybrids else f"model.layers.{i}"
        pieces.append(same(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_residual.before.scale"))
        pieces += pieces_of_mamba2(f"{theirs}.mamba", f"{ours}.mixer", mixer)
    bias = block.mlp.bias
    for number, i in enumerate(hybrids):
        # The weights of a block, and the adapters to it of all layers, are stored with the first that uses it.
        theirs = f"model.layers.{hybrids[number % blocks]}.shared_transformer"
        if number < blocks:
            pieces += _pieces_of_block(theirs, f"shared.block_{number}", block.mlp.width, bias)
        pieces += linear(f"model.layers.{i}.linear", f"layers.{i}.side.out")
        pieces += _pieces_of_adapters(
            theirs, f"layers.{i}.side.adapters", number, block.mlp.width, with_mixer=mixer_rank is not None
        )
    # Of the layers that a block is not shared with.
    others = r"model\.layers\.\d+\.shared_transformer\..*_adapter_list\.\d+\..*"
    return Translation(model, pieces, unused=tied_head(True) if tied else (others,))


def _read_kinds(fields: Fields) -> list[str]:
    kinds = fields.take("layers_block_type", None)
    if kinds is None:
        kinds = ["mamba"] + (["mamba"] * 5 + ["hybrid"]) * 7 + ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3 + ["hybrid"]
        kinds += ["mamba"] * 2
    for kind in kinds:
        if kind not in ("mamba", "linear_attention", "hybrid"):
            raise fields.error("layers_block_type", f"{kind!r} is not supported; only mamba, linear_attention, hybrid")
    return kinds


def _read_mixer(fields: Fields, width: int) -> Mamba2Config:
    heads, groups = fields.take("n_mamba_heads", 8), fields.take("mamba_ngroups", 1)
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
        dt_floor=fields.take("time_step_min", 1e-3),  # of every step size, not only as they start
        bias=fields.take("add_bias_linear", False),
        out_bias=fields.take("add_bias_linear", False),
        conv_bias=True,
    )


def _read_block(fields: Fields, width: int, norm: NormConfig) -> SharedConfig:
    heads = fields.take("num_attention_heads", 32)
    head_width = fields.take("attention_head_dim", None) or 2 * width // heads
    rope = read_rope(fields)
    mixer = AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", None) or heads,
        head_width=head_width,
        rope=rope if fields.take("use_mem_rope", False) else None,
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
        scale=(head_width / 2) ** -0.5,
    )
    activation = fields.choose("hidden_act", ACTIVATIONS, "gelu")
    inner = fields.take("intermediate_size", None) or 4 * width
    return SharedConfig(mixer, MlpConfig("gated", inner, activation, bias=fields.take("add_bias_linear", False)), norm)


def _pieces_of_block(theirs: str, ours: str, inner: int, bias: bool) -> list[Piece]:
    return [
        same(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.scale"),
        same(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.mlp_norm.scale"),
        *pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer"),
        *split_linear(
            f"{theirs}.feed_forward.gate_up_proj", [f"{ours}.mlp.{name}" for name in ("gate", "up")], [inner] * 2, bias
        ),
        *linear(f"{theirs}.feed_forward.down_proj", f"{ours}.mlp.down", bias),
    ]


def _pieces_of_adapters(theirs: str, ours: str, number: int, inner: int, *, with_mixer: bool) -> list[Piece]:
    mlp = f"{theirs}.feed_forward.gate_up_proj_adapter_list.{number}"
    up = [f"{ours}.mlp.up.0", f"{ours}.mlp.up.1"]
    pieces = [transposed(f"{mlp}.0.weight", f"{ours}.mlp.down"), split(f"{mlp}.1.weight", up, [inner] * 2)]
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")) if with_mixer else ():
        adapter = f"{theirs}.self_attn.linear_{short}_adapter_list.{number}"
        pieces += [
            transposed(f"{adapter}.0.weight", f"{ours}.{name}.down"),
            transposed(f"{adapter}.1.weight", f"{ours}.{name}.up.0"),
        ]
    return pieces
