"""JSON of damaged files: one line that names the file and the key."""

import json
import math

import pytest

from sparsejax.errors import InputError
from sparsejax.records import parse_json, require
from sparsejax.workdir import Workdir, append_row, read_json, read_last_row, read_rows
from tests.messages import rejects

SCHEMA = {"step": int, "name": (str, None), "runs": {...: {"seed": int}}, "rates": [float]}
WHOLE = {"step": 3, "name": None, "runs": {"a": {"seed": 0}}, "rates": [1, 2.5]}


def test_values_of_the_schema_pass():
    assert parse_json(json.dumps(WHOLE), "file", SCHEMA) == WHOLE
    assert parse_json(b"\xef\xbb\xbf[1, 1e999]", "file") == [1, math.inf]
    assert parse_json('"\\ud83d\\ude00"', "file") == "\U0001f600"
    require({"step": 1, "runs": {}, "rates": [], "other": [[]]}, SCHEMA, "file")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        "9" * 400,
        f"[{2**63}]",
        '"\\ud800"',
        b'"\xed\xa0\x80"',
        b"\xff\xfe[\x00]\x00",
    ],
    ids=["empty", "cut", "deep", "nested", "digits", "64-bits", "surrogate", "utf-8", "utf-16"],
)
def test_damaged_json(text):
    with rejects(InputError, "file"):
        parse_json(text, "file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", value) for value in (None, True, 1.5, "3", [])),
        ("name", 3),
        *(("runs", value) for value in ([], {"a": 3}, {"a": {}}, {"a": {"seed": None}})),
        *(("rates", value) for value in (3, [None], [1, "2"], [False])),
    ],
)
def test_values_of_other_types(key, value):
    with pytest.raises(InputError, match=rf"^file: damaged: {key}[^\n]*$"):
        parse_json(json.dumps(WHOLE | {key: value}), "file", SCHEMA)


def test_a_missing_key_is_named():
    with rejects(InputError, "runs.a.seed"):
        require(WHOLE | {"runs": {"a": {}}}, SCHEMA, "file")


def test_a_folder_in_place_of_a_file(tmp_path):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).mkdir()
    with rejects(InputError, "metrics.jsonl"):
        read_rows(tmp_path / "metrics.jsonl")
    with rejects(InputError, "config.json"):
        read_json(Workdir(tmp_path).config)


def test_a_row_that_was_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_row(path, {"step": step, "train/loss": None})
    whole = path.read_bytes()
    for cut in range(len(whole) // 2, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_rows(path)] == [1]
    path.write_bytes(whole + b'{"step": 3, "trai\0\0\0')  # a power failure
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    path.write_bytes(whole.replace(b'"step": 1', b'"step": "1"'))
    with rejects(InputError, "line 1"):
        read_rows(path)
    assert read_last_row(path) == {"step": 2, "train/loss": None}
