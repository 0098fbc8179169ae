"""An analysis resumes, leaves whole files only, and writes equal bytes each time."""

import csv
import json

import pytest

from sparsejax import analysis
from sparsejax.data.tokenizers import Bytes
from sparsejax.errors import InputError
from tests.analysis import models, test_retrieval
from tests.messages import rejects

pytestmark = pytest.mark.quick


def read_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KINDS = {
    "erf": ({}, {"windows": 9}),
    "attention": ({}, {"windows": 3}),
    "position": ({}, {"lengths": (8, 12, 16)}),
    "needle": (test_retrieval.PASSKEY, {"lengths": (16,), "depths": (0.0, 0.5, 1.0), "examples": 2}),
    "retrieval": (test_retrieval.PAIRS, {"queries": 3, "examples": 2}),
    "ruler": ({}, {"lengths": (240,), "examples": 2, "candidates": 4}),
}


@pytest.mark.parametrize("kind", analysis.KINDS)
def test_a_stopped_analysis_resumes_with_equal_files(text, tmp_path, kind):
    model, (data, options) = models.build(text), KINDS[kind]
    model.tokenizer = Bytes()
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    analysis.analyze(model, kind, whole, data, **options)
    units = []

    def stop(unit, count):
        units.append(unit)
        if len(units) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.analyze(model, kind, resumed, data, progress=stop, **options)
    assert [path.name for path in resumed.iterdir()] == [f"{kind}.jsonl"]
    with (resumed / f"{kind}.jsonl").open("a") as file:
        file.write('{"unit": 2, "resul')  # a crash in the middle of a row
    units.clear()
    analysis.analyze(model, kind, resumed, data, progress=lambda unit, count: units.append(unit), **options)
    assert units == [2]
    assert read_files(whole) == read_files(resumed)
    for table in whole.glob("*.csv"):
        rows = list(csv.DictReader(table.open()))
        assert rows
        assert all(None not in row and None not in row.values() for row in rows)
    page = (whole / f"{kind}.html").read_text()
    assert page.count("<figure>") == len([name for name in read_files(whole) if name.endswith(".svg")])
    assert "http" not in page.replace("http://www.w3.org", "")


def test_another_analysis_is_not_resumed(text, tmp_path):
    model = models.build(text)
    analysis.analyze(model, "erf", tmp_path, windows=1)
    with rejects(InputError, "out"):
        analysis.analyze(model, "erf", tmp_path, windows=2)
    with rejects(InputError, "out"):
        analysis.analyze(models.build(text, scale=3.0), "erf", tmp_path, windows=1)
    with rejects(InputError, "out"):
        analysis.analyze(model, "erf", tmp_path / "erf.jsonl", windows=1)
    record = (tmp_path / "erf.jsonl").read_text().splitlines()
    assert json.loads(record[0])["kind"] == "erf"
    assert len(record) == 2
