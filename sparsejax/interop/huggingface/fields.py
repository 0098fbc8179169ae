"""The keys of a config.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from sparsejax.errors import SHOWN, describe_value, shorten
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.schedule import MAX_LAYERS

REQUIRED = object()

# Keys that do not affect the computation of a trained model: initialization, dropout, generation and metadata.
INERT = frozenset(
    """
    architectures attention_dropout attention_probs_dropout_prob attn_implementation _attn_implementation auto_map
    bad_words_ids begin_suppress_tokens boi_token_index bos_token_id chunk_size_feed_forward classifier_dropout
    cls_token_id decoder_start_token_id diversity_penalty do_sample dtype early_stopping embedding_dropout
    encoder_no_repeat_ngram_size eoi_token_index eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    initializer_cutoff_factor initializer_range keys_to_ignore_at_inference label2id length_penalty mask_token_id
    max_length max_position_embeddings min_length mlp_dropout model_type name_or_path _name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_logits_to_keep num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef
    router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache
    use_mamba_kernels quantization_config
    """.split()  # noqa: SIM905 (a list would take fifty lines)
)

# Keys that `to_dict` writes for every model, and that do not affect the computation at these values.
DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "tie_word_embeddings": None,
}

# Types that `take` checks, as messages name them.
KINDS = {bool: "true or false", int: "an integer", float: "a number", dict: "an object", list: "a list"}
LIMITS = {"num_hidden_layers": MAX_LAYERS}  # largest value by key
PER_LAYER = ("attention_window",)  # may be a list with an entry per layer
MAX_INTEGER = 2**31 - 1  # of other keys


class Fields:
    """A config.json read key by key; `finish` rejects the keys that were not read.

    Attributes:
      values: The keys and values, without those of `ignored`.
      path: The file, for errors.
    """

    def __init__(self, values: dict[str, Any], path: str, ignored: Collection[str] = ()):
        self.values, self.path = {key: value for key, value in values.items() if key not in ignored}, path
        self._known: set[str] = set()
        self._problems: dict[str, str] = {}
        for key in ignored:
            if key not in values:
                raise self.error(key, "cannot be ignored: there is no such key")

    def take(self, key: str, default: Any = REQUIRED, kind: type | None = None) -> Any:
        """Returns the value of a key; the key is required if there is no default.

        Non-finite numbers may be written as {"__float__": "Infinity"}.

        Args:
          key: The key.
          default: The value if the key is absent.
          kind: Type of the value; by default that of a bool, int or float `default`, and int for a required key.

        Raises:
          ConversionError: The key is missing, its value is not of this kind, or an integer is out of range.
        """
        self._known.add(key)
        value = _decode(self.values.get(key))
        if default is REQUIRED and value is None:
            raise self.error(key, "missing")
        if key not in self.values:
            return default
        kind = int if kind is None and default is REQUIRED else kind
        kind = type(default) if kind is None and isinstance(default, bool | int | float) else kind
        for item in value if isinstance(value, list) and key in PER_LAYER else [value]:
            if kind is not None and item is not None and not _is_a(item, kind):
                raise self.error(key, f"{_show(item)}: expected {KINDS[kind]}")
            limit = LIMITS.get(key, MAX_INTEGER)
            if isinstance(item, int) and item > limit:
                raise self.error(key, f"{_show(item)} is above {limit:,}")
        return value

    def choose(self, key: str, options: dict[Any, Any], default: Any = REQUIRED) -> Any:
        """Returns the entry of `options` for the value of a key, and rejects other values."""
        value = self.take(key, default)
        if isinstance(value, list | dict) or value not in options:
            raise self.unsupported(key, value, options)
        return options[value]

    def require(self, key: str, *values: Any) -> None:
        """Rejects a key that is present with a value other than these, when `finish` is called."""
        self._known.add(key)
        value = _decode(self.values.get(key))
        if key in self.values and value not in values:
            self._problems[key] = _unsupported(value, values)

    def ignore(self, *keys: str) -> None:
        """Accepts any value of keys that do not affect the computation."""
        self._known.update(keys)

    def error(self, key: str, problem: str) -> ConversionError:
        """Returns an error about a key."""
        return ConversionError(f"{self.path}: {key}", problem)

    def unsupported(self, key: str, value: Any, options: Iterable[Any]) -> ConversionError:
        """Returns an error about a value that is none of the supported ones."""
        return self.error(key, _unsupported(value, options))

    def finish(self) -> None:
        """Rejects the values of `require`, and keys that were not read unless they are null or inert; all at once."""
        unknown = [
            key
            for key, value in self.values.items()
            if key not in self._known and key not in INERT and value is not None and value != DEFAULTS.get(key, ...)
        ]
        problems = [f"{key}: {problem}" for key, problem in self._problems.items()]
        if unknown:
            keys = "unknown key" if len(unknown) == 1 else "unknown keys"
            problems.append(f"{shorten(', '.join(unknown))}: {keys}, so the model cannot be converted exactly")
        if problems:
            key, _, problem = "; ".join(problems).partition(": ")
            raise self.error(key, problem)


def _unsupported(value: Any, options: Iterable[Any]) -> str:
    supported = ", ".join(option if isinstance(option, str) else json.dumps(option) for option in options)
    return f"{_show(value)} is not supported; supported: {supported}"


def _show(value: Any) -> str:
    """A value of a config.json in a message."""
    is_long = isinstance(value, int) and abs(value) >= 10**SHOWN
    return describe_value(value) if is_long else shorten(json.dumps(value), SHOWN)


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; an integer is a number, and true is neither."""
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_decode(item) for item in value] if isinstance(value, list) else value
