"""Builds corpora from Debian packages.

    python scripts/fetch_corpus.py linux-doc --out=corpora/linux-doc

    linux-doc  the documentation of Linux: long technical documents, one jsonl record per document
    sympy      the source of SymPy 1.14.0: Python code, one jsonl record per file
    gcide      an English dictionary in the 27 characters of text8, split 90/5/5: --config.data.tokenizer=chars
    dna        bacterial genomes in A, C, G, T and N, one jsonl record per sequence, split by species

Writes train, validation and test text, and corpus.json: packages with versions and licences, sizes, digests, and bits
per byte of Witten-Bell n-grams that are estimated on the first 9 MB of the training text. The output is a function of
the packages. Requires `apt-get` and `dpkg-deb`; nothing is installed.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsejax.data.files import HELD_OUT, HELD_OUT_REMAINDER
from sparsejax.data.ngram import witten_bell

PACKAGES = {
    "linux-doc": {"linux-doc-6.1": "GPL-2"},
    "gcide": {"dict-gcide": "GPL-2+"},
    "dna": {
        "bowtie-examples": "Artistic-2.0; sequences from GenBank",
        "ragout-examples": "BSD-3-Clause; sequences from GenBank",
        "sibelia-examples": "GPL-2; sequences from GenBank",
        "kleborate-examples": "GPL-3+; sequences from GenBank",
    },
}
# Wheels: version, licence and digest, which pip compares.
WHEELS = {
    "sympy": {
        "sympy": ("1.14.0", "BSD-3-Clause", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    }
}
# Strains of a species have nearly equal sequences: a split within a species would measure memorization.
SPECIES = {
    "train": {
        "Escherichia coli": ("NC_008253", "E.Coli/references"),
        "Staphylococcus aureus": ("S.Aureus/references", "Staphylococcus"),
        "Vibrio cholerae": ("V.Cholerae/references",),
    },
    "validation": {"Helicobacter pylori": ("H.Pylori/references", "Helicobacter_pylori")},
    "test": {"Klebsiella pneumoniae": ("kleborate/examples/data",)},
}
COUNTED, SCORED = 9_000_000, 1_000_000  # training and validation bytes of the n-gram models
ORDERS = 5
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Split = dict[str, list[tuple[str, str]]]  # side -> (name, text) of its documents


def unpack(packages: dict[str, str], folder: Path) -> dict[str, dict[str, str]]:
    """Unpacks packages below `folder`; returns their versions and licences."""
    unpacked = {}
    for name, licence in packages.items():
        subprocess.run(["apt-get", "download", "--quiet", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (file,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", file, folder / name], check=True)
        version = subprocess.run(["dpkg-deb", "-f", file, "Version"], check=True, capture_output=True, text=True)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        unpacked[name] = {"version": version.stdout.strip(), "licence": licence, "sha256": digest}
    return unpacked


def download(wheels: dict[str, tuple[str, str, str]], folder: Path) -> dict[str, dict[str, str]]:
    """Downloads wheels into `folder` with pip, which compares their digests; returns versions and licences."""
    for name, (version, _, digest) in wheels.items():
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, f"--dest={folder}", f"--requirement={requirement}"], check=True)
    return {
        name: {"version": version, "licence": licence, "sha256": digest}
        for name, (version, licence, digest) in wheels.items()
    }


def read(path: Path) -> bytes:
    """Reads a file, decompressed according to its suffix."""
    opener = {".gz": gzip.open, ".dz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as file:
        return file.read()


def build_linux_doc(folder: Path) -> Split:
    """Collects the distinct documents, split by a hash of their names."""
    split, seen = {"train": [], "validation": [], "test": []}, set()
    (root,) = folder.glob("linux-doc-6.1/usr/share/doc/linux-doc-*/Documentation")
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or not re.search(r"\.(rst|txt)(\.gz)?$", path.name):
            continue
        data = read(path)
        if data in seen or not data.strip():
            continue
        seen.add(data)
        name = path.relative_to(root).as_posix().removesuffix(".gz")
        split[choose_side(name)].append((name, data.decode()))
    return split


def build_sympy(folder: Path) -> Split:
    """Collects the distinct source files, split by a hash of their names."""
    split, seen = {"train": [], "validation": [], "test": []}, set()
    (wheel,) = folder.glob("sympy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            data = archive.read(name)
            if name.endswith(".py") and data.strip() and data not in seen:
                seen.add(data)
                split[choose_side(name)].append((name, data.decode()))
    return split


def choose_side(name: str) -> str:
    """Returns the side of a document: two of `HELD_OUT` hashes of names are held out."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT
    return {HELD_OUT_REMAINDER: "validation", HELD_OUT_REMAINDER + 1: "test"}.get(number, "train")


def build_gcide(folder: Path) -> Split:
    """Reduces the dictionary to lower-case letters and single spaces, with digits spelled out, and splits it 90/5/5."""
    (path,) = folder.glob("dict-gcide/usr/share/dictd/gcide.dict.dz")
    text = read(path).decode(errors="replace").lower()
    text = re.sub(r"[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    text = re.sub(r"[^a-z]+", " ", text)
    first, second = len(text) // 20 * 18, len(text) // 20 * 19
    parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    return {side: [("gcide", part)] for side, part in parts.items()}


def build_dna(folder: Path) -> Split:
    """Collects the distinct sequences of each species; symbols other than A, C, G and T become N."""
    split, seen = {"train": [], "validation": [], "test": []}, set()
    files = [path for path in sorted(folder.rglob("*")) if re.search(r"\.(fna|fasta)(\.gz|\.xz)?$", path.name)]
    for side, species in SPECIES.items():
        for name, folders in species.items():
            for path in files:
                if any(folder_name in path.as_posix() for folder_name in folders):
                    for title, bases in read_fasta(read(path).decode()):
                        if bases not in seen:
                            seen.add(bases)
                            split[side].append((f"{name}: {title}", bases))
    return split


def read_fasta(text: str) -> Iterator[tuple[str, str]]:
    """Iterates over the titles and sequences of a FASTA file."""
    for record in text.split(">")[1:]:
        title, _, bases = record.partition("\n")
        yield title, re.sub(r"[^ACGT]", "N", re.sub(r"\s", "", bases).upper())


BUILD = {"linux-doc": build_linux_doc, "sympy": build_sympy, "gcide": build_gcide, "dna": build_dna}


def write(split: Split, out: Path, records: bool) -> dict[str, dict]:
    """Writes each side; returns its number of documents, size and digest."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for side, documents in split.items():
        if records:
            lines = (json.dumps({"name": name, "text": text}) + "\n" for name, text in documents)
            path, data = out / f"{side}.jsonl", "".join(lines).encode()
        else:
            path, data = out / f"{side}.txt", "".join(text for _, text in documents).encode()
        path.write_bytes(data)
        size = sum(len(text.encode()) for _, text in documents)
        digest = hashlib.sha256(data).hexdigest()
        sizes[side] = {"file": path.name, "documents": len(documents), "bytes": size, "sha256": digest}
    return sizes


def measure_ngrams(split: Split) -> dict[str, float]:
    """Returns bits per byte of the validation text under n-grams of the training text."""
    train, validation = (
        np.frombuffer("\0".join(text for _, text in split[side]).encode()[:size], np.uint8)
        for side, size in (("train", COUNTED), ("validation", SCORED))
    )
    surprise = -np.log2(witten_bell(train, validation, ORDERS)[:, 1:]).mean(axis=1)
    return {f"order {k}": round(float(value), 4) for k, value in enumerate(surprise)}


def main() -> None:
    """Fetches, builds, writes and measures a corpus."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(BUILD), help="corpus to build")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if flags.name in WHEELS:
                packages = download(WHEELS[flags.name], Path(scratch))
            else:
                packages = unpack(PACKAGES[flags.name], Path(scratch))
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"fetch_corpus: {error}; requires Debian with current package lists")
        split = BUILD[flags.name](Path(scratch))
    sizes = write(split, flags.out, records=flags.name != "gcide")
    record = {"corpus": flags.name, "packages": packages, "parts": sizes, "bits_per_byte": measure_ngrams(split)}
    (flags.out / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    train, held_out = (flags.out / sizes[side]["file"] for side in ("train", "validation"))
    print(f"read it with --config.data.files={train} --config.data.validation={held_out}")


if __name__ == "__main__":
    main()
