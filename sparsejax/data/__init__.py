"""Data: documents from files or TFDS, tokens, packing, objectives, probes, and iterators that resume exactly.

Importing this package imports NumPy only. grain is imported when a training iterator is built, TFDS when a TFDS data
set is read.
"""

from sparsejax.data.batches import fresh_batches, ordered_batches, shuffled_batches, train_batches, validation_batches
from sparsejax.data.config import DataConfig, MaskConfig, SourceConfig
from sparsejax.data.dataset import Dataset, Mixture
from sparsejax.data.errors import DataError
from sparsejax.data.load import load_dataset
from sparsejax.data.preview import preview
from sparsejax.data.rows import Batch, BatchIterator
from sparsejax.data.text import Corpus, build_corpus, load_corpus

__all__ = [
    "Batch",
    "BatchIterator",
    "Corpus",
    "DataConfig",
    "DataError",
    "Dataset",
    "MaskConfig",
    "Mixture",
    "SourceConfig",
    "build_corpus",
    "fresh_batches",
    "load_corpus",
    "load_dataset",
    "ordered_batches",
    "preview",
    "shuffled_batches",
    "train_batches",
    "validation_batches",
]
