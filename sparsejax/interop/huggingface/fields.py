"""The keys of a config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sparsejax.interop.huggingface.errors import ConversionError

_REQUIRED = object()

# Keys that do not affect the computation of a trained model: initialization, dropout, generation and metadata.
INERT = frozenset(
    """
    architectures attention_dropout attention_probs_dropout_prob attn_implementation auto_map bos_token_id
    chunk_size_feed_forward classifier_dropout cls_token_id decoder_start_token_id dtype embedding_dropout eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_cutoff_factor
    initializer_range keys_to_ignore_at_inference label2id mask_token_id max_position_embeddings mlp_dropout model_type
    name_or_path _name_or_path  output_attentions output_hidden_states output_router_logits pad_token_id
    num_logits_to_keep problem_type return_dict router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_cache
    use_mamba_kernels
    """.split()  # noqa: SIM905 (a list would take fifty lines)
)


class Fields:
    """A config.json read key by key; `finish` rejects the keys that were not read.

    Attributes:
      values: The keys and values.
      path: The file, for errors.
    """

    def __init__(self, values: dict[str, Any], path: str):
        self.values, self.path = values, path
        self._known: set[str] = set()

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
        """Rejects a key that is present with a value other than these."""
        if key in self.values:
            self.choose(key, dict.fromkeys(values), None)

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
        supported = ", ".join(option if isinstance(option, str) else json.dumps(option) for option in options)
        return self.error(key, f"{json.dumps(value)} is not supported; supported: {supported}")

    def finish(self) -> None:
        """Rejects keys that were not read, unless they are null or in `INERT`."""
        for key, value in self.values.items():
            if key not in self._known and key not in INERT and value is not None:
                raise self.error(key, "unknown key, so the model cannot be converted exactly")


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_decode(item) for item in value] if isinstance(value, list) else value
