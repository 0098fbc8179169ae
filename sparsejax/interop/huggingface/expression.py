"""The config.json that describes a model: the inverse of the translations of `families`.

A translation reads a config.json key by key. Here it reads from `Answers`, which looks each value up in a model and
records it. What was recorded is the config.json, if the translation of it is the model; otherwise the first field in
which they differ is what the family cannot express.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from sparsejax import patterns
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError, shorten
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.families import FAMILIES
from sparsejax.interop.huggingface.fields import REQUIRED, Fields
from sparsejax.interop.huggingface.rope import ROPE_TYPES
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.layers import (
    AttentionConfig,
    CompressedConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    LshConfig,
    Mamba2Config,
    MambaConfig,
    MlpConfig,
    NormConfig,
    ParallelConfig,
)
from sparsejax.patterns import Pattern

# Fields that do not affect the logits: dtypes, compilation, initial values, and the losses and the dropout of training.
INERT = {
    *("dtype", "param_dtype", "scan", "remat", "impl", "chunk"),
    *("dt_min", "dt_max", "decay_min", "decay_max", "dropout", "allow_leaks"),
    *("balance", "balance_weight", "bias_rate", "router_z_weight", "loss_weight"),
}
BY_LAYER = {"schedule", "layers"}  # compared layer by layer, since the names of layers are free
ROWS = 2**18  # queries that `find_span` examines, and most positions that patterns are compared on
SHOWN = 3  # families in an error
OTHER_SECTION, REJECTED = 5, 12  # distances of a section of another kind, and of a rejected value
TYPE_KEYS = ("layer_types", "layers_block_type", "block_types")
ABSENT = object()  # the answer about a key that is left out

Difference: TypeAlias = tuple[str, Any, Any]  # path of a field, and the two values


# Comparison of models


def find_differences(first: Any, second: Any, path: str = "") -> Iterator[Difference]:
    """Yields the fields in which two configurations describe models with different logits.

    Layers are compared in the order of the schedules, and named as in `second`.
    """
    if isinstance(first, ModelConfig) and isinstance(second, ModelConfig):
        yield from _compare_fields(first, second, path)
        if len(first.names) != len(second.names):
            yield "schedule", first.schedule, second.schedule
            return
        for pair in dict.fromkeys(zip(first.names, second.names, strict=True)):
            yield from find_differences(first.layers[pair[0]], second.layers[pair[1]], f"layers.{pair[1]}")
    elif isinstance(first, Pattern) and isinstance(second, Pattern):
        if not _same_pattern(first, second):
            yield path, str(first), str(second)
    elif dataclasses.is_dataclass(first) and type(first) is type(second):
        yield from _compare_fields(_make_explicit(first), _make_explicit(second), path)
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from find_differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, float) and isinstance(second, float):
        if not math.isclose(first, second, rel_tol=1e-12):
            yield path, first, second
    elif first != second:
        yield path, first, second


def _compare_fields(first: Any, second: Any, path: str) -> Iterator[Difference]:
    skipped = INERT | BY_LAYER if isinstance(first, ModelConfig) else INERT
    if isinstance(first, LshConfig):  # whose chunks determine which keys a query attends to
        skipped = skipped - {"chunk"}
    for field in dataclasses.fields(first):
        if field.name not in skipped:
            values = [getattr(config, field.name) for config in (first, second)]
            values = [patterns.parse(value) for value in values] if field.name == "pattern" else values
            yield from find_differences(*values, f"{path}.{field.name}" if path else field.name)


def _make_explicit(config: Any) -> Any:
    """Returns an equivalent configuration, without defaults that depend on other fields and without unused values."""
    changes: dict[str, Any] = {}
    if isinstance(config, AttentionConfig):
        changes["scale"] = config.head_width**-0.5 if config.scale is None else config.scale
        changes |= {} if config.growth else {"growth_period": 1}
        changes |= {} if config.qk_norm else {"qk_norm_joint": False}
    elif isinstance(config, LatentConfig):
        width = config.nope_width + config.rope_width
        changes["scale"] = width**-0.5 if config.scale is None else config.scale
    elif isinstance(config, Mamba2Config):
        changes["multipliers"] = () if set(config.multipliers) == {1.0} else config.multipliers
        changes |= {"norm_groups": 1, "norm_before_gate": False} if config.norm_eps is None else {}
    elif isinstance(config, NormConfig) and config.kind == "rms":
        changes["bias"] = True
    elif isinstance(config, MlpConfig) and config.kind == "plain":
        changes["gate_scale"] = 1.0
    return dataclasses.replace(config, **changes)


def _same_pattern(first: Pattern, second: Pattern) -> bool:
    """Whether two patterns are equal, or have the same keys on sequences that are longer than any number in them."""
    if first == second:
        return True
    longest = max(map(int, re.findall(r"\d+", f"{first} {second} 64")))
    if first.repeats or second.repeats or first.heads != second.heads or longest > ROWS:
        return False
    return all(
        (a - b).pairs(length) == (b - a).pairs(length) == 0
        for a, b in zip(first.by_head(), second.by_head(), strict=True)
        for length in (2 * longest + 1, min(64 * longest, ROWS))
    )


@functools.cache
def find_span(pattern: Pattern) -> int | None:
    """Returns the first query that does not attend to the first key; None if all queries do.

    It is w for the window `mistral(w)`, c for chunks of c keys, and left + 1 for `window(left, right)`.
    """
    queries = np.arange(ROWS)
    missing = ~np.broadcast_to(pattern.for_head(0).allows(queries, np.zeros(1, int), ROWS, ROWS), ROWS)
    return int(missing.argmax()) if missing.any() else None


# The values of keys


class Missing(LookupError):
    """A part that a model does not have."""


class View:
    """The parts of a model by kind: the first of each in the order of the layers.

    Attributes:
      model: The model.
      layers: Name and configuration of each layer, in order.
      parts: Kind -> path and configuration. Kinds are `model`, `layer`, the kinds of mixers and feed-forward parts,
        `local` and `full` (attention), `window`, `csa` and `hca` (compressed attention), `ssm` (Mamba and Mamba-2),
        and `KIND_layer` and `KIND_branch` around a mixer.
    """

    def __init__(self, model: ModelConfig):
        self.model = model
        self.layers = [(name, model.layers[name]) for name in model.names]
        self.parts: dict[str, tuple[str, Any]] = {"model": ("", model)}
        for name, layer in self.layers:
            self._add("layer", f"layers.{name}", layer)
            self._add_mixer(f"layers.{name}", layer.mixer, layer)
            self._add("experts" if isinstance(layer.mlp, ExpertsConfig) else "mlp", f"layers.{name}.mlp", layer.mlp)
            self._add("side", f"layers.{name}.side", layer.side)
        for name, block in model.shared.items():
            self._add_mixer(f"shared.{name}", block.mixer, None)
            self._add("mlp", f"shared.{name}.mlp", block.mlp)

    def _add(self, kind: str, path: str, part: Any) -> None:
        if part is not None:
            self.parts.setdefault(kind, (path, part))

    def _add_mixer(self, path: str, mixer: Any, layer: LayerConfig | None) -> None:
        if isinstance(mixer, ParallelConfig):
            for name, branch in mixer.branches.items():
                self._add(f"{_kind_of(branch.mixer)}_branch", f"{path}.mixer.branches.{name}", branch)
                self._add_mixer(f"{path}.mixer.branches.{name}", branch.mixer, layer)
        elif mixer is not None:
            kinds = [_kind_of(mixer)]
            kinds += [_entries_of(mixer)] if isinstance(mixer, CompressedConfig) else []
            kinds += ["ssm"] if isinstance(mixer, MambaConfig | Mamba2Config) else []
            kinds += ["full" if find_span(mixer.connectivity) is None else "local"] if kinds == ["attention"] else []
            kinds += ["indexed"] if any(not indexer.shared for indexer in mixer.indexers) else []
            for kind in kinds:
                self._add(kind, f"{path}.mixer", _make_explicit(mixer))
                self._add(f"{kind}_layer", path, layer)

    def has(self, kind: str) -> bool:
        """Whether the model has a part of a kind."""
        return kind in self.parts

    def get(self, path: str) -> Any:
        """Returns the value of a path, such as `attention.heads`.

        Raises:
          Missing: The model has no such part.
        """
        kind, *names = path.split(".")
        if kind not in self.parts:
            raise Missing(kind)
        value = self.parts[kind][1]
        for name in names:
            if value is None:
                raise Missing(path)
            value = getattr(value, name)
        return value

    def locate(self, path: str) -> str:
        """Returns a path of `get` as a path of the configuration."""
        kind, _, name = path.partition(".")
        return ".".join(filter(None, (self.parts.get(kind, ("", None))[0], name)))

    def types(self, **names: str) -> list[str]:
        """Returns the type of each layer: full, local, linear, conv, mlp or experts, with other names for some."""
        return [names.get(kind, kind) for kind in (_type_of(layer) for _, layer in self.layers)]

    def routed(self) -> list[bool]:
        """Whether each layer has experts."""
        return [isinstance(layer.mlp, ExpertsConfig) for _, layer in self.layers]

    def ratio(self) -> int | float:
        """Returns the channels of Mamba per channel of the stream; an integer if it is one."""
        inner, width = self.get("ssm.inner"), self.model.width
        return inner / width if inner % width else inner // width


def _kind_of(mixer: Any) -> str:
    return type(mixer).__name__.removesuffix("Config").lower()


def _type_of(layer: LayerConfig) -> str:
    if layer.mixer is None:
        return "experts" if isinstance(layer.mlp, ExpertsConfig) else "mlp"
    kind = _kind_of(layer.mixer)
    if kind in ("attention", "latent"):
        return "full" if find_span(layer.mixer.connectivity) is None else "local"
    return "conv" if kind == "conv" else "linear"


def _activation(view: View) -> str:
    name = view.get("mlp.activation" if view.has("mlp") else "experts.activation")
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def _rope(view: View, kind: str = "", partial: bool = False) -> Any:
    """The `rope_parameters` of a kind of attention; `partial` writes a fraction of 1, too."""
    kind = kind if view.has(kind) else "attention" if view.has("attention") else "latent"
    rope = view.get(f"{kind}.rope")
    if rope is None:
        return ABSENT
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.fraction != 1 or partial:
        values["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        scaling = dataclasses.asdict(rope.scaling)
        keys = {field: key for key, field in ROPE_TYPES[rope.scaling.kind].items() if field in scaling}
        values |= {key: scaling[field] for field, key in keys.items() if scaling[field] is not None}
        values["rope_type"] = rope.scaling.kind
    return values


def _ropes(view: View) -> Any:
    """The `rope_parameters` by layer type; those of a type that no layer has are those of the other."""
    ropes = {"full_attention": _rope(view, "full"), "sliding_attention": _rope(view, "local")}
    return ABSENT if ABSENT in ropes.values() else ropes


def _latent_rope(view: View) -> Any:
    """`rope_parameters` with the factor of YaRN on the scores of latent attention."""
    rope, latent = _rope(view, "latent"), view.get("latent")
    if rope is ABSENT or rope.get("factor", 1) <= 1:
        return rope
    growth = (latent.scale * (latent.nope_width + latent.rope_width) ** 0.5) ** 0.5
    return rope if growth == 1 else rope | {"mscale_all_dim": (growth - 1) / (0.1 * math.log(rope["factor"]))}


# Kind of `_entries_of` -> entry of `layer_types`.
ENTRIES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def _entries_of(mixer: Any) -> str:
    """The kind of a layer of DeepSeek-V4; empty for another mixer."""
    if not isinstance(mixer, CompressedConfig):
        return ""
    return "window" if mixer.compression is None else "hca" if mixer.indexer is None else "csa"


def _rates(view: View) -> dict[str, int]:
    return {
        name: view.get(f"{kind}.compression.ratio")
        for kind, name in ENTRIES.items()
        if kind in ("csa", "hca") and view.has(kind)
    }


def _compressed_ropes(view: View) -> dict[str, Any]:
    """The `rope_parameters` of layers without and with entries; those of a kind that no layer has are of the other."""
    ropes = {kind: _rope(view, kind) for kind in ENTRIES if view.has(kind)}
    share = {"partial_rotary_factor": view.get("compressed.rope_width") / view.get("compressed.head_width")}
    compressed = ropes.get("csa", ropes.get("hca", ropes.get("window")))
    return {"main": ropes.get("window", compressed) | share, "compress": compressed | share}


def _window(view: View) -> int | None:
    return find_span(view.get("local").connectivity) if view.has("local") else None


def _half_window(view: View) -> int:
    return 2 * (find_span(view.get("local").connectivity) - 1)


def _windows(view: View) -> Any:
    spans = [find_span(layer.mixer.connectivity) for _, layer in view.layers if layer.mixer is not None]
    return ABSENT if None in spans else [2 * (span - 1) for span in spans if span is not None]


def _limits(view: View) -> Any:
    low, high = view.get("mamba2.dt_floor"), view.get("mamba2.dt_ceiling")
    if (low, high) == (0.0, None):
        return ABSENT
    return [low, {"__float__": "Infinity"} if high is None else high]


def _tile(view: View) -> Any:
    """The tile of the pattern of BigBird."""
    tile = re.search(r"chunk\((\d+)\)", str(view.get("attention.pattern")))
    return int(tile[1]) if tile else ABSENT


def _random_tiles(view: View) -> int:
    """The number of terms of a multiset after the first."""
    return str(view.get("attention.pattern")).count("global_keys(")


def _period(flags: Sequence[bool]) -> tuple[int, int]:
    """The least period and the offset of the true flags; (1, 0) if they have none."""
    depth = len(flags)
    candidates = ((period, offset) for period in range(1, depth + 2) for offset in range(period))
    is_at = (pair for pair in candidates if [i % pair[0] == pair[1] for i in range(depth)] == list(flags))
    return next(is_at, (1, 0))


def _is_full(view: View) -> list[bool]:
    return [kind == "full" for kind in view.types()]


def _indices(flags: Sequence[bool]) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]


def _inverse_square(view: View) -> Any:
    """The integer n of a scale n ** -0.5; ABSENT if it is none."""
    value = view.get("attention.scale") ** -2
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else ABSENT


def _or_absent(value: Any) -> Any:
    return ABSENT if value is None else value


Answer: TypeAlias = str | tuple[str, ...] | Callable[[View], Any]  # the first path that `View.get` has, or a function

ATTENTION_TYPES = {"full": "full_attention", "local": "sliding_attention", "linear": "linear_attention"}
HEADS = ("attention.heads", "latent.heads", "lightning.heads", "rglru.heads")

# Key -> its value, in most families.
COMMON: dict[str, Answer] = {
    "vocab_size": "model.vocab",
    "hidden_size": "model.width",
    "num_hidden_layers": lambda view: len(view.layers),
    "tie_word_embeddings": "model.tied",
    "num_attention_heads": HEADS,
    "num_key_value_heads": ("attention.kv_heads", *HEADS[1:]),
    "head_dim": ("attention.head_width", "lightning.head_width"),
    "attention_bias": ("attention.bias", "latent.bias"),
    "rope_parameters": _rope,
    "sliding_window": _window,
    "layer_types": lambda view: view.types(**ATTENTION_TYPES),
    "intermediate_size": ("mlp.width", "experts.width"),
    "mlp_bias": "mlp.bias",
    "hidden_act": _activation,
    "hidden_activation": _activation,
    "rms_norm_eps": "layer.norm.eps",
    "norm_eps": "layer.norm.eps",
    "layer_norm_eps": "layer.norm.eps",
    "layer_norm_epsilon": "layer.norm.eps",
    "max_position_embeddings": lambda view: view.model.embedding.positions or ABSENT,
    # Experts
    "num_experts": "experts.experts",
    "num_local_experts": "experts.experts",
    "n_routed_experts": "experts.experts",
    "num_experts_per_tok": "experts.top_k",
    "moe_intermediate_size": "experts.width",
    "norm_topk_prob": "experts.renormalize",
    "routed_scaling_factor": "experts.scale",
    "n_group": "experts.groups",
    "topk_group": "experts.top_groups",
    "n_shared_experts": lambda view: view.get("experts.shared_width") // view.get("experts.width"),
    "mlp_layer_types": lambda view: ["sparse" if routed else "dense" for routed in view.routed()],
    # Mamba and Mamba-2
    "mamba_expand": lambda view: view.ratio(),
    "mamba_d_state": "ssm.state",
    "mamba_d_conv": "ssm.conv",
    "mamba_dt_rank": "mamba.dt_rank",
    "mamba_proj_bias": "ssm.bias",
    "mamba_conv_bias": "ssm.conv_bias",
    "mamba_n_heads": "mamba2.heads",
    "mamba_n_groups": "mamba2.groups",
    "mamba_d_head": "mamba2.head_width",
    "time_step_limit": _limits,
    # Latent attention
    "q_lora_rank": "latent.query_rank",
    "kv_lora_rank": "latent.kv_rank",
    "qk_nope_head_dim": "latent.nope_width",
    "qk_rope_head_dim": "latent.rope_width",
    "v_head_dim": "latent.value_width",
    # Delta rule
    "linear_num_heads": "delta.heads",
    "linear_head_dim": "delta.key_width",
    "linear_num_key_heads": "delta.key_heads",
    "linear_num_value_heads": "delta.heads",
    "linear_key_head_dim": "delta.key_width",
    "linear_value_head_dim": "delta.value_width",
    "linear_conv_kernel_dim": "delta.conv",
    "linear_allow_neg_eigval": "delta.negative",
}


UNUSED = {"num_attention_heads": 1, "num_key_value_heads": 1, "mamba_n_heads": 1}  # of mixers that no layer has


def _absent(*keys: str) -> dict[str, Answer]:
    return dict.fromkeys(keys, lambda view: ABSENT)


ENCODER: dict[str, Answer] = {"type_vocab_size": "model.embedding.types"}
PADDED: dict[str, Answer] = ENCODER | {"pad_token_id": lambda view: _or_absent(view.model.embedding.padding)}
QWEN: dict[str, Answer] = {
    "use_sliding_window": lambda view: _window(view) is not None,
    "max_window_layers": lambda view: (_indices([not full for full in _is_full(view)]) or [len(view.layers)])[0],
}
# Of families whose windows must be set, also if no layer has one.
WINDOWED: dict[str, Answer] = {"sliding_window": lambda view: _or_absent(_window(view))}
GEMMA: dict[str, Answer] = WINDOWED | {
    "query_pre_attn_scalar": _inverse_square,
    "final_logit_softcapping": "model.head.softcap",
}
STATE_SPACE: dict[str, Answer] = {
    "expand": lambda view: view.ratio(),
    "state_size": "ssm.state",
    "conv_kernel": "ssm.conv",
    "use_bias": "ssm.bias",
    "use_conv_bias": "ssm.conv_bias",
    "num_heads": "mamba2.heads",
    "head_dim": "mamba2.head_width",
    "n_groups": "mamba2.groups",
}
# transformers clamps step sizes to `time_step_min` instead of `time_step_limit`.
NO_CLAMP: dict[str, Answer] = {"time_step_min": lambda view: 1e-9}
INDEXED: dict[str, Answer] = {
    "rope_parameters": _latent_rope,
    "layer_types": lambda view: view.types(full="indexed_attention"),
    "index_n_heads": "latent.indexer.heads",
    "index_head_dim": "latent.indexer.width",
    "index_topk": "latent.indexer.top_k",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the config.json of a family has besides the answers of `COMMON`.

    Attributes:
      architecture: The class of transformers.
      answers: Key -> its value.
      others: Keys among the answers that transformers needs and the translation does not read.
    """

    architecture: str
    answers: dict[str, Answer] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()


# The families, preferred ones first. Reformer is not among them: PyTorch draws other hash rotations.
EXPORTED: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", QWEN | _absent("head_dim")),
    "qwen3": Family("Qwen3ForCausalLM", QWEN),
    "mixtral": Family("MixtralForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": "attention.softcap"}),
    "gemma3_text": Family("Gemma3ForCausalLM", GEMMA | {"rope_parameters": _ropes}),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "n_embd": "model.width",
            "n_layer": lambda view: len(view.layers),
            "n_head": "attention.heads",
            "n_inner": "mlp.width",
            "n_positions": lambda view: view.model.embedding.positions or ABSENT,
            "activation_function": _activation,
            "scale_attn_weights": lambda view: view.get("attention.scale") != 1,
            "scale_attn_by_inverse_layer_idx": lambda view: view.layers[0][1] != view.layers[-1][1],
        },
    ),
    "bert": Family("BertForMaskedLM", ENCODER),
    "roberta": Family("RobertaForMaskedLM", PADDED),
    "longformer": Family("LongformerForMaskedLM", PADDED | {"attention_window": _windows}),
    "big_bird": Family(
        "BigBirdForMaskedLM",
        ENCODER
        | {
            "attention_type": lambda v: "block_sparse" if v.get("attention").connectivity.repeats else "original_full",
            "block_size": _tile,
            "num_random_blocks": _random_tiles,
            "use_bias": "attention.bias",
            "rescale_embeddings": lambda view: view.model.embedding.scale != 1,
        },
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        {
            "rope_parameters": _ropes,
            "local_attention": _half_window,
            "norm_bias": "layer.norm.bias",
            "classifier_bias": "model.head.linear_bias",
            "classifier_activation": lambda view: _or_absent(view.model.head.activation),
            "decoder_bias": "model.head.bias",
        },
    ),
    "mamba": Family(
        "MambaForCausalLM", STATE_SPACE | {"time_step_rank": "mamba.dt_rank"} | _absent("intermediate_size")
    ),
    "mamba2": Family("Mamba2ForCausalLM", STATE_SPACE),
    "jamba": Family(
        "JambaForCausalLM",
        {
            "attn_layer_period": lambda view: _period(_is_full(view))[0],
            "attn_layer_offset": lambda view: _period(_is_full(view))[1],
            "expert_layer_period": lambda view: _period(view.routed())[0],
            "expert_layer_offset": lambda view: _period(view.routed())[1],
            "num_experts": lambda view: view.get("experts.experts") if view.has("experts") else 1,
            "num_experts_per_tok": lambda view: view.get("experts.top_k") if view.has("experts") else 1,
        },
    ),
    "bamba": Family(
        "BambaForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, partial=True),
            "attn_layer_indices": lambda view: _indices(_is_full(view)),
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {
            "attention_multiplier": "attention.scale",
            "position_embedding_type": lambda view: "nope" if view.get("attention.rope") is None else "rope",
            "embedding_multiplier": "model.embedding.scale",
            "logits_scaling": lambda view: 1 / view.model.head.scale,
            "residual_multiplier": "layer.mixer_residual.scale",
            "num_local_experts": lambda view: view.get("experts.experts") if view.has("experts") else 0,
            "intermediate_size": ("experts.width", "mlp.width"),
            "shared_intermediate_size": ("experts.shared_width", "mlp.width"),
        },
    ),
    "falcon_h1": Family(
        "FalconH1ForCausalLM",
        {
            "attention_in_multiplier": "attention_branch.scale_in",
            "attention_out_multiplier": "attention_branch.scale_out",
            "ssm_in_multiplier": "mamba2_branch.scale_in",
            "ssm_out_multiplier": "mamba2_branch.scale_out",
            "mlp_multipliers": lambda view: [view.get("mlp.gate_scale"), view.get("mlp.out_scale")],
            "ssm_multipliers": lambda view: list(view.get("mamba2.multipliers")) or ABSENT,
            "embedding_multiplier": "model.embedding.scale",
            "lm_head_multiplier": "model.head.scale",
            "key_multiplier": lambda view: view.get("attention.scale") * view.get("attention.head_width") ** 0.5,
            "mamba_d_ssm": "mamba2.inner",
            "mamba_rms_norm": lambda view: view.get("mamba2.norm_eps") is not None,
            "mamba_norm_before_gate": "mamba2.norm_before_gate",
            "projectors_bias": "mamba2.out_bias",
        }
        | _absent("mamba_expand"),
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {
            "layers_block_type": lambda view: view.types(
                linear="linear_attention", full="full_attention", experts="moe"
            ),
            "mamba_num_heads": "mamba2.heads",
            "mamba_head_dim": "mamba2.head_width",
            "ssm_state_size": "mamba2.state",
            "n_groups": "mamba2.groups",
            "conv_kernel": "mamba2.conv",
            "use_bias": "mamba2.bias",
            "use_conv_bias": "mamba2.conv_bias",
            "mlp_hidden_act": _activation,
            "moe_shared_expert_intermediate_size": "experts.shared_width",
            "moe_latent_size": "experts.latent",
        }
        | _absent("time_step_limit")
        | NO_CLAMP,
        ("num_hidden_layers", "time_step_min"),
    ),
    "zamba2": Family(
        "Zamba2ForCausalLM",
        {
            "layers_block_type": lambda view: ["hybrid" if layer.side else "mamba" for _, layer in view.layers],
            "n_mamba_heads": "mamba2.heads",
            "mamba_ngroups": "mamba2.groups",
            "add_bias_linear": "mamba2.bias",
            "attention_head_dim": "attention.head_width",
            "use_mem_rope": lambda view: view.get("attention.rope") is not None,
            "adapter_rank": "side.mlp_rank",
            "use_shared_attention_adapter": lambda view: view.get("side.mixer_rank") is not None,
            "num_mem_blocks": lambda view: len(view.model.shared),
        }
        | _absent("time_step_limit")
        | NO_CLAMP,
        ("num_hidden_layers", "time_step_min"),
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, partial=True),
            "attention_window_size": lambda view: _or_absent(_window(view)),
            "lru_width": "rglru.inner",
            "conv1d_width": "rglru.conv",
            "intermediate_size": lambda view: 2 * view.get("mlp.width"),
            "logits_soft_cap": "model.head.softcap",
            "block_types": lambda view: view.types(linear="recurrent", local="attention"),
        },
    ),
    "olmo3": Family("Olmo3ForCausalLM", WINDOWED | {"rope_parameters": _ropes}),
    "olmo_hybrid": Family(
        "OlmoHybridForCausalLM",
        # Without `rope_theta`, which is not the default, attention has no positions.
        {"rope_parameters": lambda view: {"rope_theta": None} if (rope := _rope(view)) is ABSENT else rope},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        WINDOWED
        | {"logit_scale": "model.head.scale", "rope_parameters": lambda view: _rope(view, "local")}
        | _absent("head_dim"),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        {"conv_L_cache": "conv.conv", "conv_bias": "conv.bias", "block_auto_adjust_ff_dim": lambda view: False},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        WINDOWED
        | {
            "swiglu_limit": lambda view: _or_absent(view.get("experts.limit")),
            "swiglu_alpha": "experts.alpha",
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, partial=True),
            "shared_expert_intermediate_size": "experts.shared_width",
            "mlp_only_layers": lambda view: _indices([not routed for routed in view.routed()]),
        },
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        {
            "full_attn_alpha_factor": "attention_layer.mixer_residual.keep",
            "full_attn_beta_factor": "attention_layer.mixer_residual.scale",
            "linear_attn_alpha_factor": "lightning_layer.mixer_residual.keep",
            "linear_attn_beta_factor": "lightning_layer.mixer_residual.scale",
            "mlp_alpha_factor": "layer.mlp_residual.keep",
            "mlp_beta_factor": "layer.mlp_residual.scale",
            "layer_types": lambda view: view.types(
                linear="linear_attention", full="full_attention", local="full_attention"
            ),
        },
    ),
    "minimax_m3_vl_text": Family(
        "MiniMaxM3VLForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, partial=True),
            "layer_types": lambda view: [
                "minimax_m3_sparse" if getattr(layer.mixer, "indexer", None) else "full_attention"
                for _, layer in view.layers
            ],
            "mlp_layer_types": lambda view: ["sparse" if routed else "dense" for routed in view.routed()],
            "index_n_heads": "indexed.indexer.heads",
            "index_head_dim": "indexed.indexer.width",
            "index_topk_blocks": "indexed.indexer.top_k",
            "index_block_size": "indexed.indexer.block",
            "index_local_blocks": "indexed.indexer.local",
            "shared_intermediate_size": "experts.shared_width",
            "n_shared_experts": lambda view: 1,
            "intermediate_size": "experts.width",
            "dense_intermediate_size": "mlp.width",
            "swiglu_limit": lambda view: _or_absent(view.get("experts.limit" if view.has("experts") else "mlp.limit")),
            "swiglu_alpha": ("experts.alpha", "mlp.alpha"),
        },
    ),
    "qwen4_exp_text": Family(
        "Qwen4ExpForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, partial=True),
            "layer_types": lambda view: view.types(linear="linear_attention", full="indexed_attention"),
            "shared_expert_intermediate_size": "experts.shared_width",
            "output_gate_type": "delta.gate",
            "indexer_n_heads": "indexed.indexer.heads",
            "indexer_kv_heads": lambda view: 1,
            "indexer_head_dim": "indexed.indexer.width",
            "indexer_compress_ratio": "indexed.indexer.block",
            "indexer_budget": lambda view: view.get("indexed.indexer.top_k") * view.get("indexed.indexer.block"),
            "rms_norm_eps": "model.hyper.eps",
            "hc_count": "model.hyper.streams",
            "hc_lowrank": "model.hyper.rank",
        },
    ),
    "kimi_linear": Family("KimiLinearForCausalLM", _absent("num_experts")),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", INDEXED),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        INDEXED
        | {
            "indexer_types": lambda view: [
                "shared" if any(x.shared for x in layer.mixer.indexers) else "full"
                for _, layer in view.layers
                if layer.mixer is not None
            ]
        },
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        {
            "num_attention_heads": "compressed.heads",
            "head_dim": "compressed.head_width",
            "q_lora_rank": "compressed.query_rank",
            "sliding_window": "compressed.window",
            "o_groups": "compressed.groups",
            "o_lora_rank": "compressed.out_rank",
            "index_n_heads": "csa.compression.indexer.heads",
            "index_head_dim": "csa.compression.indexer.width",
            "index_topk": "csa.compression.indexer.top_k",
            "compress_rates": _rates,
            "rope_parameters": _compressed_ropes,
            "layer_types": lambda view: [
                ENTRIES.get(_entries_of(layer.mixer), _type_of(layer)) for _, layer in view.layers
            ],
            "mlp_layer_types": lambda view: [
                "hash_moe" if getattr(layer.mlp, "by_token", False) else "moe" for _, layer in view.layers
            ],
            "scoring_func": "experts.router",
            "swiglu_limit": "experts.limit",
            "hc_mult": "model.hyper.streams",
            "hc_sinkhorn_iters": "model.hyper.steps",
            "hc_eps": "model.hyper.floor",
        },
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        {
            "rope_parameters": lambda view: _rope(view, "local"),
            "layer_types": lambda view: view.types(full="full_attention", local="chunked_attention"),
            "no_rope_layers": lambda view: [int(getattr(x.mixer, "rope", None) is not None) for _, x in view.layers],
            "attention_chunk_size": lambda view: _or_absent(_window(view)),
            "use_qk_norm": lambda view: view.get("local.qk_norm") is not None,
            "attn_scale": "full.growth",
            "attn_temperature_tuning": lambda view: view.get("full.growth") != 0,
            "floor_scale": "full.growth_period",
            "intermediate_size_mlp": "mlp.width",
            "intermediate_size": ("experts.width", "mlp.width"),
            "moe_layers": lambda view: _indices(view.routed()),
        },
    ),
}


class Obstacle(ConversionError):
    """A value that a family rejects.

    Attributes:
      key: The key.
      value: The value, if it is one of several that the family knows.
    """

    def __init__(self, family: str, problem: str, key: str, value: Any = None):
        super().__init__(f"{family}: {key}", problem)
        self.key, self.value = key, value


class Answers(Fields):
    """The keys that a translation reads, with values from a model; `values` records them.

    Args:
      view: The model.
      family: The `model_type`.
    """

    def __init__(self, view: View, family: str):
        super().__init__({}, family)
        self._view, self._answers = view, COMMON | EXPORTED[family].answers

    def take(self, key: str, default: Any = REQUIRED, kind: type | None = None) -> Any:
        """Returns the value for a key; without one, its default, or 1, so that the comparison names what is missing."""
        if key not in self.values and (answer := self._find(key)) is not ABSENT:
            self.values[key] = answer
        if key not in self.values and default is REQUIRED:
            self._known.add(key)
            return 1
        return super().take(key, default, kind)

    def choose(self, key: str, options: dict[Any, Any], default: Any = REQUIRED) -> Any:
        """Returns the entry of `options` for a key; another value becomes the first of them, which is a difference."""
        value = self.take(key, default)
        return options[value] if value in options else next(iter(options.values()))

    def error(self, key: str, problem: str) -> ConversionError:
        """Returns an error about a key."""
        return Obstacle(self.path, problem, key)

    def unsupported(self, key: str, value: Any, options: Iterable[Any]) -> ConversionError:
        """Returns an error about a value that is none of the supported ones."""
        return Obstacle(self.path, super().unsupported(key, value, options).problem, key, value)

    def locate(self, error: Obstacle) -> str:
        """Returns the path of the field that a family rejects; `layers` if there are several."""
        if error.key in TYPE_KEYS and error.value in (types := self.values[error.key]):
            return f"layers.{self._view.layers[types.index(error.value)][0]}.mixer"
        paths = ["ssm.inner"] if error.key in ("expand", "mamba_expand") else self._paths(error.key)
        return next(map(self._view.locate, paths), "layers")

    def _find(self, key: str) -> Any:
        answer = self._answers.get(key)
        try:
            if callable(answer):
                return answer(self._view)
            return next((self._view.get(path) for path in self._paths(key)), UNUSED.get(key, ABSENT))
        except Missing:
            return UNUSED.get(key, ABSENT)

    def _paths(self, key: str) -> list[str]:
        """The paths of a key whose parts the model has."""
        answer = self._answers.get(key, ())
        paths = () if callable(answer) else (answer,) if isinstance(answer, str) else answer
        return [path for path in paths if self._view.has(path.partition(".")[0])]


@dataclasses.dataclass(frozen=True)
class Expression:
    """A model as one of a family.

    Attributes:
      family: The `model_type`.
      hf_config: The config.json, without the keys of files and tokenizers.
      translation: Its translation; None if the family rejects a value.
      obstacles: Fields that the family cannot express, as path and problem; the config.json describes the model if
        there are none.
      distance: Roughly the number of fields that differ.
    """

    family: str
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    translation: Translation | None = None
    obstacles: tuple[tuple[str, str], ...] = ()
    distance: int = 0


def express(view: View, family: str, length: int) -> Expression:
    """Describes a model by the config.json of a family.

    Args:
      view: The model.
      family: The `model_type`, one of `EXPORTED`.
      length: Tokens per sequence, on which the model of some families depends.
    """
    answers = Answers(view, family)
    try:
        translation = FAMILIES[family](answers)
        answers.finish()
    except Obstacle as error:
        obstacle = answers.locate(error), f"{family} has no such model: {error.key}: {error.problem}"
        return Expression(family, obstacles=(obstacle,), distance=REJECTED)
    except InputError as error:  # sizes that a configuration does not accept
        return Expression(family, obstacles=(("layers", f"{family} has no such model: {error}"),), distance=REJECTED)
    expressed = translation.model if translation.at_length is None else translation.at_length(length)[0]
    differences = list(find_differences(expressed, view.model))
    obstacles = tuple(
        (path, f"{_show(b)}: {family} cannot express it and has {_show(a)} instead") for path, a, b in differences
    )
    distance = sum(OTHER_SECTION if dataclasses.is_dataclass(b) else 1 for _, _, b in differences)
    for key in EXPORTED[family].others:
        answers.take(key, None)
    hf_config = {"model_type": family, "architectures": [EXPORTED[family].architecture]} | answers.values
    return Expression(family, hf_config, translation, obstacles, distance)


def choose_family(
    model: ModelConfig, length: int, family: str | None = None, preferred: str | None = None
) -> Expression:
    """Finds a family that expresses a model.

    Args:
      model: The model.
      length: Tokens per sequence.
      family: The `model_type`; by default the first of `EXPORTED` that expresses the model.
      preferred: Family to try before the others.

    Raises:
      InputError: The family does not exist, or no family expresses the model; the argument is the field that stands in
        the way, in the family that is nearest.
    """
    if family is not None and family not in EXPORTED:
        reason = "PyTorch draws other hash rotations" if family == "reformer" else f"use one of {', '.join(EXPORTED)}"
        raise InputError("family", f"{family}: is not a family that can be exported; {reason}")
    view, attempts = View(model), []
    for name in [family] if family else sorted(EXPORTED, key=lambda name: name != preferred):
        attempts.append(express(view, name, length))
        if not attempts[-1].obstacles:
            return attempts[-1]
    nearest, *others = sorted(attempts, key=lambda attempt: attempt.distance)
    path, problem = nearest.obstacles[0]
    near = [other for other in others[: SHOWN - 1] if other.distance < REJECTED]
    problems = [problem, *(f"{other.family} differs in model.{other.obstacles[0][0]}" for other in near)]
    raise InputError(f"model.{path}", "; ".join(problems))


def _show(value: Any) -> str:
    """A value in an error; a section is named by its class."""
    is_section = dataclasses.is_dataclass(value) and not isinstance(value, Pattern)
    return type(value).__name__ if is_section else shorten(repr(value), 80)
