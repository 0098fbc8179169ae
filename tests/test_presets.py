"""The presets, compared with what is published about the models that they are named after."""

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax import config as configs
from sparsejax import data, sharding
from sparsejax.account import account_model
from sparsejax.interop import huggingface
from sparsejax.layers import AttentionConfig, ExpertsConfig, LatentConfig, LightningConfig, MambaConfig
from sparsejax.model import Functional, Model
from sparsejax.overrides import parse_overrides
from sparsejax.presets import find_preset, list_presets, summarize_presets
from sparsejax.runs import build_optimizer, build_schedule, init_state
from sparsejax.train import build_step
from tests.layers import test_shared
from tests.messages import rejects

K256 = 262_144
GIB = 2**30


class Published(NamedTuple):
    """Counts in billions, as printed."""

    total: str
    active: str | None = None
    beside: float = 0.0  # parts of the published total that the preset does not have
    uncounted: int = 0  # tables (embedding, head) that the published active count excludes
    untotalled: int = 0  # tables that the published total excludes
    indexers: float = 0.0  # parameters of indexers that the published active count excludes


PUBLISHED = {
    "mistral_7b": Published("7.24"),  # safetensors: 7,241,732,096
    "longformer_base": Published("0.149"),  # arXiv:2110.00976, table 3
    "bigbird_base": Published("0.127"),  # arXiv:2110.00976, table 3
    "jamba": Published("52", "12"),  # arXiv:2403.19887
    "jamba_1_5_large": Published("398", "94"),  # arXiv:2408.12570
    "minimax_text_01": Published("456", "45.9", uncounted=2),  # arXiv:2501.08313
    "gemma3": Published("3.884"),  # arXiv:2503.19786, table 1: 675M + 3,209M
    "gpt_oss_20b": Published("20.91", "3.61", uncounted=1),  # arXiv:2508.10925, table 1
    "llama4": Published("109", "17", beside=0.87),  # model card of Scout; the vision encoder is beside
    "qwen3_next": Published("79", "3", uncounted=2, untotalled=2),  # model card: 80B, 79B without embeddings, 3B active
    "kimi_linear": Published("48", "3", uncounted=2, untotalled=2),  # arXiv:2510.26692
    "deepseek_v32": Published("671", "37", uncounted=1),  # arXiv:2412.19437; the indexers are beside
    "glm_5": Published("744", "40", uncounted=2),  # arXiv:2602.15763
    "minimax_m3": Published("428", "23", uncounted=2, indexers=57 * 6144 * 5 * 128 / 1e9),  # model card
    "deepseek_v4": Published("284", "13", uncounted=1),  # model card of DeepSeek-V4-Flash
    "qwen4_exp": Published("125", "6", uncounted=2),  # without 51B of n-grams; Qwen3.8-Flash-Next
    "nemotron_h": Published("8.1"),  # arXiv:2504.03624
    "falcon_h1": Published("33.64"),  # safetensors: 33,642,516,224; named 34B
    "samba": Published("0.421"),  # arXiv:2406.07522
    "griffin": Published("2.7"),  # arXiv:2404.07839; safetensors: 2,682,862,080
}
# Published with few digits: the count must round to them, and may differ by more than 1 %.
ROUNDED = {
    ("llama4", "17"),
    ("qwen3_next", "3"),
    ("kimi_linear", "3"),
    ("deepseek_v4", "13"),
    ("deepseek_v32", "37"),
    ("minimax_m3", "23"),
}

# Entries of the released config.json files.
RELEASED = {
    "mistral_7b": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
    },
    "longformer_base": {
        "model_type": "longformer",
        "vocab_size": 50_265,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "attention_window": [512] * 12,
        "max_position_embeddings": 4098,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "jamba": {
        "model_type": "jamba",
        "vocab_size": 65_536,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "jamba_1_5_large": {
        "model_type": "jamba",
        "vocab_size": 65_536,
        "hidden_size": 8192,
        "intermediate_size": 24_576,
        "num_hidden_layers": 72,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "mamba_dt_rank": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "minimax_text_01": {
        "model_type": "minimax",
        "vocab_size": 200_064,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
        "rope_theta": 1e7,
        "linear_attn_alpha_factor": 3.5565588200778455,
        "linear_attn_beta_factor": 1.0,
        "full_attn_alpha_factor": 3.5565588200778455,
        "full_attn_beta_factor": 1.0,
        "mlp_alpha_factor": 3.5565588200778455,
        "mlp_beta_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "tie_word_embeddings": False,
    },
    "nemotron_h": {
        "model_type": "nemotron_h",
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 21_504,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "num_hidden_layers": 52,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "tie_word_embeddings": False,
    },
    "deepseek_v32": {
        "model_type": "deepseek_v32",
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "glm_5": {
        "model_type": "glm_moe_dsa",
        "vocab_size": 154_880,
        "hidden_size": 6144,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "kv_lora_rank": 512,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 2048,
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    },
    "minimax_m3": {
        "model_type": "minimax_m3_vl_text",
        "vocab_size": 200_064,
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "dense_intermediate_size": 12_288,
        "shared_intermediate_size": 3072,
        "num_hidden_layers": 60,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
        "rope_parameters": {"rope_theta": 5_000_000, "partial_rotary_factor": 0.5, "rope_type": "default"},
    },
    "deepseek_v4": {
        "model_type": "deepseek_v4",
        "vocab_size": 129_280,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "swiglu_limit": 10.0,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "compress_rope_theta": 160_000,
        "rope_theta": 10_000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65_536,
            "type": "yarn",
        },
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "expert_dtype": "fp4",
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 1_048_576,
        "tie_word_embeddings": False,
    },
    "qwen4_exp": {  # the text section of the released file, without n-grams (`ple_layer_ids`: [2])
        "model_type": "qwen4_exp_text",
        "vocab_size": 248_320,
        "hidden_size": 2560,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "hidden_act": "silu",
        "output_gate_type": "sigmoid",
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 12,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "moe_intermediate_size": 640,
        "shared_expert_intermediate_size": 640,
        "hc_count": 4,
        "hc_lowrank": 320,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        "ple_layer_ids": [],
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": False,
    },
    "falcon_h1": {
        "model_type": "falcon_h1",
        "vocab_size": 261_120,
        "hidden_size": 5120,
        "intermediate_size": 21_504,
        "num_hidden_layers": 72,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "mamba_d_ssm": 4096,
        "mamba_n_heads": 32,
        "mamba_d_head": 128,
        "mamba_d_state": 256,
        "mamba_n_groups": 2,
        "mamba_d_conv": 4,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "rope_theta": 1e11,
        "rms_norm_eps": 1e-5,
        "embedding_multiplier": 5.656854249492381,
        "lm_head_multiplier": 0.0078125,
        "key_multiplier": 0.011048543456039804,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.0375,
        "ssm_in_multiplier": 0.25,
        "ssm_out_multiplier": 0.08838834764831845,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738],
        "mlp_multipliers": [0.1767766952966369, 0.011160714285714284],
        "tie_word_embeddings": False,
    },
}


def load(config, *overrides):
    return configs.check(configs.load(f"preset:{config}", parse_overrides(overrides)))


def account(model, length):
    layers, outside = account_model(model, length)
    return sum(layers, outside)


def close(name, actual, published):
    if (name, published) in ROUNDED:
        return f"{actual:.0f}" == published
    return actual == pytest.approx(float(published), rel=0.01)


def kinds(name, kind, part="mixer"):
    """Indices of the layers whose mixer or feed-forward part is of a kind."""
    model = load(name).model
    return [i for i, layer in enumerate(model.names) if isinstance(getattr(model.layers[layer], part), kind)]


def is_dense(pattern):
    return pattern.pairs(K256) == K256 * (K256 + 1) // 2


@pytest.fixture(params=sorted(PUBLISHED))
def name(request):
    return request.param


def test_every_preset_is_in_the_table():
    assert set(list_presets()) == {*PUBLISHED, "quickstart", "dense", "window", "hybrid"}


def test_an_unknown_preset_suggests_a_near_one_or_lists_all():
    with rejects(configs.ConfigError, "'jamba'"):
        load("jambo")
    with rejects(configs.ConfigError, "config") as caught:
        load("xyz")
    assert ", ".join(list_presets()) in str(caught.value)


def test_summaries_are_sentences():
    summaries = summarize_presets()
    assert list(summaries) == list_presets()
    assert all(summary.endswith(".") for summary in summaries.values())


def test_a_copy_of_a_preset_is_a_config_file(name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(Path(find_preset(name).__file__).read_text())
    assert configs.load(f"{file}:tiny") == configs.load(f"preset:{name}:tiny")


def test_parameters_are_those_published(name):
    model, published = load(name).model, PUBLISHED[name]
    actual, table = account(model, 1024), model.vocab * model.width / 1e9
    total = actual.parameters / 1e9 + published.beside - published.untotalled * table
    assert close(name, total, published.total)
    assert (published.active is None) == (actual.active_parameters == actual.parameters)
    if published.active is not None:
        excluded = published.uncounted * table + published.indexers
        assert close(name, actual.active_parameters / 1e9 - excluded, published.active)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mistral_7b", 7_241_732_096),
        ("jamba", 51_570_323_328),
        ("gpt_oss_20b", 20_914_757_184),
        ("falcon_h1", 33_642_516_224),
        ("griffin", 2_682_862_080),
        ("kimi_linear", 49_122_681_728),
    ],
)
def test_released_checkpoints_have_as_many_parameters(name, count):
    assert account(load(name).model, 1024).parameters == count


def plain(model):
    """A model without the names of layers and the settings of training, for comparisons."""

    def strip(layer):
        mlp, mixer = layer.mlp, layer.mixer
        if isinstance(mlp, ExpertsConfig):
            mlp = dataclasses.replace(mlp, balance_weight=0.0, bias_rate=0.0)
        if isinstance(mixer, AttentionConfig) and mixer.scale is None:
            mixer = dataclasses.replace(mixer, scale=mixer.head_width**-0.5)
        return dataclasses.replace(layer, mixer=mixer, mlp=mlp, remat="none")

    ends = model.vocab, model.width, model.norm, model.tied, model.causal, model.embedding, model.head
    return ends, model.hyper, [strip(model.layers[name]) for name in model.names]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_presets_equal_the_released_configurations(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]))
    released, _ = huggingface.describe(tmp_path)
    # transformers rotates whole heads; the paper and the released code rotate half of each.
    changes = ["model.layers.full.mixer.rope.fraction=1.0"] if name == "minimax_text_01" else []
    assert plain(load(name, *changes).model) == plain(released)


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("mistral_7b", 8192, "0.50"),
        ("mistral_7b", K256, "0.50"),
        ("jamba", K256, "4.01"),  # arXiv:2403.19887: 4 GB
        ("minimax_text_01", K256, "10.27"),
        ("gpt_oss_20b", K256, "6.00"),
        ("gpt_oss_20b", K256 // 2, "3.00"),
    ],
)
def test_caches_of_a_sequence_in_gibibytes(name, length, expected):
    assert f"{account(load(name).model, length).cache_bytes / GIB:.2f}" == expected


def test_a_dense_model_has_eight_times_the_cache_of_jamba():
    dense = load("mistral_7b", "model.layers.local.mixer.pattern=causal").model
    assert account(dense, K256).cache_bytes == 32 * GIB


@pytest.mark.parametrize(
    ("name", "depth", "attends", "routes"),
    [
        ("jamba", 32, lambda i: i % 8 == 4, lambda i: i % 2 == 1),
        ("jamba_1_5_large", 72, lambda i: i % 8 == 4, lambda i: i % 2 == 1),
        ("minimax_text_01", 80, lambda i: i % 8 == 7, lambda i: True),
        ("llama4", 48, lambda i: True, lambda i: True),
        ("qwen3_next", 48, lambda i: i % 4 == 3, lambda i: True),
        ("qwen4_exp", 48, lambda i: i % 4 == 3, lambda i: True),
        ("kimi_linear", 27, lambda i: i % 4 == 3 or i == 26, lambda i: i > 0),
        ("nemotron_h", 52, lambda i: i in (7, 18, 29, 40), lambda i: False),
        ("samba", 12, lambda i: i % 2 == 1, lambda i: False),
        ("griffin", 26, lambda i: i % 3 == 2, lambda i: False),
    ],
)
def test_which_layers_attend_and_which_have_experts(name, depth, attends, routes):
    assert kinds(name, AttentionConfig | LatentConfig) == [i for i in range(depth) if attends(i)]
    assert kinds(name, ExpertsConfig, "mlp") == [i for i in range(depth) if routes(i)]


@pytest.mark.parametrize(
    ("name", "period", "full", "window"),
    [
        ("gemma3", 6, 5, "causal & window(1023)"),
        ("gpt_oss_20b", 2, 1, "causal & window(127)"),
        ("llama4", 4, 3, "causal & chunk(8192)"),
    ],
)
def test_which_layers_attend_to_all_keys(name, period, full, window):
    model = load(name).model
    texts = [str(pattern) for _, pattern in model.connectivity]
    assert texts == ["causal" if i % period == full else window for i in range(len(texts))]


def test_which_layers_have_rotary_positions():
    def ropes(name):
        layers = load(name).model.layers.values()
        return {layer.mixer.rope for layer in layers if isinstance(layer.mixer, AttentionConfig)}

    assert ropes("jamba") == ropes("nemotron_h") == {None}
    assert [rope.fraction for rope in ropes("minimax_text_01")] == [0.5]
    assert load("llama4").model.layers["full"].mixer.rope is None
    assert load("jamba").model.embedding.positions == 0


@pytest.mark.parametrize(
    "name",
    ["jamba", "jamba_1_5_large", "minimax_text_01", "qwen3_next", "kimi_linear", "nemotron_h", "falcon_h1"],
)
def test_hybrids_with_dense_attention_have_no_sparse_layer(name):
    mixers = [layer.mixer for layer in load(name).model.layers.values() if layer.mixer is not None]
    assert all(is_dense(mixer.connectivity) for mixer in mixers)


def test_which_layers_are_recurrent():
    assert kinds("jamba", MambaConfig) == [i for i in range(32) if i % 8 != 4]
    assert kinds("minimax_text_01", LightningConfig) == [i for i in range(80) if i % 8 != 7]


def test_bigbird_is_an_encoder_with_global_tiles_or_tokens():
    itc, etc = load("bigbird_base:itc").model, load("bigbird_base:etc").model
    assert not itc.causal
    assert not etc.causal
    assert len({str(pattern) for _, pattern in itc.connectivity}) == 12  # a draw per layer
    assert {str(pattern) for _, pattern in etc.connectivity} == {
        "chunk(84) | shift(chunk(84), 84) | shift(chunk(84), -84) | globals(256)"
    }
    assert account(itc, 1024).parameters == account(etc, 1024).parameters


def test_rejects_an_unknown_argument(name):
    with rejects(configs.ConfigError, f"preset:{name}"):
        load(f"{name}:small")


def test_tiny_forms_are_small_and_keep_the_schedule(name):
    full, tiny = load(name).model, load(f"{name}:tiny")
    # Tiny forms begin with the same kinds of layers as the full forms.
    assert full.names[: len(tiny.model.names)] == tiny.model.names
    for layer in tiny.model.layers:
        for part in ("mixer", "mlp"):
            assert type(getattr(tiny.model.layers[layer], part)) is type(getattr(full.layers[layer], part))
    for layer, pattern in tiny.model.connectivity:
        dense, n = is_dense(full.layers[layer].connectivity), tiny.data.length
        assert dense == is_dense(pattern)
        assert dense or pattern.pairs(n) < 0.7 * n * (n + 1) / (2 if tiny.model.causal else 1)
    functions, tokens = Functional(tiny.model), jnp.zeros((1, tiny.data.length), jnp.int32)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(functions.shapes)) < 1_000_000
    logits = jax.eval_shape(lambda p: functions.bind(p)(tokens), functions.shapes)
    # The additional id is the mask.
    assert logits.shape == (1, tiny.data.length, 256 if tiny.model.causal else 257)


# Whether weight decay applies, by module and attribute: to the matrices of linear maps and to nothing else.
DECAY = {
    "Linear.weight": True,
    "BlockLinear.weight": True,
    "Relative.weight": True,
    "Adapter.down": True,
    "Adapter.up": True,
    "Experts.gate": True,
    "Experts.up": True,
    "Experts.down": True,
    "Compressed.group": True,
    "Head.weight": True,
    "Linear.bias": False,
    "BlockLinear.bias": False,
    "Experts.gate_bias": False,
    "Experts.up_bias": False,
    "Experts.down_bias": False,
    "Experts.selection_bias": False,
    "Experts.table": False,
    "Head.bias": False,
    "Relative.content": False,
    "Relative.position": False,
    "Attention.sinks": False,
    "Compressed.sinks": False,
    "Compressor.bias": False,
    "Sinkhorn.base": False,
    "Sinkhorn.scale": False,
    "Gated.scale": False,
    "Embedding.tokens": False,
    "Embedding.types": False,
    "Embedding.positions": False,
    "Embedding.axial": False,
    "Norm.scale": False,
    "Norm.bias": False,
    "GatedNorm.scale": False,
    "ShortConv.weight": False,
    "ShortConv.bias": False,
    "Mamba.dt_bias": False,
    "Mamba.log_decay": False,
    "Mamba.skip": False,
    "Mamba2.dt_bias": False,
    "Mamba2.log_decay": False,
    "Mamba2.skip": False,
    "Delta.dt_bias": False,
    "Delta.log_decay": False,
    "RgLru.decay": False,
}


def read_decay(model: nnx.Module) -> set[tuple[str, bool]]:
    """Returns `Module.attribute` of every parameter of a model, and whether weight decay applies to it."""
    nodes = dict(nnx.iter_graph(model))
    actual = set()
    for path, node in nodes.items():
        if isinstance(node, nnx.Param):
            depth = max(i for i in range(len(path)) if type(nodes[path[:i]]).__module__.startswith("sparsejax."))
            actual.add((f"{type(nodes[path[:depth]]).__name__}.{path[depth]}", node.decay))
    return actual


def test_weight_decay_applies_to_the_matrices_of_linear_maps(name):
    config = load(f"{name}:tiny").model
    actual = read_decay(nnx.eval_shape(lambda: Model(config, nnx.Rngs(0))))
    assert actual <= set(DECAY.items())
    assert {"Linear.weight", "Norm.scale", "Embedding.tokens"} <= {attribute for attribute, _ in actual}
    functional = Functional(config)
    matrices = jax.tree.map(lambda leaf, decay: decay and len(leaf.shape) < 2, functional.shapes, functional.decay)
    assert not any(jax.tree.leaves(matrices))


def test_weight_decay_of_parameters_that_no_preset_has():
    embedding = configs.EmbeddingConfig(axial=configs.AxialConfig(shape=(3, 4), widths=(2, 4)))
    config = dataclasses.replace(test_shared.CONFIG, embedding=embedding)
    actual = read_decay(nnx.eval_shape(lambda: Model(config, nnx.Rngs(0))))
    assert actual <= set(DECAY.items())
    assert {"Adapter.down", "Adapter.up", "Embedding.axial"} <= {attribute for attribute, _ in actual}


@pytest.mark.parametrize("name", ["mistral_7b", "gpt_oss_20b"])
def test_tiny_forms_learn(name):
    """`python -m benchmarks presets` trains all tiny forms."""
    config = load(f"{name}:tiny")
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    optimizer, steps = build_optimizer(config.optimizer, config.train.steps, decay=model.decay), config.train.steps
    step = build_step(model, optimizer, build_schedule(config.optimizer, steps), config.train, mesh)
    state, text = init_state(model, optimizer, 0, mesh), data.load_corpus("").train
    batches = data.train_batches(text, config.data.length, config.train.batch, seed=0)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, jax.device_put(next(batches), sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
