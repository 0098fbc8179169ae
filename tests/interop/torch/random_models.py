"""Random valid models of each family and their inputs, shared by both processes of `parity.py`.

A family is a function from a `Draw` to the keys of its configuration. Other keys keep the default of transformers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


class Draw:
    """A source of random choices."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.random.integers(len(options))]

    def number(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, inclusive."""
        return int(self.random.integers(low, high + 1))

    def real(self, low: float, high: float) -> float:
        """A number with three decimals."""
        return round(float(self.random.uniform(low, high)), 3)

    def chance(self, probability: float = 0.5) -> bool:
        """True with this probability."""
        return bool(self.random.random() < probability)

    def maybe(self, **keys: Any) -> dict[str, Any]:
        """A random subset of these keys."""
        return {key: value for key, value in keys.items() if self.chance()}


@dataclasses.dataclass(frozen=True)
class Traits:
    """Inputs that a model supports."""

    length: int
    left: bool = False  # padding on the left: decoders without biases that leak from padding
    right: bool = True  # padding on the right
    marked: bool = False  # global tokens
    plans: bool = False  # random tiles of training
    gradients: bool = True  # the reference supports gradients
    pad: int | None = None  # token id of padding


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its inputs, a function of a family, a seed and a number.

    Attributes:
      family: The `model_type`.
      config: Keys of the configuration class.
      legacy: Whether config.json has the legacy format, without keys that equal their defaults.
      traits: Kinds of inputs.
      inputs: `input_ids`, `labels` and masks, each [3, t].
    """

    family: str
    config: dict[str, Any]
    legacy: bool
    traits: Traits
    inputs: dict[str, np.ndarray]


def draw_case(family: str, seed: int, number: int) -> Case:
    """Draws the case of a number."""
    draw = Draw(np.random.default_rng([seed, zlib.crc32(family.encode()), number]))
    config, traits = FAMILIES[family](draw)
    config = {"vocab_size": draw.number(20, 70), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    return Case(family, config, draw.chance(0.4), traits, draw_inputs(draw, config["vocab_size"], traits))


def draw_inputs(draw: Draw, vocab: int, traits: Traits) -> dict[str, np.ndarray]:
    """Draws three rows: without padding, padded on the right, and padded wherever the model allows."""
    shape = rows, length = (3, traits.length)
    ids = draw.random.integers(3, vocab, shape)
    mask = np.ones(shape, np.int64)
    for row in range(1, rows):
        cut = draw.number(0, length - 1) if traits.right and (row == 1 or draw.chance()) else 0
        mask[row, length - cut :] = 0
        if traits.left and row == 2:
            mask[row, : draw.number(0, length - cut - 1)] = 0
    if traits.pad is not None:
        ids = np.where(mask, ids, traits.pad)
    inputs = {"input_ids": ids, "labels": draw.random.integers(0, vocab, shape), "attention_mask": mask}
    if traits.marked:
        chosen = [draw.random.random(length) < draw.pick(0.0, 0.05, 0.2) for _ in range(rows)]
        inputs["global_attention_mask"] = np.stack(chosen).astype(np.int64)
    return inputs


def draw_length(draw: Draw, longest: int = 70) -> int:
    """Draws a length, often a short one."""
    return draw.pick(1, 2, 3, draw.number(4, 20), draw.number(4, longest), draw.number(min(20, longest), longest))


def draw_heads(draw: Draw) -> tuple[int, int]:
    """Draws numbers of query heads and key/value heads."""
    shared = draw.number(1, 3)
    return shared * draw.number(1, 3), shared


def draw_rope(draw: Draw) -> dict[str, Any]:
    """Draws rotary positions of any type."""
    kind = draw.pick("default", "default", "linear", "yarn", "llama3")
    rope = {"rope_type": kind, "rope_theta": draw.pick(100.0, 1000.0, 10_000.0, 500_000.0)}
    if kind != "default":
        rope["factor"] = draw.pick(1.5, 2.0, 8.0)
    if kind == "yarn":
        rope |= draw.maybe(beta_fast=draw.pick(8.0, 32), beta_slow=draw.pick(0.5, 1, 2.0), truncate=draw.chance())
        rope |= draw.maybe(attention_factor=draw.real(0.8, 1.5), mscale=draw.real(0.5, 1.5))
        rope |= draw.maybe(mscale_all_dim=draw.real(0.5, 1.5))
    if kind == "llama3":
        rope |= {"low_freq_factor": draw.pick(1.0, 0.5), "high_freq_factor": draw.pick(4.0, 3)}
    if kind in ("yarn", "llama3"):
        rope |= draw.maybe(original_max_position_embeddings=draw.pick(16, 32, 100))
    return rope


def draw_ropes(draw: Draw) -> dict[str, Any]:
    """Draws rotary positions per layer type."""
    ropes = {kind: draw_rope(draw) for kind in ("full_attention", "sliding_attention")}
    for rope in ropes.values():
        rope.pop("truncate", None)  # transformers reads it from the wrong level
    return ropes


def draw_types(draw: Draw, depth: int, *types: str) -> dict[str, list[str]]:
    """Draws layer types in any order, or leaves them to the family."""
    return draw.maybe(layer_types=[draw.pick(*types) for _ in range(depth)])


def draw_encoder(draw: Draw, longest: int) -> dict[str, Any]:
    """Draws the keys that encoders with learned positions share."""
    heads = draw.number(1, 4)
    return {
        "hidden_size": heads * draw.pick(4, 6, 8),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.number(1, 4),
        "intermediate_size": draw.number(10, 40),
        "max_position_embeddings": longest,
        "type_vocab_size": draw.number(1, 3),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **draw.maybe(hidden_act=draw.pick("gelu", "relu", "gelu_new", "silu"), layer_norm_eps=draw.pick(1e-12, 1e-5)),
        **draw.maybe(tie_word_embeddings=draw.chance()),
    }


def longformer(draw: Draw) -> tuple[dict, Traits]:
    """Windows that divide the widest, as transformers requires; any number of global tokens."""
    length = draw_length(draw, 90)
    config = draw_encoder(draw, length + 2 + draw.number(0, 5))
    widest = draw.pick(4, 8, 12, 24)  # transformers fails with windows of 2
    divisors = [width for width in (4, 6, 8, 12, 24) if widest % width == 0]
    windows = [draw.pick(*divisors) for _ in range(config["num_hidden_layers"])]
    windows[-1] = widest
    config["attention_window"] = draw.pick(windows, widest)
    return config | {"pad_token_id": 1, "bos_token_id": 0}, Traits(length, marked=draw.chance(0.8), pad=1)


def big_bird(draw: Draw) -> tuple[dict, Traits]:
    """Lengths on both sides of the threshold of full attention; random tiles in training."""
    tile, random_tiles = draw.pick(3, 4, 8), draw.number(1, 3)
    sparse = draw.chance(0.75)
    length = (5 + 2 * random_tiles) * tile + draw.number(1, 5 * tile) if sparse else draw_length(draw, 5 * tile)
    config = draw_encoder(draw, length + -length % tile + draw.number(0, 5))  # padding has positions too
    config |= {"block_size": tile, "num_random_blocks": random_tiles}
    config |= draw.maybe(use_bias=draw.chance(), rescale_embeddings=draw.chance())
    full = {} if draw.chance(0.8) else {"attention_type": "original_full"}
    return config | full, Traits(length, plans=sparse and not full and draw.chance())


def draw_decoder(draw: Draw) -> dict[str, Any]:
    """Draws the keys that Llama-like decoders share."""
    heads, shared = draw_heads(draw)
    head = draw.pick(None, 4, 6, 8, 12)
    return {
        "hidden_size": heads * 2 * draw.number(2, 6) if head is None else heads * draw.number(4, 10),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head,
        "num_hidden_layers": draw.number(1, 3),
        "intermediate_size": draw.number(10, 40),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": draw_rope(draw),
        **draw.maybe(hidden_act=draw.pick("silu", "gelu", "relu", "gelu_pytorch_tanh"), rms_norm_eps=1e-3),
        **draw.maybe(tie_word_embeddings=draw.chance()),
    }


def draw_window(draw: Draw) -> int:
    """Draws a window, often a narrow one."""
    return draw.pick(1, 2, draw.number(3, 20), 200)


def llama(draw: Draw) -> tuple[dict, Traits]:
    """Biases in attention and MLPs, or none."""
    config = draw_decoder(draw) | draw.maybe(attention_bias=draw.chance(), mlp_bias=draw.chance())
    return config, Traits(draw_length(draw), left=True)


def mistral(draw: Draw) -> tuple[dict, Traits]:
    """Windows of any width, or none."""
    return draw_decoder(draw) | {"sliding_window": draw.pick(None, draw_window(draw))}, Traits(
        draw_length(draw), left=True
    )


def mixtral(draw: Draw) -> tuple[dict, Traits]:
    """Windows of any width, or none; any number of experts."""
    experts = draw.number(1, 6)
    config, traits = mistral(draw)
    return config | {"num_local_experts": experts, "num_experts_per_tok": draw.number(1, experts)}, traits


def draw_qwen(draw: Draw) -> dict[str, Any]:
    """Draws the keys that Qwen2 and Qwen3 share: windows from a layer on, by layer types, or none."""
    config = draw_decoder(draw)
    depth = config["num_hidden_layers"]
    if draw.chance(0.7):
        config |= {"use_sliding_window": True, "sliding_window": draw_window(draw)}
        config |= draw.maybe(max_window_layers=draw.number(0, depth))
        config |= draw_types(draw, depth, "sliding_attention", "full_attention")
    return config


def qwen2(draw: Draw) -> tuple[dict, Traits]:
    """See `draw_qwen`."""
    config = draw_qwen(draw)
    if config.pop("head_dim"):
        config["hidden_size"] = config["num_attention_heads"] * 2 * draw.number(2, 6)
    return config, Traits(draw_length(draw), left=True)


def qwen3(draw: Draw) -> tuple[dict, Traits]:
    """See `draw_qwen`; biases in attention, or none."""
    config = draw_qwen(draw) | draw.maybe(attention_bias=draw.chance())
    return config | {"head_dim": config["head_dim"] or 10}, Traits(draw_length(draw), left=True)


def gpt2(draw: Draw) -> tuple[dict, Traits]:
    """Any scales of the scores."""
    length, heads = draw_length(draw), draw.number(1, 4)
    config = {
        "n_embd": heads * draw.pick(4, 6, 7),
        "n_head": heads,
        "n_layer": draw.number(1, 4),
        "n_positions": length + draw.number(0, 5),
        **draw.maybe(n_inner=draw.number(10, 40), activation_function=draw.pick("gelu", "relu", "silu", "gelu_new")),
        **draw.maybe(scale_attn_weights=draw.chance(), scale_attn_by_inverse_layer_idx=draw.chance()),
        **draw.maybe(layer_norm_epsilon=1e-3, tie_word_embeddings=draw.chance()),
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }
    return config, Traits(length)


def bert(draw: Draw) -> tuple[dict, Traits]:
    """Any activation."""
    length = draw_length(draw, 90)
    return draw_encoder(draw, length + draw.number(0, 5)), Traits(length)


def roberta(draw: Draw) -> tuple[dict, Traits]:
    """Positions after the id of padding."""
    length, padding = draw_length(draw, 90), draw.pick(0, 1, 2)
    config = draw_encoder(draw, length + padding + 1 + draw.number(0, 5))
    return config | {"pad_token_id": padding}, Traits(length, pad=padding)


def gemma2(draw: Draw) -> tuple[dict, Traits]:
    """Layer types in any order; soft caps of scores and logits, or none."""
    heads, shared = draw_heads(draw)
    depth = draw.number(1, 4)
    config = {
        "hidden_size": heads * draw.number(4, 10),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": draw.pick(4, 6, 8, 16),
        "num_hidden_layers": depth,
        "intermediate_size": draw.number(10, 40),
        "sliding_window": draw.pick(1, 2, draw.number(3, 20), 200),
        "query_pre_attn_scalar": draw.number(4, 30),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": draw_rope(draw),
        **draw_types(draw, depth, "sliding_attention", "full_attention"),
        **draw.maybe(attn_logit_softcapping=draw.pick(None, 3.0), final_logit_softcapping=draw.pick(None, 5.0)),
        **draw.maybe(hidden_activation=draw.pick("gelu", "silu"), attention_bias=draw.chance(), rms_norm_eps=1e-3),
        **draw.maybe(tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def gemma3_text(draw: Draw) -> tuple[dict, Traits]:
    """Like Gemma 2, with rotary positions per layer type and any period."""
    config, traits = gemma2(draw)
    config["rope_parameters"] = draw_ropes(draw)
    config.pop("attn_logit_softcapping", None)  # transformers does not apply it
    if "layer_types" not in config:
        config |= {"num_hidden_layers": draw.number(1, 7), **draw.maybe(sliding_window_pattern=draw.number(1, 4))}
    return config, traits


def modernbert(draw: Draw) -> tuple[dict, Traits]:
    """Windows of any width, including odd ones; any biases."""
    heads, depth = draw.number(1, 4), draw.number(1, 5)
    biases = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias")
    config = {
        "hidden_size": heads * draw.pick(4, 6, 8),
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "intermediate_size": draw.number(10, 40),
        "local_attention": draw.number(2, 30),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": draw_ropes(draw),
        "cls_token_id": 1,
        "sep_token_id": 2,
        **draw_types(draw, depth, "sliding_attention", "full_attention"),
        **draw.maybe(**{key: draw.chance() for key in biases}),
        **draw.maybe(hidden_activation=draw.pick("gelu", "silu"), classifier_activation=draw.pick("relu", "silu")),
        **draw.maybe(norm_eps=1e-3, tie_word_embeddings=draw.chance()),
    }
    if "layer_types" not in config:
        config |= draw.maybe(global_attn_every_n_layers=draw.number(1, 4))
    return config, Traits(draw_length(draw))


def mamba(draw: Draw) -> tuple[dict, Traits]:
    """Any sizes of state, convolution, rank and expansion."""
    config = {
        "hidden_size": draw.number(8, 40),
        "num_hidden_layers": draw.number(1, 3),
        "state_size": draw.number(1, 9),
        "conv_kernel": draw.number(2, 5),
        "time_step_rank": draw.pick("auto", 1, draw.number(2, 5)),
        **draw.maybe(expand=draw.number(1, 3), use_bias=draw.chance(), use_conv_bias=draw.chance()),
        **draw.maybe(layer_norm_epsilon=1e-3, tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=not config.get("use_bias"))


def draw_groups(draw: Draw) -> tuple[int, int, int]:
    """Draws heads, head width and groups of a Mamba-2 mixer."""
    groups = draw.number(1, 3)
    return groups * draw.number(1, 3), draw.pick(2, 4, 6), groups


def draw_limit(draw: Draw) -> list[float]:
    """Draws bounds of step sizes that take effect."""
    return draw.pick([0.0, 0.9], [0.4, float("inf")], [0.3, 1.2], [0.0, float("inf")])


def mamba2(draw: Draw) -> tuple[dict, Traits]:
    """Any numbers of heads, groups and chunks."""
    heads, head, groups = draw_groups(draw)
    expand = draw.pick(*(n for n in (1, 2, 3) if heads * head % n == 0))
    config = {
        "hidden_size": heads * head // expand,
        "expand": expand,
        "num_heads": heads,
        "head_dim": head,
        "n_groups": groups,
        "num_hidden_layers": draw.number(1, 3),
        "state_size": draw.number(1, 9),
        "conv_kernel": draw.number(2, 5),
        "chunk_size": draw.pick(1, 4, 7, 16, 256),
        **draw.maybe(use_bias=draw.chance(), use_conv_bias=draw.chance(), time_step_limit=draw_limit(draw)),
        **draw.maybe(layer_norm_epsilon=1e-3, tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=not config.get("use_bias"))


def draw_hybrid(draw: Draw) -> dict[str, Any]:
    """Draws the keys that Bamba and Falcon-H1 share, without the size of the mixer."""
    heads, shared = draw_heads(draw)
    mixer_heads, mixer_head, groups = draw_groups(draw)
    config = {
        "hidden_size": heads * 2 * draw.number(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "num_hidden_layers": draw.number(1, 3),
        "intermediate_size": draw.number(10, 40),
        "mamba_n_heads": mixer_heads,
        "mamba_d_head": mixer_head,
        "mamba_n_groups": groups,
        "mamba_d_state": draw.number(1, 9),
        "mamba_d_conv": draw.number(2, 5),
        "mamba_chunk_size": draw.pick(1, 4, 7, 16, 256),
        "rope_parameters": draw_rope(draw),
        "max_position_embeddings": draw.pick(64, 128),
        **draw.maybe(time_step_limit=draw_limit(draw), rms_norm_eps=1e-3, tie_word_embeddings=draw.chance()),
        **draw.maybe(attention_bias=draw.chance(), mlp_bias=draw.chance(), mamba_conv_bias=draw.chance()),
    }
    return config | draw.maybe(mamba_proj_bias=draw.chance())


def bamba(draw: Draw) -> tuple[dict, Traits]:
    """Attention in any layers; mixers of `mamba_expand` times the width."""
    config = draw_hybrid(draw)
    heads, expand = config["num_attention_heads"], draw.pick(1, 2, 3)
    config["hidden_size"] = width = heads * draw.pick(4, 8, 12)
    fitting = [n for n in range(1, 9) if expand * width % n == 0]
    config |= {"mamba_expand": expand, "mamba_n_heads": (n := draw.pick(*fitting)), "mamba_d_head": expand * width // n}
    config["mamba_n_groups"] = draw.pick(*(g for g in range(1, n + 1) if n % g == 0))
    config["mamba_d_head"] = draw.pick("auto", config["mamba_d_head"])
    depth = config["num_hidden_layers"]
    config["attn_layer_indices"] = draw.pick(None, [i for i in range(depth) if draw.chance()])
    if draw.chance(0.3):
        config["rope_parameters"]["partial_rotary_factor"] = draw.pick(0.5, 1.0)
    return config, Traits(draw_length(draw), left=not config.get("mamba_proj_bias"))


def falcon_h1(draw: Draw) -> tuple[dict, Traits]:
    """Any factors; a norm before or after the gate, or none."""
    config = draw_hybrid(draw)
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    config["mamba_d_ssm"] = inner
    if draw.chance(0.2):
        config |= {"mamba_d_ssm": None, "mamba_expand": 1, "hidden_size": inner, "num_attention_heads": 2}
        config |= {"num_key_value_heads": draw.pick(1, 2), "head_dim": draw.pick(4, 8)}
    elif draw.chance(0.3):
        config["head_dim"] = draw.pick(4, 8, 12)
    names = ["embedding", "key", "attention_in", "attention_out", "ssm_in", "ssm_out", "lm_head"]
    config |= draw.maybe(**{f"{name}_multiplier": draw.real(0.5, 1.5) for name in names})
    config |= draw.maybe(mlp_multipliers=[draw.real(0.5, 1.5) for _ in range(2)])
    config |= draw.maybe(ssm_multipliers=[draw.real(0.5, 1.5) for _ in range(5)])
    config |= draw.maybe(mamba_rms_norm=draw.chance(0.7), mamba_norm_before_gate=draw.chance())
    config |= draw.maybe(projectors_bias=draw.chance())
    return config, Traits(draw_length(draw), left=not config.get("mamba_proj_bias"))


def zamba2(draw: Draw) -> tuple[dict, Traits]:
    """Alternating shared blocks with adapters of any rank."""
    heads, shared = draw_heads(draw)
    depth, groups, expand = draw.number(1, 6), draw.number(1, 3), draw.pick(1, 2)
    mixer_heads = groups * draw.number(1, 2)
    width = mixer_heads * heads * draw.pick(2, 4)
    kinds = ["linear_attention", *(draw.pick("linear_attention", "hybrid", "hybrid") for _ in range(depth))]
    config = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "intermediate_size": draw.number(10, 40),
        "n_mamba_heads": mixer_heads,
        "mamba_ngroups": groups,
        "mamba_expand": expand,
        "mamba_d_state": draw.number(1, 9),
        "mamba_d_conv": draw.number(2, 5),
        "chunk_size": draw.pick(1, 4, 7, 16, 256),
        "num_mem_blocks": draw.number(1, 3),
        "adapter_rank": draw.number(1, 5),
        "rope_parameters": draw_rope(draw),
        "max_position_embeddings": draw.pick(64, 128),
        **draw.maybe(time_step_min=1e-9, rms_norm_eps=1e-3, hidden_act=draw.pick("gelu", "silu")),
        **draw.maybe(use_conv_bias=draw.chance(), add_bias_linear=draw.chance(), use_mem_rope=draw.chance(0.8)),
        **draw.maybe(use_shared_attention_adapter=draw.chance(), tie_word_embeddings=draw.chance()),
    }
    if config.get("use_shared_attention_adapter"):
        config["num_key_value_heads"] = heads  # adapters of transformers do not support grouped heads
    return config, Traits(draw_length(draw), left=not config.get("add_bias_linear"))


def draw_experts(draw: Draw, *names: str) -> dict[str, Any]:
    """Draws numbers of experts and of experts per token, and their width, under these keys."""
    count = draw.number(2, 6)
    return dict(zip(names, (count, draw.number(1, min(3, count)), draw.number(4, 20)), strict=True))


def draw_groups_of_experts(draw: Draw) -> dict[str, int]:
    """Draws groups of at least two experts, and the number of selected groups."""
    groups, size = draw.number(1, 3), draw.number(2, 3)
    chosen = draw.number(1, groups)
    return {"experts": groups * size, "n_group": groups, "topk_group": chosen, "top": draw.number(1, chosen * size)}


def jamba(draw: Draw) -> tuple[dict, Traits]:
    """Any periods and offsets of attention and experts."""
    heads, shared = draw_heads(draw)
    attend, route = draw.number(1, 4), draw.number(1, 3)
    config = {
        "hidden_size": heads * draw.number(3, 8),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "num_hidden_layers": draw.number(1, 5),
        "attn_layer_period": attend,
        "attn_layer_offset": draw.number(0, attend - 1),
        "expert_layer_period": route,
        "expert_layer_offset": draw.number(0, route - 1),
        "mamba_d_state": draw.number(1, 9),
        "mamba_d_conv": draw.number(2, 5),
        "mamba_dt_rank": draw.pick("auto", 1, draw.number(2, 5)),
        **draw_experts(draw, "num_experts", "num_experts_per_tok", "intermediate_size"),
        **draw.maybe(mamba_expand=draw.number(1, 3), mamba_proj_bias=draw.chance(), mamba_conv_bias=draw.chance()),
        **draw.maybe(rms_norm_eps=1e-3, tie_word_embeddings=draw.chance()),
    }
    if draw.chance(0.2):
        config |= {"num_experts": 1, "num_experts_per_tok": 1}
    return config, Traits(draw_length(draw), left=not config.get("mamba_proj_bias"))


def gpt_oss(draw: Draw) -> tuple[dict, Traits]:
    """Windows in any order, and clamps that take effect."""
    heads, shared = draw_heads(draw)
    depth = draw.number(1, 4)
    config = {
        "hidden_size": draw.number(10, 40),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": draw.pick(4, 6, 8, 16),
        "num_hidden_layers": depth,
        "sliding_window": draw.pick(1, 2, draw.number(3, 20), 200),
        "max_position_embeddings": draw.pick(64, 128),
        **draw_experts(draw, "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        **draw_types(draw, depth, "sliding_attention", "full_attention"),
        **draw.maybe(rope_parameters=draw_rope(draw), swiglu_limit=draw.real(0.5, 2), swiglu_alpha=draw.real(1, 2)),
        **draw.maybe(attention_bias=draw.chance(), rms_norm_eps=1e-3, tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def minimax(draw: Draw) -> tuple[dict, Traits]:
    """Lightning and softmax attention in any order; any residual factors."""
    heads, shared = draw_heads(draw)
    depth = draw.number(1, 4)
    names = [f"{part}_{name}_factor" for part in ("full_attn", "linear_attn", "mlp") for name in ("alpha", "beta")]
    config = {
        "hidden_size": heads * 2 * draw.number(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": draw.pick(None, 4, 6, 8),
        "num_hidden_layers": depth,
        "block_size": draw.pick(1, 4, 7, 16, 256),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": draw_rope(draw),
        **draw_experts(draw, "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        **draw_types(draw, depth, "linear_attention", "full_attention"),
        **draw.maybe(**{name: draw.real(0.5, 2.0) for name in names}),
        **draw.maybe(sliding_window=draw.number(1, 20), rms_norm_eps=1e-3, tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def nemotron_h(draw: Draw) -> tuple[dict, Traits]:
    """Layer types in any order; experts in groups or in a latent space."""
    heads, shared = draw_heads(draw)
    mixer_heads, mixer_head, groups = draw_groups(draw)
    kinds = [draw.pick("linear_attention", "full_attention", "mlp", "moe") for _ in range(draw.number(1, 5))]
    experts = draw_groups_of_experts(draw)
    config = {
        "hidden_size": draw.number(8, 40),
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": draw.number(3, 10),
        "intermediate_size": draw.number(10, 40),
        "mamba_num_heads": mixer_heads,
        "mamba_head_dim": mixer_head,
        "n_groups": groups,
        "ssm_state_size": draw.number(1, 9),
        "conv_kernel": draw.number(2, 5),
        "chunk_size": draw.pick(1, 4, 7, 16, 256),
        "n_routed_experts": experts["experts"],
        "num_experts_per_tok": experts["top"],
        "n_group": experts["n_group"],
        "topk_group": experts["topk_group"],
        "moe_intermediate_size": draw.number(4, 20),
        "moe_shared_expert_intermediate_size": draw.number(4, 20),
        **draw.maybe(time_step_min=1e-9, layer_norm_epsilon=1e-3, moe_latent_size=draw.number(4, 12)),
        **draw.maybe(norm_topk_prob=draw.chance(), routed_scaling_factor=draw.real(0.5, 2.5)),
        **draw.maybe(use_bias=draw.chance(), use_conv_bias=draw.chance(), attention_bias=draw.chance()),
        **draw.maybe(mlp_bias=draw.chance(), mlp_hidden_act=draw.pick("relu2", "silu"), tie_word_embeddings=True),
    }
    return config, Traits(draw_length(draw), left=not config.get("use_bias"))


def draw_latent(draw: Draw, rope_width: int) -> dict[str, Any]:
    """Draws ranks and widths of latent attention."""
    return {
        "kv_lora_rank": draw.number(4, 20),
        "qk_nope_head_dim": draw.number(2, 10),
        "qk_rope_head_dim": rope_width,
        "v_head_dim": draw.number(3, 12),
    }


def deepseek_v32(draw: Draw) -> tuple[dict, Traits]:
    """Indexers that select few keys or all; enough heads that few index scores are zero."""
    heads, depth, rope_width = draw.number(1, 4), draw.number(1, 3), draw.pick(2, 4, 8)
    experts = draw_groups_of_experts(draw)
    config = {
        "hidden_size": draw.number(8, 40),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw.number(4, 20),
        "intermediate_size": draw.number(10, 40),
        "moe_intermediate_size": draw.number(4, 20),
        "n_routed_experts": experts["experts"],
        "num_experts_per_tok": experts["top"],
        "n_group": experts["n_group"],
        "topk_group": experts["topk_group"],
        "index_topk": draw.pick(1, draw.number(2, 12), 100),
        "index_n_heads": draw.number(16, 24),
        "index_head_dim": rope_width + 2 * draw.number(0, 4),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": draw_rope(draw),
        **draw_latent(draw, rope_width),
        **draw.maybe(first_k_dense_replace=draw.number(0, depth), rms_norm_eps=1e-3, norm_topk_prob=draw.chance()),
        **draw.maybe(routed_scaling_factor=draw.real(0.5, 2.5), n_shared_experts=draw.number(1, 2)),
        **draw.maybe(mlp_layer_types=[draw.pick("dense", "sparse") for _ in range(depth)]),
        **draw.maybe(attention_bias=draw.chance(), tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def qwen3_next(draw: Draw) -> tuple[dict, Traits]:
    """Delta rule and gated attention in any order; experts in some layers."""
    heads, shared = draw_heads(draw)
    keys, depth = draw.number(1, 3), draw.number(1, 4)
    rope = draw_rope(draw) | {"partial_rotary_factor": draw.pick(0.25, 0.5, 1.0)}
    config = {
        "hidden_size": draw.number(8, 40),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": draw.pick(8, 16),
        "intermediate_size": draw.number(10, 40),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw.number(1, 3),
        "linear_key_head_dim": draw.number(2, 10),
        "linear_value_head_dim": draw.number(2, 10),
        "linear_conv_kernel_dim": draw.number(2, 5),
        "shared_expert_intermediate_size": draw.number(4, 20),
        "max_position_embeddings": draw.pick(64, 128),
        "rope_parameters": rope,
        **draw_experts(draw, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        **draw_types(draw, depth, "linear_attention", "full_attention"),
        **draw.maybe(decoder_sparse_step=draw.number(1, 3), mlp_only_layers=[draw.number(0, depth - 1)]),
        **draw.maybe(norm_topk_prob=draw.chance(), attention_bias=draw.chance(), rms_norm_eps=1e-3),
        **draw.maybe(tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def kimi_linear(draw: Draw) -> tuple[dict, Traits]:
    """Delta rule with a decay per channel and latent attention in any order; experts in some layers."""
    heads, depth = draw.number(1, 4), draw.number(1, 4)
    experts = draw_groups_of_experts(draw)
    config = {
        "hidden_size": draw.number(8, 40),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": draw.number(10, 40),
        "moe_intermediate_size": draw.number(4, 20),
        "num_local_experts": experts["experts"],
        "num_experts_per_tok": experts["top"],
        "n_group": experts["n_group"],
        "topk_group": experts["topk_group"],
        "linear_head_dim": draw.number(2, 10),
        "linear_num_heads": draw.number(1, 4),
        "linear_conv_kernel_dim": draw.number(2, 5),
        "max_position_embeddings": draw.pick(64, 128),
        **draw_latent(draw, draw.pick(2, 4)),
        **draw_types(draw, depth, "linear_attention", "full_attention"),
        **draw.maybe(mlp_layer_types=[draw.pick("dense", "sparse") for _ in range(depth)]),
        **draw.maybe(norm_topk_prob=draw.chance(), routed_scaling_factor=draw.real(0.5, 2.5), rms_norm_eps=1e-3),
        **draw.maybe(n_shared_experts=draw.number(1, 2), tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


def reformer(draw: Draw) -> tuple[dict, Traits]:
    """Any numbers of chunks, neighbours and hashes; axial or plain positions."""
    heads = draw.number(1, 4)
    local, lsh = draw.pick(4, 6, 8), draw.pick(4, 8)
    rows, columns = draw.number(3, 9), draw.number(8, 12)
    positions = rows * columns
    first = draw.number(2, 10)
    causal = draw.chance(0.7)
    config = {
        "attention_head_size": draw.pick(2, 4, 8),
        "num_attention_heads": heads,
        "attn_layers": [draw.pick("local", "lsh") for _ in range(draw.number(1, 4))],
        "axial_pos_embds": draw.chance(0.7),
        "axial_pos_shape": [rows, columns],
        "axial_pos_embds_dim": [first, (second := draw.number(4, 20))],
        "hidden_size": first + second,
        "feed_forward_size": draw.number(10, 40),
        "local_attn_chunk_length": local,
        "lsh_attn_chunk_length": lsh,
        "local_num_chunks_before": draw.number(0, 2),
        "local_num_chunks_after": 0 if causal else draw.number(0, 1),
        "lsh_num_chunks_before": draw.number(0, 2),
        "lsh_num_chunks_after": 0 if causal else draw.number(0, 1),
        "max_position_embeddings": positions,
        "num_buckets": draw.pick(None, 2, 4, 8, [2, 4]),
        "num_hashes": draw.number(1, 3),
        "hash_seed": draw.number(0, 99),
        "is_decoder": causal,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        **draw.maybe(hidden_act=draw.pick("relu", "gelu"), layer_norm_eps=1e-5),
    }
    length = draw.number(1, positions - positions % (local * lsh) or positions)
    return config, Traits(length, gradients=False)


def recurrent_gemma(draw: Draw) -> tuple[dict, Traits]:
    """Any period of blocks, windows and widths of the recurrence."""
    heads, shared = draw_heads(draw)
    config = {
        "hidden_size": heads * draw.pick(4, 8, 12),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.pick(None, shared),
        "num_hidden_layers": draw.number(1, 5),
        "intermediate_size": draw.number(10, 60),
        "attention_window_size": draw_window(draw),
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": draw.pick(0.5, 1.0)},
        "block_types": [draw.pick("recurrent", "attention") for _ in range(draw.number(1, 3))],
        **draw.maybe(lru_width=heads * draw.number(2, 9), conv1d_width=draw.number(2, 5), logits_soft_cap=5.0),
        **draw.maybe(attention_bias=draw.chance(), rms_norm_eps=1e-3, tie_word_embeddings=draw.chance()),
    }
    return config, Traits(draw_length(draw))


def granitemoehybrid(draw: Draw) -> tuple[dict, Traits]:
    """Any factors; experts, or the shared MLP alone; rotary positions, or none."""
    config, traits = bamba(draw)
    config.pop("attn_layer_indices")
    config.pop("mlp_bias", None)
    config["rope_parameters"].pop("partial_rotary_factor", None)
    experts = draw.pick(0, draw.number(1, 6))
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    config |= {
        "num_local_experts": experts,
        "num_experts_per_tok": draw.number(1, max(experts, 1)),
        "shared_intermediate_size": draw.number(10, 40),
        "position_embedding_type": draw.pick(None, "rope"),
        **draw.maybe(**{name: draw.real(0.5, 1.5) for name in names}),
        **draw_types(draw, config["num_hidden_layers"], "linear_attention", "full_attention"),
    }
    return config, traits


def lfm2(draw: Draw) -> tuple[dict, Traits]:
    """Layer types in any order; any rounding of the width of the MLPs."""
    config = draw_decoder(draw)
    config.pop("hidden_act", None)
    config["hidden_size"] = config["num_attention_heads"] * 2 * draw.number(2, 6)
    depth = config["num_hidden_layers"]
    del config["head_dim"]
    config |= draw.maybe(full_attn_idxs=[i for i in range(depth) if draw.chance()])
    config |= draw_types(draw, depth, "conv", "full_attention") | draw.maybe(norm_eps=1e-3, conv_bias=draw.chance())
    config |= {"block_multiple_of": draw.pick(1, 8), "conv_L_cache": draw.number(2, 5)}
    config |= draw.maybe(block_auto_adjust_ff_dim=draw.chance(), block_ffn_dim_multiplier=draw.pick(0.8, 1.3))
    config.pop("rms_norm_eps", None)
    return config, Traits(draw_length(draw), left=not config.get("conv_bias"))


def olmo3(draw: Draw) -> tuple[dict, Traits]:
    """Layer types in any order, with rotary positions of any type."""
    config = draw_decoder(draw)
    config |= {"rope_parameters": draw_ropes(draw), "sliding_window": draw_window(draw)}
    if config.pop("head_dim"):
        config["hidden_size"] = config["num_attention_heads"] * 2 * draw.number(2, 6)
    config |= draw_types(draw, config["num_hidden_layers"], "sliding_attention", "full_attention")
    return config | draw.maybe(attention_bias=draw.chance()), Traits(draw_length(draw), left=True)


def cohere2(draw: Draw) -> tuple[dict, Traits]:
    """Layer types in any order, or any period."""
    config, traits = olmo3(draw)
    config |= {"rope_parameters": draw_rope(draw), "num_hidden_layers": (depth := draw.number(1, 5))}
    config |= {"layer_types": [draw.pick("sliding_attention", "full_attention") for _ in range(depth)]}
    if draw.chance():
        del config["layer_types"]
        config |= draw.maybe(sliding_window_pattern=draw.number(1, 4))
    config.pop("rms_norm_eps", None)
    return config | draw.maybe(layer_norm_eps=1e-3, logit_scale=draw.real(0.1, 2.0)), traits


def llama4_text(draw: Draw) -> tuple[dict, Traits]:
    """Any layers with experts and rotary positions; any chunks and growth of the scores."""
    config = draw_decoder(draw)
    depth, experts = draw.number(1, 5), draw.number(1, 5)
    while config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"] = draw_rope(draw)
    config |= {
        "head_dim": config["head_dim"] or 8,
        "num_hidden_layers": depth,
        "intermediate_size_mlp": draw.number(10, 40),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.number(1, experts),
        "attention_chunk_size": draw.number(2, 20),
        "floor_scale": draw.number(1, 20),
        "attn_scale": draw.real(0.1, 0.9),
        **draw.maybe(
            moe_layers=[i for i in range(depth) if draw.chance()], interleave_moe_layer_step=draw.number(1, 3)
        ),
        **draw.maybe(
            no_rope_layers=[draw.number(0, 1) for _ in range(depth)], no_rope_layer_interval=draw.number(1, 4)
        ),
        **draw.maybe(use_qk_norm=draw.chance(), attn_temperature_tuning=draw.chance(), attention_bias=draw.chance()),
    }
    return config, Traits(draw_length(draw))


def olmo_hybrid(draw: Draw) -> tuple[dict, Traits]:
    """Both types of layers in any order; convolutions of one width, since transformers 5.23 saves others wrongly."""
    config = draw_decoder(draw)
    config.pop("hidden_act", None)
    if config.pop("head_dim"):
        config["hidden_size"] = config["num_attention_heads"] * 2 * draw.number(2, 6)
    keys, share, width = draw.number(1, 3), draw.number(1, 3), draw.number(2, 6)
    rope = draw.pick({"rope_type": "default", "rope_theta": None}, {"rope_type": "default", "rope_theta": 1000.0})
    types = ["linear_attention", "full_attention", *(draw.pick("linear_attention", "full_attention") for _ in range(2))]
    draw.random.shuffle(types)
    config |= {
        "rope_parameters": rope,
        "layer_types": types,
        "num_hidden_layers": len(types),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * share,
        "linear_key_head_dim": width * share,
        "linear_value_head_dim": width,
        **draw.maybe(linear_conv_kernel_dim=draw.number(2, 5), linear_allow_neg_eigval=draw.chance()),
        **draw.maybe(attention_bias=draw.chance()),
    }
    return config, Traits(draw_length(draw), left=True)


# `model_type` -> its function.
FAMILIES: dict[str, Callable[[Draw], tuple[dict, Traits]]] = {
    "bamba": bamba,
    "bert": bert,
    "big_bird": big_bird,
    "cohere2": cohere2,
    "deepseek_v32": deepseek_v32,
    "falcon_h1": falcon_h1,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_oss": gpt_oss,
    "granitemoehybrid": granitemoehybrid,
    "jamba": jamba,
    "kimi_linear": kimi_linear,
    "lfm2": lfm2,
    "llama": llama,
    "llama4_text": llama4_text,
    "longformer": longformer,
    "mamba": mamba,
    "mamba2": mamba2,
    "minimax": minimax,
    "mistral": mistral,
    "mixtral": mixtral,
    "modernbert": modernbert,
    "nemotron_h": nemotron_h,
    "olmo3": olmo3,
    "olmo_hybrid": olmo_hybrid,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_next": qwen3_next,
    "recurrent_gemma": recurrent_gemma,
    "reformer": reformer,
    "roberta": roberta,
    "zamba2": zamba2,
}


def to_legacy(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Converts a config.json to the legacy format, with top-level rotary keys and layer types by their period."""
    if family == "nemotron_h":
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        return config | {"hybrid_override_pattern": "".join(letters[kind] for kind in config.pop("layers_block_type"))}
    if family == "granitemoehybrid" and "layer_types" in config:
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        config["layer_types"] = [names[kind] for kind in config["layer_types"]]
    if family == "olmo3":  # transformers reads the older base of one of the two layer types only
        return config
    ropes = config.pop("rope_parameters", None)
    if ropes is None:
        return config
    if family not in ("gemma3_text", "modernbert"):
        config["rope_theta"] = ropes.pop("rope_theta")
        partial = ropes.pop("partial_rotary_factor", None)
        scaling = {"type" if key == "rope_type" else key: value for key, value in ropes.items()}
        legacy = {} if family == "bamba" or partial is None else {"partial_rotary_factor": partial}
        return config | legacy | {"rope_scaling": None if ropes["rope_type"] == "default" else scaling}
    full, local = ropes["full_attention"], ropes["sliding_attention"]
    names = (
        ("rope_theta", "rope_local_base_freq") if family == "gemma3_text" else ("global_rope_theta", "local_rope_theta")
    )
    config |= dict(zip(names, (full.pop("rope_theta"), local.pop("rope_theta")), strict=True))
    if "sliding_window_pattern" in config or "global_attn_every_n_layers" in config:
        config.pop("layer_types", None)
    return config | {"rope_scaling": None if full["rope_type"] == "default" else full}
