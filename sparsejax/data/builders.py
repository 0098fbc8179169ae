"""TFDS builders of byte corpora from the user's own files: `python -m sparsejax.data.builders text8 --file=text8`.

The file is checked and cut into the field's standard splits once; after that `data.tfds="text8:1.0.0"` reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from sparsejax.data.errors import DataError


class _Bytes(tfds.core.GeneratorBasedBuilder):
    """One file of bytes, cut into its first 90 %, the next 5 % and the last 5 %: one example each."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the file, or a zip of it, into manual_dir."
    SIZE: int
    MD5: str

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}: {self.SIZE:,} bytes, md5 {self.MD5}; splits of 90, 5 and 5 percent.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        data = read_checked(Path(manager.manual_dir), self.name, self.SIZE, self.MD5)
        first, second = self.SIZE // 20 * 18, self.SIZE // 20 * 19
        parts = {"train": data[:first], "validation": data[first:second], "test": data[second:]}
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, data: bytes) -> Iterator[tuple[int, dict[str, bytes]]]:
        yield 0, {"text": data}


class Enwik8(_Bytes):
    """The first 10^8 bytes of an English Wikipedia dump (Hutter prize)."""

    name, SIZE, MD5 = "enwik8", 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"


class Text8(_Bytes):
    """The first 10^8 characters of the same, cleaned to a space and the letters a to z."""

    name, SIZE, MD5 = "text8", 100_000_000, "3bea1919949baf155f99411df5fada7e"


def read_checked(folder: Path, name: str, size: int, md5: str) -> bytes:
    """The file `name` in a folder, or the one file in `name`.zip.

    Raises:
      DataError: it is not there, or not the file that was meant.
    """
    plain, packed = folder / name, folder / f"{name}.zip"
    try:
        if plain.is_file():
            data, place = plain.read_bytes(), plain
        else:
            with zipfile.ZipFile(packed) as archive:
                data, place = archive.read(name), packed
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"--file: no file {plain}, and {packed} does not hold it: {error}") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if (len(data), found) != (size, md5):
        raise DataError(f"--file: {place} has {len(data):,} bytes and md5 {found}; {name} has {size:,} and {md5}")
    return data


BUILDERS = {builder.name: builder for builder in (Enwik8, Text8)}


def prepare(builder: type[tfds.core.GeneratorBasedBuilder], manual_dir: Path, data_dir: str | None) -> Path:
    """Writes the ArrayRecord files of a set, from the file in `manual_dir`; returns their folder.

    Raises:
      DataError: not the right file.
    """
    if not any((manual_dir / name).is_file() for name in (builder.name, f"{builder.name}.zip")):
        raise DataError(f"--file: no file {manual_dir / builder.name}, nor a zip of it")
    made = builder(data_dir=data_dir, file_format="array_record")
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    return Path(made.data_dir)


def main() -> int:
    """Prepares the set that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.data.builders", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--file", required=True, help="the file, or a zip of it; its name must be that of the set")
    parser.add_argument("--data_dir", default=None, help="where TFDS sets are; TFDS's own default if not given")
    options = parser.parse_args()
    try:
        folder = prepare(BUILDERS[options.name], Path(options.file).expanduser().parent, options.data_dir)
    except DataError as error:
        print(f"sparsejax: {error}", file=sys.stderr)
        return 2
    print(f'{folder}: read it with --config.data.tfds="{options.name}:{BUILDERS[options.name].VERSION}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
