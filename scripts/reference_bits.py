"""Measures bits per byte of simple reference models on the validation bytes of a corpus.

    python scripts/reference_bits.py [--files FILES] [--out FILE.json]

Order k is a Witten-Bell byte n-gram model with a context of k bytes, estimated on the training bytes; like a neural
model, it scores every validation byte but the first. gzip and xz compress the validation bytes alone. The script takes
about ten seconds.
"""

import argparse
import gzip
import json
import lzma
import platform
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsejax.data import Corpus, DataError, load_corpus
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


def main() -> None:
    """Prints the table, and writes it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", default="", help="as `data.files`; defaults to the sources of the standard library")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()
    try:
        corpus = load_corpus(flags.files)
    except DataError as error:
        parser.error(str(error))
    record = {
        "python": platform.python_version(),
        "files": flags.files,
        "digest": corpus.digest,
        "train_bytes": len(corpus.train),
        "validation_bytes": len(corpus.validation),
        "bits_per_byte": measure_bits(corpus),
    }
    sizes = f"{len(corpus.train):,} training bytes, {len(corpus.validation):,} validation bytes"
    print(f"corpus {corpus.digest}: {sizes}")
    table = Table("reference", "bits per byte")
    for name, value in record["bits_per_byte"].items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if flags.out:
        flags.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
