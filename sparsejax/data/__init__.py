"""Text in, batches of bytes out: corpora, windows, and iterators that resume exactly."""

from sparsejax.data.batches import train_batches, validation_batches
from sparsejax.data.text import Corpus, DataError, load_corpus

__all__ = ["Corpus", "DataError", "load_corpus", "train_batches", "validation_batches"]
