"""Documents from TensorFlow Datasets, read without TensorFlow: sets that are prepared as ArrayRecord files."""

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
from sparsejax.data.formats import Document

OWN = ("enwik8", "text8")  # the sets of `data.builders`


class TfdsSource:
    """The documents of two splits of a prepared set; nothing is downloaded.

    Attributes:
      train_files: How many examples the training split has.
      validation_files: The same of the validation split.
      bytes: Of the set as it lies on the disk.
      digest: 16 hex digits that change with the set, its version, its splits and what is read of them.
    """

    def __init__(self, config: DataConfig):
        self._config, self._name = config, f"data.tfds: {config.tfds}"
        folder = _find(config)
        try:
            builder = tfds.builder_from_directory(folder)
        except Exception as error:  # the library raises whatever it meets
            raise DataError(f"{self._name}: {folder} cannot be read: {error}") from error
        if builder.info.file_format != tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
            kind = builder.info.file_format.value
            raise DataError(f"{self._name}: its {kind} files need TensorFlow; prepare it anew: {_command(config)}")
        names = {"data.train_split": config.train_split, "data.validation_split": config.validation_split}
        self._sides = [self._open(builder, key, split) for key, split in names.items()]
        self.train_files, self.validation_files = map(len, self._sides)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        self.bytes = sum(path.stat().st_size for path in files)
        digest = hashlib.sha256(repr((config.train_split, config.validation_split)).encode())
        digest.update(repr((config.field, config.label)).encode())
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes() if path.suffix == ".json" else b"")
        self.digest = digest.hexdigest()[:16]

    def read(self) -> Iterator[tuple[int, Document]]:
        """Every document, with the side it is on: those to train on first."""
        for side, source in zip((TRAIN, VALIDATION), self._sides, strict=True):
            for number in range(len(source)):
                yield side, self._read(source, side, number)

    def _open(self, builder: Any, key: str, split: str) -> Any:
        whole = split.partition("[")[0]
        if whole not in builder.info.splits:
            raise DataError(f"{key}: {self._config.tfds} has no split {whole!r}: {', '.join(builder.info.splits)}")
        for field in (self._config.field, self._config.label):
            if field and field not in builder.info.features:
                known = ", ".join(sorted(builder.info.features))
                raise DataError(f"data.field: {self._config.tfds} has no {field!r}: {known}")
        try:
            return builder.as_data_source(split=split)
        except Exception as error:  # the library raises whatever it meets
            raise DataError(f"{key}: {split!r} of {self._config.tfds} cannot be read: {error}") from error

    def _read(self, source: Any, side: int, number: int) -> Document:
        split = (self._config.train_split, self._config.validation_split)[side]
        where = f"{split} example {number}"
        try:
            example = source[number]
        except Exception as error:  # the library raises whatever it meets
            raise DataError(f"{self._name}: {where} cannot be read, the files are damaged: {error}") from error
        text = example[self._config.field]
        if isinstance(text, np.ndarray) and text.dtype == np.uint8:
            text = text.tobytes()
        if not isinstance(text, bytes | str):
            raise DataError(f"data.field: {where}: {self._config.field!r} is {type(text).__name__}, not text")
        label = int(example[self._config.label]) if self._config.label else -1
        return Document(where, text.encode() if isinstance(text, str) else text, label)


def _find(config: DataConfig) -> Path:
    """The folder of the set, of its newest version if none is named."""
    name, _, version = config.tfds.partition(":")
    root = _root(config) / name
    versions = [path for path in root.glob("*") if (path / "dataset_info.json").is_file()]
    found = [path for path in versions if version in ("", path.name)]
    if not found:
        others = f"; there is {', '.join(sorted(path.name for path in versions))}" if versions else ""
        raise DataError(f"data.tfds: {config.tfds} is not prepared in {root.parent}{others}; run: {_command(config)}")
    return max(found, key=lambda path: [int(part) if part.isdecimal() else 0 for part in path.name.split(".")])


def _root(config: DataConfig) -> Path:
    return Path(config.tfds_dir).expanduser() if config.tfds_dir else Path(tfds.core.constants.DATA_DIR).expanduser()


def _command(config: DataConfig) -> str:
    """What prepares the set."""
    name = config.tfds.partition(":")[0]
    if name in OWN:
        return f"python -m sparsejax.data.builders {name} --file={name} --data_dir={_root(config)}"
    made = f"tfds.builder({config.tfds!r}, data_dir={str(_root(config))!r}, file_format='array_record')"
    return f'python -c "import tensorflow_datasets as tfds; {made}.download_and_prepare()"'
