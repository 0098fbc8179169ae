"""Documents of TensorFlow Datasets in ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sparsejax.data.config import DataConfig
from sparsejax.data.errors import DataError
from sparsejax.data.files import TRAIN, VALIDATION
from sparsejax.data.formats import Document, check_utf8
from sparsejax.errors import suggest
from sparsejax.paths import local_path

LOCAL_BUILDERS = ("enwik8", "text8")  # see `data.builders`


class TfdsSource:
    """The documents of two splits of a prepared data set; nothing is downloaded.

    Attributes:
      train_files: Number of examples of the training split.
      validation_files: Number of examples of the validation split.
      bytes: Size of the data set on disk.
      digest: 16 hex digits that change with the data set, its version, its splits and the fields that are read.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        folder = _find(config)
        try:
            builder = tfds.builder_from_directory(folder)
        except Exception as error:  # the library has no common base class
            raise DataError("data.tfds", f"{config.tfds}: {folder} is not a prepared data set") from error
        if builder.info.file_format != tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
            kind = builder.info.file_format.value
            raise DataError(
                "data.tfds", f"{config.tfds}: its {kind} files need TensorFlow; prepare it again: {_command(config)}"
            )
        splits = {"data.train_split": config.train_split, "data.validation_split": config.validation_split}
        self._sides = [self._open(builder, key, split) for key, split in splits.items()]
        self.train_files, self.validation_files = map(len, self._sides)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        self.bytes = sum(path.stat().st_size for path in files)
        digest = hashlib.sha256(repr((config.train_split, config.validation_split)).encode())
        digest.update(repr((config.field, config.label)).encode())
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes() if path.suffix == ".json" else b"")
        self.digest = digest.hexdigest()[:16]
        self.record: dict[str, Any] = {}
        self.notes: list[str] = []

    def read(self) -> Iterator[tuple[int, Document]]:
        """Iterates over (side, document), training documents first."""
        for side, source in zip((TRAIN, VALIDATION), self._sides, strict=True):
            for number in range(len(source)):
                yield side, self._read(source, side, number)

    def _open(self, builder: Any, key: str, split: str) -> Any:
        name = split.partition("[")[0]
        if name not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise DataError(key, f"{self._config.tfds} has no split {name!r}: its splits are {known}")
        for field_key, field in (("data.field", self._config.field), ("data.label", self._config.label)):
            if field and field not in builder.info.features:
                known = ", ".join(sorted(builder.info.features))
                raise DataError(field_key, f"{self._config.tfds} has no {field!r}: its fields are {known}")
        try:
            return builder.as_data_source(split=split)
        except Exception as error:  # the library has no common base class
            raise DataError(key, f"{self._config.tfds} has no slice {split!r}, or its files are damaged") from error

    def _read(self, source: Any, side: int, number: int) -> Document:
        split = (self._config.train_split, self._config.validation_split)[side]
        location = f"{split} example {number}"
        try:
            example = source[number]
        except Exception as error:  # the library has no common base class
            raise DataError("data.tfds", f"{self._config.tfds}: {location}: the files are damaged") from error
        text = example[self._config.field]
        if isinstance(text, np.ndarray) and text.dtype == np.uint8:
            text = text.tobytes()
        elif isinstance(text, bytes) and self._config.read_as != "bytes":
            check_utf8(
                text, f"{self._config.tfds}: {location}", cut=True, argument="data.tfds"
            )  # splits may cut a character
        elif not isinstance(text, bytes | str):
            raise DataError("data.field", f"{location}: {self._config.field!r} is {type(text).__name__}, not text")
        label = int(example[self._config.label]) if self._config.label else -1
        return Document(location, text.encode() if isinstance(text, str) else text, label)


def _find(config: DataConfig) -> Path:
    """Folder of the data set, of its newest version by default."""
    name, _, version = config.tfds.partition(":")
    root = _root(config) / name
    versions = [path for path in root.glob("*") if (path / "dataset_info.json").is_file()]
    matching = [path for path in versions if version in ("", path.name)]
    if not matching:
        others = f", only {', '.join(sorted(path.name for path in versions))}" if versions else ""
        prepared = {path.parent.parent.name for path in root.parent.glob("*/*/dataset_info.json")}
        if not versions and prepared:
            others = f"; {suggest(name, sorted(prepared), 'prepared data sets')}"
        raise DataError("data.tfds", f"{config.tfds} is not prepared in {root.parent}{others}; run {_command(config)}")
    return max(matching, key=lambda path: [int(part) if part.isdecimal() else 0 for part in path.name.split(".")])


def _root(config: DataConfig) -> Path:
    return local_path(config.tfds_dir or tfds.core.constants.DATA_DIR, "data.tfds_dir")


def _command(config: DataConfig) -> str:
    """Shell command that prepares the data set."""
    name = config.tfds.partition(":")[0]
    if name in LOCAL_BUILDERS:
        return f"python -m sparsejax.data.builders {name} --file={name} --data_dir={_root(config)}"
    builder = f"tfds.builder({config.tfds!r}, data_dir={str(_root(config))!r}, file_format='array_record')"
    return f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
