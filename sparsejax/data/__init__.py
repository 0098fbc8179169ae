"""Data: documents from files or TFDS, tokens, packing, objectives, probes, and iterators that resume exactly."""

from sparsejax.data.batches import fresh_batches, ordered_batches, shuffled_batches, train_batches, validation_batches
from sparsejax.data.config import DataConfig, MaskConfig
from sparsejax.data.errors import DataError
from sparsejax.data.text import Corpus, build_corpus, load_corpus

__all__ = [
    "Corpus",
    "DataConfig",
    "DataError",
    "MaskConfig",
    "build_corpus",
    "fresh_batches",
    "load_corpus",
    "ordered_batches",
    "shuffled_batches",
    "train_batches",
    "validation_batches",
]
