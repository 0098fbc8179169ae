"""Device kinds on which attention kernels are verified.

A kernel counts as verified on a device kind if `verified.json`, which the package ships, names a recorded benchmark of
it there, or if `sparsejax doctor` compared it with the reference on this machine. The doctor's record is kept per user
and holds for one device kind, version of JAX and version of sparsejax. Implementations in plain JAX need no record.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool

from sparsejax.errors import InputError
from sparsejax.paths import default_cache
from sparsejax.records import parse_json

CACHE_VARIABLE = "SPARSEJAX_CACHE_DIR"
# Device kinds by kernel; the file names the recorded result of each.
RECORDED: dict[str, frozenset[str]] = {
    kernel: frozenset(results)
    for kernel, results in json.loads(Path(__file__).with_name("verified.json").read_text()).items()
}

_agreed: frozenset[str] = frozenset()


def verified_here(device_kind: str) -> frozenset[str]:
    """The kernels that `sparsejax doctor` verified on this device kind, in every process of this job."""
    return read_record(device_kind) if jax.process_count() == 1 else _agreed


def agree() -> None:
    """Exchanges the records of all processes, each of which must call it.

    Until then `attend` uses no record in a job of several processes, since they must compile the same programs.
    """
    global _agreed
    record, kernels = read_record(jax.local_devices()[0].device_kind), sorted(RECORDED)
    flags = multihost_utils.process_allgather(np.array([kernel in record for kernel in kernels]))
    _agreed = intersect(kernels, flags.reshape(-1, len(kernels)))


def intersect(kernels: Sequence[str], flags: Bool[np.ndarray, "processes kernels"]) -> frozenset[str]:
    """The kernels that every process has verified."""
    return frozenset(kernel for kernel, verified in zip(kernels, flags.all(axis=0), strict=True) if verified)


def record_path() -> Path:
    """The user's record: `verified.json` in $SPARSEJAX_CACHE_DIR, $XDG_CACHE_HOME/sparsejax or ~/.cache/sparsejax."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder) / "verified.json"
    return default_cache() / "verified.json"


def record_key(device_kind: str) -> str:
    """What a verification depends on."""
    return f"{device_kind}, jax {jax.__version__}, sparsejax {importlib.metadata.version('sparsejax')}"


def read_record(device_kind: str) -> frozenset[str]:
    """The kernels that the user's record verifies on this device kind, with the versions in use."""
    return frozenset(read_records().get(record_key(device_kind), ()))


def read_records() -> dict[str, list[str]]:
    """The whole record by `record_key`; empty if there is none."""
    return dict(_read_records(record_path()))


@functools.cache
def _read_records(path: Path) -> dict[str, list[str]]:
    try:
        return parse_json(path.read_bytes(), path, {...: [str]})
    except FileNotFoundError:
        return {}
    except InputError as error:
        _logger().warning("%s: %s; ignored, run `sparsejax doctor` to rewrite it", path, error.problem)
        return {}


def write_record(device_kind: str, kernels: list[str]) -> Path:
    """Replaces the user's record for this device kind and these versions, and returns its path."""
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    _read_records.cache_clear()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(read_records() | {record_key(device_kind): sorted(kernels)}, indent=2) + "\n")
    part.replace(path)
    _read_records.cache_clear()
    return path


@functools.cache
def suggest_doctor(device_kind: str) -> None:
    """Says once per device kind that "auto" leaves out kernels, and how to change that."""
    if jax.process_index() == 0:
        _logger().warning(
            "impl: auto leaves out the kernels that are not verified on %s with jax %s; run `sparsejax doctor`",
            device_kind,
            jax.__version__,
        )


def _logger() -> logging.Logger:
    return logging.getLogger("sparsejax")
