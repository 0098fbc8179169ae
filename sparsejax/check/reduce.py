"""A copy of a model that is small enough to check: the same schedule, mixers and patterns, smaller widths."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.model import Functional
from sparsejax.patterns import drawing

MAX_PARAMETERS = 4_000_000  # of a model that is checked as it is
TILE = 64  # of layouts
SHORTEST = 2 * TILE + 3  # crosses the edges of both sizes of tiles
WIDTH, VOCAB = 64, 256
KEY_HEADS = 2  # largest number of key/value heads
# Largest value per field of the sections of a layer. Numbers of heads are reduced by `_reduce_heads`.
LIMITS = {
    "width": 64,
    "shared_width": 64,
    "latent": 32,
    "inner": 64,
    "head_width": 16,
    "nope_width": 16,
    "rope_width": 16,
    "value_width": 16,
    "key_width": 16,
    "query_rank": 32,
    "kv_rank": 32,
    "mixer_rank": 8,
    "mlp_rank": 8,
    "rank": 16,
    "dt_rank": 8,
    "state": 16,
    "relative": 32,
    "experts": 16,
}
T = TypeVar("T")


def choose_length(config: ModelConfig, limit: int | None = None) -> int:
    """A length that crosses the edges of every window, chunk and tile, up to `limit` and the model's positions.

    Raises:
      InputError: The model runs neither on such a length nor on `limit` tokens.
    """
    scales = [scale for _, pattern in config.connectivity for scale in drawing.list_scales(pattern)]
    chunks = [getattr(layer.mixer, "chunk", 0) for layer in config.layers.values()]
    length = max(SHORTEST, max(scales, default=0) + TILE + 4, max(chunks, default=0) + 4)
    length = min(length, limit or length, config.embedding.max_length or length)
    last = limit or max(drawing.default_length(pattern) for _, pattern in config.connectivity)
    for candidate in (length, -(-length // TILE) * TILE):
        with contextlib.suppress(InputError):
            config.check(candidate)
            if candidate <= (limit or candidate):
                return candidate
    config.check(last)
    return last


def reduce(config: ModelConfig, max_parameters: int = MAX_PARAMETERS) -> tuple[ModelConfig, str]:
    """A copy with smaller widths, and how it differs; the config itself if it is small."""
    size = Functional(config).size
    if size <= max_parameters:
        return config, ""
    width = min(config.width, WIDTH)
    embedding = config.embedding
    if embedding.axial is not None:
        shares = tuple(max(1, share * width // config.width) for share in embedding.axial.widths)
        widths = (width - sum(shares[1:]), *shares[1:])
        embedding = dataclasses.replace(embedding, axial=dataclasses.replace(embedding.axial, widths=widths))
    copy = dataclasses.replace(
        config,
        width=width,
        vocab=min(config.vocab, max(VOCAB, (embedding.padding or 0) + 1)),
        embedding=embedding,
        layers={name: _reduce(layer) for name, layer in config.layers.items()},
        shared={name: _reduce(block) for name, block in config.shared.items()},
    )
    note = f"width {config.width:,} -> {width}, {size:,} -> {Functional(copy).size:,} parameters; heads, experts and"
    return copy, f"{note} vocabulary are smaller; schedule, mixers and patterns are the same"


def replace_fields(value: T, **fields: Any) -> T:
    """Replaces fields by name in a section and in all of its sections."""

    def replace(section: Any) -> Any:
        changes = {name: field for name, field in fields.items() if name in _fields(section)}
        return dataclasses.replace(section, **changes) if changes else section

    return map_sections(value, replace)


def map_sections(value: T, function: Callable[[Any], Any]) -> T:
    """Applies a function to all sections of a section, then to the section itself."""
    changes: dict[str, Any] = {}
    for name in _fields(value):
        inner = getattr(value, name)
        if dataclasses.is_dataclass(inner):
            changes[name] = map_sections(inner, function)
        elif isinstance(inner, dict):
            changes[name] = {
                key: map_sections(item, function) if dataclasses.is_dataclass(item) else item
                for key, item in inner.items()
            }
    return function(dataclasses.replace(value, **changes) if changes else value)  # type: ignore[type-var]


def _reduce(section: Any) -> Any:
    """Reduces a section and its sections; mixers of users, whose fields are unknown, are kept."""
    if not type(section).__module__.startswith("sparsejax."):
        return section
    changes: dict[str, Any] = {}
    for name in _fields(section):
        inner = getattr(section, name)
        if dataclasses.is_dataclass(inner):
            changes[name] = _reduce(inner)
        elif isinstance(inner, dict):
            changes[name] = {key: _reduce(item) for key, item in inner.items()}
    for factor in (1, 2, 4, 8, 16):  # a section may need more, such as experts for its top_k
        try:
            return dataclasses.replace(section, **changes, **dict(_limit(section, factor)))
        except InputError:
            continue
    return dataclasses.replace(section, **changes)


def _limit(section: Any, factor: int) -> Iterator[tuple[str, int]]:
    heads = dict(_reduce_heads(section))
    yield from heads.items()
    for name in [name for name in _fields(section) if name in LIMITS]:
        value = getattr(section, name)
        if isinstance(value, int) and not isinstance(value, bool):
            blocks = heads.get("heads", 1) if name == "inner" else 1
            yield name, min(value, factor * LIMITS[name] // blocks * blocks)


def _reduce_heads(section: Any) -> Iterator[tuple[str, int]]:
    """Fewer heads at the same ratio of query to key heads; a pattern with heads keeps them."""
    heads = getattr(section, "heads", None)
    pattern = getattr(section, "connectivity", None)
    if heads is None or (pattern is not None and pattern.heads is not None):
        return
    for name in ("kv_heads", "key_heads", "groups"):
        fewer = getattr(section, name, None)
        if isinstance(fewer, int):
            yield name, min(fewer, KEY_HEADS)
            yield "heads", heads // fewer * min(fewer, KEY_HEADS)
            return
    per_key_head = getattr(section, "scope", None) == "kv_head"  # such as the heads of an indexer
    yield "heads", min(heads, KEY_HEADS if per_key_head else 4)


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
