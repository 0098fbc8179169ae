"""How many bits per byte do simple reference models need for the validation text of a corpus?

Order k is a Witten-Bell byte n-gram model with a context of k bytes, estimated on the training bytes; like a neural
model, it scores every validation byte but the first. gzip and xz compress the validation bytes alone.
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
    print_rows([{"reference": name, "bits per byte": f"{value:.4f}"} for name, value in bits.items()], str(sizes))
    save({"files": files, "validation": options.validation, "digest": corpus.digest} | sizes | {"bits_per_byte": bits})
