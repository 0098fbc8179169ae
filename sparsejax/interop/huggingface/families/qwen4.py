"""Qwen4-Exp, the text model: gated delta rule, attention to selected keys, hyper-connections, and experts."""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.qwen3_next import (
    QKV,
    delta_tensors,
    gated_attention_tensors,
    read_delta,
    read_experts,
    read_gated_attention,
    shared_experts_tensors,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import (
    TensorMap,
    identity,
    linears,
    norm,
    split_linear,
    transposed,
)
from sparsejax.interop.huggingface.translation import (
    SILU,
    Translation,
    build_model,
    read_layer_types,
)
from sparsejax.layers import DeltaConfig, HyperConfig, IndexerConfig, LayerConfig, NormConfig

# Entries of `layer_types` -> names in a schedule; released files have the last two for attention with an indexer.
LAYERS = {"linear_attention": "linear"}
LAYERS |= dict.fromkeys(("indexed_attention", "full_attention", "qwen_sparse_attention"), "full")
# Of layers with embeddings of n-grams, which are not supported.
NGRAMS = (
    *("ple_embed_dim", "ple_conv_kernel_size", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base"),
    *("make_ngram_vocab_size_divisible_by", "seed", "split_ngram_parts", "number_of_conv_states"),
)


def translate(fields: Fields) -> Translation:
    """Translates a `Qwen4ExpTextConfig` without layers that embed n-grams."""
    fields.require("ple_layer_ids", None, [])
    fields.ignore(*NGRAMS)
    width, depth = fields.take("hidden_size", 2048), fields.take("num_hidden_layers", 40)
    period = fields.take("full_attention_interval", None, int) or 4
    default = ["linear_attention" if (i + 1) % period else "indexed_attention" for i in range(depth)]
    names = [LAYERS[name] for name in read_layer_types(fields, default, allowed=tuple(LAYERS))]
    rms = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6), offset=True)
    activation = fields.choose("hidden_act", SILU, "silu")
    attention = dataclasses.replace(read_gated_attention(fields, width, rms), indexer=_read_indexer(fields, rms))
    gate = fields.take("output_gate_type", None) or activation
    if gate not in ("silu", "sigmoid"):
        raise fields.unsupported("output_gate_type", gate, ("silu", "sigmoid"))
    delta = dataclasses.replace(read_delta(fields, rms.eps), gate=gate)
    experts = read_experts(fields, activation)
    streams = fields.take("hc_count", 4)
    hyper = HyperConfig(kind="gated", streams=streams, eps=rms.eps, rank=fields.take("hc_lowrank", 320))
    mixers = {"linear": delta, "full": attention}
    layers = [
        (name, LayerConfig(mixer=mixers[name], mlp=experts, norm=None, norm_position="pre", remat="none"))
        for name in names
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, None, tied=tied, hyper=hyper)
    maps = [identity("model.embed_tokens.weight", "embedding.tokens")]
    maps += [] if tied else [transposed("lm_head.weight", "head.weight")]
    maps += _hyper_tensors("model.hyper_connection_mixer", "hyper")
    for i, name in enumerate(names):
        source, target = f"model.layers.{i}", f"layers.{i}"
        if name == "linear":
            maps += _delta_tensors(f"{source}.linear_attn", f"{target}.mixer", delta)
        else:
            maps += gated_attention_tensors(f"{source}.self_attn", f"{target}.mixer", attention)
            maps += _indexer_tensors(f"{source}.self_attn.indexer", f"{target}.mixer.indexer", attention.indexer)
        maps += [
            *_hyper_tensors(f"{source}.attn_hyper_connection", f"{target}.mixer_hyper", writes=True),
            *_hyper_tensors(f"{source}.mlp_hyper_connection", f"{target}.mlp_hyper", writes=True),
            *shared_experts_tensors(f"{source}.mlp", f"{target}.mlp", experts),
        ]
    return Translation(model, maps, unused=(*tensors.tied_head(tied), r"mtp\..*"))


def _read_indexer(fields: Fields, rms: NormConfig) -> IndexerConfig | None:
    """Reads the indexer, without which attention is dense."""
    heads = fields.take("indexer_n_heads", None, int)
    if heads is None:
        return None
    fields.require("indexer_kv_heads", 1)
    ratio, budget = fields.take("indexer_compress_ratio"), fields.take("indexer_budget")
    if budget % ratio:
        raise fields.error("indexer_budget", f"{budget} is not divisible by indexer_compress_ratio = {ratio}")
    return IndexerConfig(
        heads=heads,
        width=fields.take("indexer_head_dim"),
        top_k=budget // ratio,
        block=ratio,
        pool="keys",
        weights=False,
        norm=rms,
    )


def _hyper_tensors(source: str, target: str, writes: bool = False) -> list[TensorMap]:
    names = {"input_mix_weight_down": "down", "input_mix_weight_up": "up"}
    names |= {"block_inject_weight": "weights"} if writes else {}
    return [identity(f"{source}.hc_norm.weight", f"{target}.scale"), *linears(source, target, names)]


def _indexer_tensors(source: str, target: str, config: IndexerConfig | None) -> list[TensorMap]:
    """An indexer whose queries and keys are stored together."""
    if config is None:
        return []
    sizes = [config.heads * config.width, config.width]
    return [
        *split_linear(f"{source}.index_qk_proj", [f"{target}.queries", f"{target}.keys"], sizes),
        *norm(f"{source}.q_layernorm", f"{target}.query_norm"),
        *norm(f"{source}.k_layernorm", f"{target}.key_norm"),
    ]


def _delta_tensors(source: str, target: str, config: DeltaConfig) -> list[TensorMap]:
    """Delta rule whose queries, keys and values are stored together."""
    keys = config.key_heads * config.key_width
    sizes = [keys, keys, config.heads * config.value_width]
    return [
        *split_linear(f"{source}.in_proj_qkv", [f"{target}.{name}" for name in QKV], sizes),
        *linears(source, target, {"in_proj_z": "gate", "in_proj_b": "beta", "in_proj_a": "decay"}),
        *delta_tensors(source, target, config),
    ]
