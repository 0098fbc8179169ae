"""Models from folders, and back into folders."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface import checkpoint
from sparsejax.interop.huggingface.assembly import assemble, disassemble
from sparsejax.interop.huggingface.checkpoint import Checkpoint, CheckpointError
from sparsejax.interop.huggingface.families import FAMILIES
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.layers import Context
from sparsejax.model import Functional

Parameters = dict[str, Any]


class Pretrained:
    """A loaded model: `model(input_ids, attention_mask=None, ...)` gives logits.

    Attributes:
      source: the config.json it came from.
      config: the model's configuration.
      parameters: nested dict of float32 arrays, for `Functional(config)`.
      dtypes: how each tensor was stored.
      unused: tensors of the folder that the model has no use for, such as another head; `save` writes them again.
    """

    def __init__(
        self,
        source: dict[str, Any],
        translation: Translation,
        parameters: Parameters,
        dtypes: dict[str, np.dtype],
        unused: dict[str, np.ndarray],
    ):
        self.source, self.config, self.parameters = source, translation.model, parameters
        self.dtypes, self.unused, self._translation = dtypes, unused, translation
        self._compiled: list[tuple[ModelConfig, Functional]] = []

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **more: Any
    ) -> Float[Array, "b t v"]:
        """Logits in float32.

        Args:
          input_ids: token ids, below the vocabulary's size.
          attention_mask: 0 at padding; the outputs there mean nothing.
          **more: `global_attention_mask` (1 at tokens that see and are seen by all), for families that have it.

        Raises:
          ValueError: shapes that do not fit, ids outside the vocabulary, a keyword that the family lacks.
        """
        return self.logits(self.parameters, input_ids, attention_mask, **more)

    def logits(
        self,
        parameters: Parameters,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        **more: Any,
    ) -> Float[Array, "b t v"]:
        """As calling the model, with other parameters: a function to differentiate in them."""
        model, tokens, context = self._prepare(input_ids, attention_mask, **more)
        return _run_forward(model, parameters, tokens, context)[:, : input_ids.shape[1]]

    def streams(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **more: Any
    ) -> list[Float[Array, "b t m"]]:
        """The stream before the first layer, after each layer, and after the last norm."""
        model, tokens, context = self._prepare(input_ids, attention_mask, **more)
        return [x[:, : input_ids.shape[1]] for x in _run_streams(model, self.parameters, tokens, context)]

    def tensors(self, parameters: Parameters | None = None) -> dict[str, np.ndarray]:
        """The checkpoint's tensors by name, made of `parameters` or of anything shaped like them, such as gradients."""
        held = self.parameters if parameters is None else parameters
        return disassemble(self._translation.pieces, held, self.config.fold)

    def _prepare(self, input_ids: Any, attention_mask: Any, **more: Any) -> tuple[Functional, Array, Context]:
        given = {"attention_mask": attention_mask} | more
        given = {name: np.asarray(value) for name, value in given.items() if value is not None}
        tokens = np.asarray(input_ids)
        self._check(tokens, given)
        config, multiple = self.config, 1
        if self._translation.at_length is not None:
            config, multiple = self._translation.at_length(tokens.shape[1])
        tokens, given = self._pad(tokens, given, multiple)
        return self._build(config), jnp.asarray(tokens, jnp.int32), self._make_context(given)

    def _check(self, tokens: np.ndarray, given: dict[str, np.ndarray]) -> None:
        keywords = self._translation.keywords
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"input_ids: expected integers [b, t], got {tokens.dtype} {list(tokens.shape)}")
        for name, value in given.items():
            if name not in keywords:
                takes = ", ".join(["input_ids", *sorted(keywords)])
                raise ValueError(f"{name}: a {self.source['model_type']} model takes {takes} only")
            if value.shape != tokens.shape:
                raise ValueError(f"{name}: expected shape {list(tokens.shape)} as input_ids, got {list(value.shape)}")
            if not np.isin(value, (0, 1)).all():
                raise ValueError(f"{name}: expected zeros and ones")
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab:
            raise ValueError(f"input_ids: ids must be from 0 to {self.config.vocab - 1}")

    def _pad(
        self, tokens: np.ndarray, given: dict[str, np.ndarray], multiple: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """To a multiple of what the family wants; a mask hides the padding."""
        gap = -tokens.shape[1] % multiple
        if not gap:
            return tokens, given
        given = {"attention_mask": np.ones_like(tokens)} | given
        given = {name: np.pad(value, ((0, 0), (0, gap))) for name, value in given.items()}
        return np.pad(tokens, ((0, 0), (0, gap)), constant_values=self.source.get("pad_token_id") or 0), given

    def _make_context(self, given: dict[str, np.ndarray]) -> Context:
        mask, marked = given.get("attention_mask"), given.get("global_attention_mask")
        positions, rotations = None, self._translation.rotations
        if marked is not None:
            marked = marked if mask is None else marked * mask
            most = int(marked.sum(axis=1).max())
            width = 1 << (most - 1).bit_length() if most else 0  # few different shapes, so few compilations
            rows = [np.flatnonzero(row) for row in marked]
            padded = [np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]
            positions = np.stack(padded).astype(np.int32)
        return Context(
            mask=None if mask is None or mask.all() else jnp.asarray(mask, bool),
            globals=None if positions is None or not positions.size else jnp.asarray(positions),
            rotations=None if rotations is None else jnp.asarray(rotations, jnp.float32),
        )

    def _build(self, config: ModelConfig) -> Functional:
        """One object for each configuration, so that what is compiled for it is found again."""
        for known, model in self._compiled:
            if known == config:
                return model
        self._compiled.append((config, Functional(config)))
        return self._compiled[-1][1]


@functools.partial(jax.jit, static_argnums=0)
def _run_forward(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> Array:
    return model.bind(parameters)(tokens, context)


@functools.partial(jax.jit, static_argnums=0)
def _run_streams(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> list[Array]:
    return model.bind(parameters).streams(tokens, context)


def read_config(place: str | Path) -> Translation:
    """What a config.json, or the folder of one, describes.

    Raises:
      CheckpointError: not there, an unknown `model_type`, or a key that cannot be honoured exactly.
    """
    return _translate(*_read_source(place))


def describe(place: str | Path, length: int | None = None) -> tuple[ModelConfig, int]:
    """The model of a config.json, or of the folder of one, in the dtype that it is stored in; and a length.

    Args:
      place: the file or the folder.
      length: tokens of a sequence; the most that the file allows for if None, 4,096 if it does not say.

    Raises:
      CheckpointError: as `read_config`.
    """
    source, file = _read_source(place)
    translation = _translate(source, file)
    if length is None:
        length = source.get("max_position_embeddings") or source.get("model_max_length") or 4096
        # RoBERTa's positions start behind the padding's.
        padding = translation.model.embedding.padding
        length -= 0 if padding is None else padding + 1
    model = translation.model if translation.at_length is None else translation.at_length(length)[0]
    stored = source.get("dtype") or source.get("torch_dtype") or "float32"
    # float16 takes as many bytes as bfloat16.
    return dataclasses.replace(model, dtype="float32" if stored == "float32" else "bfloat16"), length


def load(folder: str | Path, *, mesh: Mesh | None = None, **options: Any) -> Pretrained:
    """The model of a folder with config.json and safetensors; it computes in float32.

    Args:
      folder: where they are.
      mesh: if given, parameters are spread over it by `sharding.RULES`, one after the other.
      **options: what a family takes besides: `random_plans` (BigBird: for each layer the random key tiles of the inner
        query tiles, int [h, tiles - 2, r]), `lsh_rotations` (Reformer: float [h, d, hashes, buckets / 2]).

    Raises:
      CheckpointError: anything missing, unknown, of a wrong shape, or not to be honoured exactly; one line.
    """
    source, place = _read_source(folder)
    translation = _translate(source, place, **options)
    return Pretrained(source, translation, *assemble(Checkpoint(Path(folder)), translation, mesh))


def save(model: Pretrained, folder: str | Path, shard_bytes: int = checkpoint.SHARD_BYTES) -> None:
    """Writes a loaded model as a folder like the one it came from; tensors have the dtypes that they had there.

    Raises:
      CheckpointError: the folder exists already, or cannot be written.
    """
    tensors = {name: tensor.astype(model.dtypes[name]) for name, tensor in model.tensors().items()}
    checkpoint.write(Path(folder), model.source, tensors | model.unused, shard_bytes)


def _read_source(place: str | Path) -> tuple[dict[str, Any], str]:
    path = Path(place)
    if path.is_dir():
        path = path / "config.json"
    return checkpoint.read_json(path), str(path)


def _translate(source: dict[str, Any], place: str, **options: Any) -> Translation:
    fields = Fields(source, place)
    kind = source.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise fields.error("model_type", f"{kind!r} is not supported; there are {', '.join(sorted(FAMILIES))}")
    try:
        translation = FAMILIES[kind](fields, **options)
    except TypeError as error:
        if options and "unexpected keyword argument" in str(error):
            raise CheckpointError(f"{place}: a {kind} model does not take {', '.join(options)}") from error
        raise CheckpointError(f"{place}: values of a wrong kind: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError) as error:  # the project's own checks of sizes that do not go together
        raise CheckpointError(f"{place}: {error}") from error
    fields.finish()
    return translation
