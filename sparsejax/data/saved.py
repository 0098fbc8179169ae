"""Folders that `save_to_disk` of Hugging Face datasets writes, as files of Arrow.

A folder of splits has `dataset_dict.json` and a folder per split. A folder of one split has `state.json`, which lists
its files in order.
"""

from __future__ import annotations

from pathlib import Path

from sparsejax.data.errors import DataError
from sparsejax.errors import InputError, suggest
from sparsejax.workdir import read_json


def has_splits(folder: Path) -> bool:
    """Whether a folder holds one data set per split."""
    return (folder / "dataset_dict.json").is_file()


def list_splits(folder: Path, key: str = "data.files") -> list[str]:
    """Returns the names of the splits of a folder.

    Raises:
      DataError: Its record is damaged.
    """
    return _read(folder / "dataset_dict.json", {"splits": [str]}, key)["splits"]


def find_split(folder: Path, split: str, key: str) -> Path:
    """Returns the folder of a split.

    Args:
      folder: A folder with splits.
      split: Name of the split.
      key: The configuration key that names the split.

    Raises:
      DataError: The folder has no such split.
    """
    splits = list_splits(folder)
    if split not in splits:
        raise DataError(key, f"{folder} has no split {split!r}; {suggest(split, splits, 'splits')}")
    return folder / split


def list_shards(folder: Path, key: str = "data.files") -> list[Path] | None:
    """Returns the files of a data set in order; None if the folder is not one that `save_to_disk` wrote.

    Raises:
      DataError: The record of the data set is damaged, or a file is missing.
    """
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    entries = _read(state, {"_data_files": [{"filename": str}]}, key)["_data_files"]
    shards = [folder / entry["filename"] for entry in entries]
    missing = [path for path in shards if not path.is_file()]
    if missing or not shards:
        raise DataError(key, f"{missing[0]} is missing, see {state}" if missing else f"{folder} has no rows")
    return shards


def _read(path: Path, schema: dict, key: str) -> dict:
    try:
        return read_json(path, schema)
    except (OSError, InputError) as error:
        raise DataError(key, str(error)) from error
