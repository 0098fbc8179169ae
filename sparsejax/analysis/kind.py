"""What every kind of analysis provides, and how it runs: unit by unit, so that a stopped analysis resumes."""

from __future__ import annotations

import abc
import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np

from sparsejax.analysis.page import write_page
from sparsejax.errors import InputError, suggest
from sparsejax.figures import write_figure
from sparsejax.loaded import LoadedModel
from sparsejax.workdir import append_row, replace_file, resume_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]  # of a table: numbers and text by column
Unit = Any  # what is measured at once: JSON
Progress = Callable[[int, int], None]


class Picture(NamedTuple):
    """A figure with its caption; `build` draws it."""

    name: str
    caption: str
    build: Callable[[], Figure]


class Findings(NamedTuple):
    """The result of an analysis.

    Attributes:
      title: Heading of the page.
      tables: Rows by the name of the table; every table is a csv file.
      pictures: Figures; every figure is a PNG and an SVG file.
      lines: Sentences with the main numbers.
    """

    title: str
    tables: dict[str, list[Row]]
    pictures: list[Picture]
    lines: list[str]


class Analysis(abc.ABC):
    """A kind of analysis of one model on one text or probe.

    Attributes:
      kind: Its name.
      Options: Frozen dataclass of its options, with a default each and a `help` in the metadata.
      model: The model.
      data: Keys of the section `data` that differ from those of the run.
    """

    kind: ClassVar[str]
    Options: ClassVar[type]

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: Any):
        self.model, self.data, self.options = model, dict(data), options

    @property
    @abc.abstractmethod
    def units(self) -> list[Unit]:
        """What is measured, in order."""

    @property
    def source(self) -> str:
        """A digest of the text, for the record."""
        return ""

    @abc.abstractmethod
    def measure(self, unit: Unit) -> Any:
        """Measures one unit; returns JSON."""

    @abc.abstractmethod
    def summarize(self, results: list[Any]) -> Findings:
        """Returns the findings of the results of all units."""

    def identity(self) -> dict[str, Any]:
        """What determines the results: the record of another identity is not resumed."""
        options = dataclasses.asdict(self.options)
        identity = {"kind": self.kind, "model": _digest(self.model), "step": self.model.step}
        return json.loads(json.dumps(identity | {"data": self.data, "text": self.source, "options": options}))


def open_analysis(
    kinds: Mapping[str, type[Analysis]], model: LoadedModel, kind: str, data: Mapping[str, Any] | None, **options: Any
) -> Analysis:
    """Returns the analysis of a kind.

    Raises:
      InputError: The kind or an option is unknown, or does not fit the model or the data.
    """
    if kind not in kinds:
        raise InputError("kind", f"{kind!r} is unknown; {suggest(kind, kinds, 'kinds')}")
    known = [field.name for field in dataclasses.fields(kinds[kind].Options)]
    for name in options:
        if name not in known:
            raise InputError(name, f"not an option of {kind}; {suggest(name, known, 'options')}")
    return kinds[kind](model, data or {}, kinds[kind].Options(**options))


def run(analysis: Analysis, out: Path, progress: Progress = lambda unit, units: None) -> Findings:
    """Measures what the record in `out` does not hold yet, and writes tables, figures and the page.

    Args:
      analysis: The analysis.
      out: Folder of the files, whose names begin with the kind. It is created.
      progress: Called with the index of a unit before it is measured, and with their number.

    Raises:
      InputError: The folder cannot be written, or holds another analysis of the kind.
    """
    results = _Record(out, analysis)
    units = analysis.units
    for index, unit in enumerate(units):
        if index not in results.by_unit:
            progress(index, len(units))
            results.add(index, analysis.measure(unit))
    findings = analysis.summarize([results.by_unit[index] for index in range(len(units))])
    for name, rows in findings.tables.items():
        replace_file(out / f"{analysis.kind}_{name}.csv", write_csv(rows))
    for picture in findings.pictures:
        for suffix in (".png", ".svg"):
            write_figure(picture.build, out / f"{analysis.kind}_{picture.name}{suffix}")
    replace_file(out / f"{analysis.kind}.html", write_page(findings).encode())
    return findings


class _Record:
    """The measured units of an analysis, one row each, after a row with its identity."""

    def __init__(self, out: Path, analysis: Analysis):
        self._path = out / f"{analysis.kind}.jsonl"
        if out.exists() and not out.is_dir():
            raise InputError("out", f"{out} is a file; name a folder")
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise InputError("out", f"{out} is not writable")
        rows = resume_rows(self._path, analysis.identity(), "out", "analysis of this kind")
        self.by_unit = {row["unit"]: row["result"] for row in rows}

    def add(self, index: int, result: Any) -> None:
        """Records the result of a unit."""
        append_row(self._path, {"unit": index, "result": result})
        self.by_unit[index] = json.loads(json.dumps(result))  # as a resumed analysis reads it


def write_csv(rows: list[Row]) -> bytes:
    """Returns a table as csv, with numbers of 7 significant digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in row.values()])
    return file.getvalue().encode()


def to_json(array: Any) -> Any:
    """Returns an array as nested lists of numbers of 7 significant digits, which is what float32 holds."""
    array = np.asarray(array, np.float64)
    rounded = np.array([float(f"{value:.7g}") for value in array.ravel()])
    return rounded.reshape(array.shape).tolist()


def _digest(model: LoadedModel) -> str:
    """A digest of the configuration and the parameters of a model."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for leaf in jax.tree.leaves(model.parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
