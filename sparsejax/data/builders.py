"""TFDS builders of byte corpora from local files: `python -m sparsejax.data.builders text8 --file=text8`.

The file is verified and cut into the standard splits once; `data.tfds="text8:1.0.0"` reads the result.
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
from sparsejax.paths import local_path


class _Bytes(tfds.core.GeneratorBasedBuilder):
    """A file cut into 90 % training, 5 % validation and 5 % test bytes, one example each."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the file, or a zip of it, into manual_dir."
    SIZE: int
    MD5: str

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}: {self.SIZE:,} bytes, md5 {self.MD5}; split 90 / 5 / 5 percent.",
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
    """The first 10^8 characters of the same dump, reduced to a space and the letters a to z."""

    name, SIZE, MD5 = "text8", 100_000_000, "3bea1919949baf155f99411df5fada7e"


def read_checked(folder: Path, name: str, size: int, md5: str) -> bytes:
    """Reads and verifies the file `name` of a folder, or the file of that name in `name`.zip.

    Raises:
      DataError: The file does not exist, or differs in size or MD5.
    """
    plain, packed = folder / name, folder / f"{name}.zip"
    try:
        if plain.is_file():
            data, path = plain.read_bytes(), plain
        else:
            with zipfile.ZipFile(packed) as archive:
                data, path = archive.read(name), packed
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError("file", f"neither {plain} nor {name} in {packed} exists") from error
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if (len(data), digest) != (size, md5):
        raise DataError("file", f"{path} has {len(data):,} bytes and md5 {digest}; {name} has {size:,} and {md5}")
    return data


BUILDERS = {builder.name: builder for builder in (Enwik8, Text8)}


def prepare(builder: type[tfds.core.GeneratorBasedBuilder], manual_dir: Path, data_dir: str | None) -> Path:
    """Writes the ArrayRecord files of a data set from the file in `manual_dir`, and returns their folder.

    Raises:
      DataError: The file does not exist, or differs in size or MD5.
    """
    if not any((manual_dir / name).is_file() for name in (builder.name, f"{builder.name}.zip")):
        raise DataError("file", f"neither {manual_dir / builder.name} nor its zip exists")
    instance = builder(data_dir=data_dir, file_format="array_record")
    instance.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    return Path(instance.data_dir)


def main() -> int:
    """Prepares the data set that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.data.builders", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--file", required=True, help="the file or its zip; it must have the name of the data set")
    parser.add_argument("--data_dir", default=None, help="folder of TFDS data sets; defaults to that of TFDS")
    options = parser.parse_args()
    try:
        folder = prepare(BUILDERS[options.name], local_path(options.file, "file").parent, options.data_dir)
    except DataError as error:
        print(f"sparsejax: --{error}", file=sys.stderr)
        return 2
    print(f'{folder}: read it with --config.data.tfds="{options.name}:{BUILDERS[options.name].VERSION}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
