"""The keys of a config.json: each is read, or refused by name."""

from __future__ import annotations

from typing import Any

from sparsejax.interop.huggingface.checkpoint import CheckpointError

_REQUIRED = object()

# Of no account for what a model computes: how it was trained or is to be sampled from, and who wrote the file. Dropout
# acts in training alone.
INERT = frozenset(
    """
    architectures attention_dropout attention_probs_dropout_prob attn_implementation auto_map bos_token_id
    chunk_size_feed_forward classifier_dropout cls_token_id decoder_start_token_id dtype embedding_dropout eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_cutoff_factor
    initializer_range keys_to_ignore_at_inference label2id mask_token_id max_position_embeddings mlp_dropout model_type
    name_or_path _name_or_path  output_attentions output_hidden_states output_router_logits pad_token_id
    num_logits_to_keep problem_type return_dict router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version unk_token_id use_cache use_mamba_kernels
    """.split()  # noqa: SIM905 (thirty lines otherwise)
)


class Fields:
    """A config.json, read key by key. `finish` refuses what nobody has asked for."""

    def __init__(self, values: dict[str, Any], place: str):
        self.values, self.place = values, place
        self._seen: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; without a default it has to be there. An infinite number may be written as an object.

        Raises:
          CheckpointError: it is missing, or not of the kind that the default is of.
        """
        self._seen.add(key)
        value = _plain(self.values.get(key))
        if default is _REQUIRED:
            if value is None:
                raise self.error(key, "missing")
            return value
        if key not in self.values:
            return default
        if isinstance(default, bool):
            self._expect(key, value, "true or false", bool)
        elif isinstance(default, int | float):
            self._expect(key, value, "a number", int, float, list)  # a list has one for each layer
        return value

    def choose(self, key: str, options: dict[Any, Any], default: Any = _REQUIRED) -> Any:
        """What `options` has for the value of a key; another value is refused."""
        value = self.take(key, default)
        if isinstance(value, list | dict) or value not in options:
            raise self.error(key, f"{value!r} is not supported; only {', '.join(map(repr, options))}")
        return options[value]

    def require(self, key: str, *values: Any) -> None:
        """Refuses a key that is there with another value than these."""
        if key in self.values:
            self.choose(key, dict.fromkeys(values), None)

    def ignore(self, *keys: str) -> None:
        """Notes keys that are of no account for what the model computes."""
        self._seen.update(keys)

    def _expect(self, key: str, value: Any, what: str, *kinds: type) -> None:
        """Null is for whoever reads it."""
        if value is not None and not (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            raise self.error(key, f"expected {what}, got {value!r}")

    def error(self, key: str, message: str) -> CheckpointError:
        """An error about a key."""
        return CheckpointError(f"{self.place}: {key}: {message}")

    def finish(self) -> None:
        """Refuses keys that nobody has read, unless they are null or `INERT`."""
        for key, value in self.values.items():
            if key not in self._seen and key not in INERT and value is not None:
                raise self.error(key, "unknown key, so the model cannot be loaded exactly")


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_plain(item) for item in value] if isinstance(value, list) else value
