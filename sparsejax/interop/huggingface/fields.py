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
        """The value of a key; without a default it has to be there. An infinite number may be written as an object."""
        self._seen.add(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise self.error(key, "missing")
            return default
        return _plain(self.values[key])

    def choose(self, key: str, options: dict[Any, Any], default: Any = _REQUIRED) -> Any:
        """What `options` has for the value of a key; another value is refused."""
        value = self.take(key, default)
        if value not in options:
            raise self.error(key, f"{value!r} is not supported; only {', '.join(map(repr, options))}")
        return options[value]

    def require(self, key: str, *values: Any) -> None:
        """Refuses a key that is there with another value than these."""
        if key in self.values:
            self.choose(key, dict.fromkeys(values))

    def ignore(self, *keys: str) -> None:
        """Notes keys that are of no account for what the model computes."""
        self._seen.update(keys)

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
