"""How many bits per byte do simple reference models need for the validation text of a corpus, and what do they predict?

Order k is a Witten-Bell byte n-gram model with a context of k bytes, estimated on the training bytes; like a neural
model, it scores every validation byte but the first. Its accuracy is the share of validation bytes that are the most
frequent follower of the k bytes before them, or of fewer bytes where these never occur in the training bytes. gzip and
xz compress the validation bytes alone.
"""

from __future__ import annotations

import argparse
import gzip
import lzma

import numpy as np

from benchmarks.harness import ROOT, Save, print_rows
from sparsejax.data import Corpus, load_corpus
from sparsejax.data.ngram import witten_bell

ORDERS = 6


def measure_bits(corpus: Corpus) -> dict[str, float]:
    """Returns bits per validation byte by the name of the reference."""
    text = corpus.validation.tobytes()
    surprise = -np.log2(witten_bell(corpus.train, corpus.validation, ORDERS - 1)[:, 1:]).mean(axis=1)
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    bits = {f"order {k}": float(value) for k, value in enumerate(surprise)}
    return bits | {name: 8 * size / len(text) for name, size in sizes.items()}


def measure_accuracy(train: np.ndarray, text: np.ndarray, order: int) -> list[float]:
    """Returns the accuracy of the most frequent follower of 0 to `order` bytes in `text`, uint8 [m]."""
    predicted, accuracies = np.zeros(len(text), np.uint8), []
    for k in range(order + 1):
        ngrams, counts = np.unique(_pack(train, k + 1), return_counts=True)
        best = np.lexsort((-counts, ngrams >> 8))  # the first of each context is its most frequent follower
        contexts, first = np.unique(ngrams[best] >> 8, return_index=True)
        queries = _pack(text, k + 1) >> 8
        index = np.minimum(np.searchsorted(contexts, queries), len(contexts) - 1)
        follower = (ngrams[best][first] & 255).astype(np.uint8)[index]
        predicted[k:] = np.where(contexts[index] == queries, follower, predicted[k:])
        accuracies.append(float((predicted == text)[1:].mean()))
    return accuracies


def _pack(text: np.ndarray, width: int) -> np.ndarray:
    """Every `width`-gram as one integer, int64 [n - width + 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(text, width)
    return windows.astype(np.int64) @ (256 ** np.arange(width - 1, -1, -1, dtype=np.int64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--files", default="", help="as `data.files`; defaults to the sources of the standard library")
    parser.add_argument("--validation", default="", help="as `data.validation`; by default, a part of the files")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures a corpus."""
    files = str(ROOT / "benchmarks") if options.quick else options.files
    corpus = load_corpus(files, validation=options.validation)
    bits = measure_bits(corpus)
    sizes = {"train_bytes": len(corpus.train), "validation_bytes": len(corpus.validation)}
    accuracy = dict(zip(bits, measure_accuracy(corpus.train, corpus.validation, ORDERS - 1), strict=False))
    rows = [
        {
            "reference": name,
            "bits per byte": f"{value:.4f}",
            "accuracy": f"{accuracy[name]:.4f}" if name in accuracy else "",
        }
        for name, value in bits.items()
    ]
    print_rows(rows, str(sizes))
    save(
        {"files": files, "validation": options.validation, "digest": corpus.digest}
        | sizes
        | {"bits_per_byte": bits, "accuracy": accuracy}
    )
