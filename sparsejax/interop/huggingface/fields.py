"""The keys of a config.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from sparsejax.interop.huggingface.errors import ConversionError

_REQUIRED = object()

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

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a key; the key is required if there is no default.

        Non-finite numbers may be written as {"__float__": "Infinity"}.

        Raises:
          ConversionError: The key is missing, or its value differs in type from a bool or number default.
        """
        self._known.add(key)
        value = _decode(self.values.get(key))
        if default is _REQUIRED:
            if value is None:
                raise self.error(key, "missing")
            return value
        if key not in self.values:
            return default
        if isinstance(default, bool):
            self._expect(key, value, "true or false", bool)
        elif isinstance(default, int | float):
            self._expect(key, value, "a number", int, float, list)  # a list has a number per layer
        return value

    def choose(self, key: str, options: dict[Any, Any], default: Any = _REQUIRED) -> Any:
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

    def _expect(self, key: str, value: Any, expected: str, *types: type) -> None:
        """Rejects values of other types; null is left to the caller."""
        if value is not None and not (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
            raise self.error(key, f"{json.dumps(value)}: expected {expected}")

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
            problems.append(f"{', '.join(unknown)}: {keys}, so the model cannot be converted exactly")
        if problems:
            key, _, problem = "; ".join(problems).partition(": ")
            raise self.error(key, problem)


def _unsupported(value: Any, options: Iterable[Any]) -> str:
    supported = ", ".join(option if isinstance(option, str) else json.dumps(option) for option in options)
    return f"{json.dumps(value)} is not supported; supported: {supported}"


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_decode(item) for item in value] if isinstance(value, list) else value
