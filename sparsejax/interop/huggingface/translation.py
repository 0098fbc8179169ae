"""What a family makes of a config.json, and what families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sparsejax import schedule
from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface.tensors import Piece
from sparsejax.layers import LayerConfig


@dataclasses.dataclass(frozen=True)
class Translation:
    """A model in the words of this project.

    Attributes:
      model: the configuration.
      pieces: which tensors hold which parameters.
      keywords: what the model can be called with besides `input_ids`.
      options: what `load` takes for it besides the folder.
      ignored: regular expressions of tensors that the model does not use, such as buffers that follow from the rest.
      multiple: sequences are padded to a multiple of this, and the padding is cut off again.
      at_length: the configuration for sequences of a length, where it depends on it; same parameters.
    """

    model: ModelConfig
    pieces: Sequence[Piece]
    keywords: frozenset[str] = frozenset({"attention_mask"})
    options: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    multiple: int = 1
    at_length: Callable[[int], ModelConfig] | None = None


def name_layers(layers: Sequence[tuple[str, LayerConfig]]) -> dict[str, object]:
    """`schedule` and `layers` of a model, from a name and a configuration for each layer in order.

    Layers of one name that are not equal get numbers: `local`, `local_2`, ...
    """
    named: dict[str, LayerConfig] = {}
    names = []
    for name, config in layers:
        variants = [key for key in named if key.rpartition("_")[0] == name or key == name]
        found = next((key for key in variants if named[key] == config), None)
        if found is None:
            found = name if not variants else f"{name}_{len(variants) + 1}"
            named[found] = config
        names.append(found)
    return {"schedule": schedule.write(names), "layers": named}
