"""Streams read every token once per epoch, in bounded memory, resume exactly, and do not depend on the processes."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from sparsejax.config import ConfigError, check
from sparsejax.data import DataConfig, DataError, SourceConfig, load_dataset, preview
from sparsejax.data import stream as streams
from sparsejax.data.config import MaskConfig
from sparsejax.runs import list_steps, read_arrays, read_iterator
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs
from tests.train.test_processes import find_port

LENGTH, BATCH = 16, 4
KINDS = {
    "windows": {},
    "one row": {"buffer": 1},
    "packed": {"packing": "packed"},
    "records": {"records": True, "packing": "packed"},
    "separated": {"separator": r"\n\n"},
    "masked": {"objective": "masked", "mask": MaskConfig(unit="span"), "packing": "packed"},
    "readers": {"readers": 2},
    "mixture": {"mixture": True},
    "mixture of readers": {"mixture": True, "readers": 2},
}


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    monkeypatch.setattr(streams, "SPAN", 40)


def write_shards(folder, count=6, records=False):
    """Numbered lines in several files, so that every line is known by its text."""
    folder.mkdir(exist_ok=True)
    rng, line = np.random.default_rng(0), iter(range(10**6))
    for shard in range(count):
        texts = ["".join(f"{next(line)} " for _ in range(rng.integers(2, 9))) + "\n" for _ in range(30)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts) if records else "\n".join(texts)
        (folder / f"{shard}.{'jsonl' if records else 'txt'}").write_text(content)
    return folder


def build(folder, settings=None, **others):
    settings = dict(settings or {}) | others
    train = write_shards(folder / "train", records=settings.pop("records", False))
    held_out = write_shards(folder / "validation", 1)
    files = {"validation": str(held_out), "stream": True}
    settings = {"buffer": 8, "cache": str(folder / "cache")} | settings
    if settings.pop("mixture", False):
        sources = {
            "stream": SourceConfig(0.75, files=str(train), **files),
            "corpus": SourceConfig(0.25, files=str(held_out)),
        }
        return load_dataset(DataConfig("text", "", LENGTH, sources=sources, **settings))
    return load_dataset(DataConfig("text", str(train), LENGTH, **files, **settings))


@pytest.fixture(params=KINDS)
def dataset(request, tmp_path):
    return build(tmp_path, KINDS[request.param])


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.quick
def test_batches_resume_at_any_step(dataset):
    batches = list(islice(dataset.train_batches(BATCH, 3), 60))
    running, states = dataset.train_batches(BATCH, 3), []
    for _ in range(50):
        states.append(running.get_state())
        next(running)
    for step in (0, 1, 2, 7, 8, 23, 49):
        resumed = dataset.train_batches(BATCH, 3)
        resumed.set_state(json.loads(json.dumps(states[step])))
        assert_same(islice(resumed, 10), batches[step : step + 10])
    assert len(json.dumps(states[-1])) < 500


@pytest.mark.quick
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches(dataset, count):
    shares = [dataset.train_batches(BATCH, 1, process_index=i, process_count=count) for i in range(count)]
    expected = list(islice(dataset.train_batches(BATCH, 1), 20))
    for batch in expected[:10]:
        parts = [next(share) for share in shares]
        assert_same([batch], [{name: np.concatenate([part[name] for part in parts]) for name in batch}])
    state = shares[0].get_state()
    state["readers"] = {name: value for share in shares for name, value in share.get_state()["readers"].items()}
    alone = dataset.train_batches(BATCH, 1)
    alone.set_state(state)
    assert_same(islice(alone, 10), expected[10:])


def scored(batch):
    return batch["targets"][batch["weights"] > 0]


@pytest.mark.quick
@pytest.mark.parametrize("packing", ["none", "packed"])
def test_an_epoch_has_every_token_once(tmp_path, packing):
    dataset = build(tmp_path, packing=packing)
    reader = dataset.open_reader(0)
    size = sum(path.stat().st_size for path in (tmp_path / "train").iterdir())
    targets, number = [], 0
    while reader.get_state()["epoch"] == 0:
        batch = reader.draw(np.array([number]))
        number += 1
        if reader.get_state()["epoch"] == 0:
            targets.append(scored(batch))
    targets = np.concatenate(targets)
    text = np.concatenate(
        [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted((tmp_path / "train").iterdir())]
    )
    missing = np.bincount(text, minlength=256)[1:] - np.bincount(targets, minlength=256)[1:]
    block = 8 * LENGTH + 100  # the last block of the epoch has text of the next one, too
    assert np.abs(missing).sum() < block < size / 5


@pytest.mark.quick
def test_seeds_and_epochs_order_files_and_rows_anew(tmp_path):
    dataset = build(tmp_path)
    first, other = (next(dataset.train_batches(64, seed))["inputs"] for seed in (0, 1))
    assert not np.array_equal(first, other)
    reader = dataset.open_reader(0)
    orders = [[file.name for file in reader._order(epoch)] for epoch in range(4)]
    assert len(set(map(tuple, orders))) > 1
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    pair = [dataset.open_reader(0, i, 2) for i in range(2)]
    for epoch in range(4):
        names = [file.name for reader in pair for file in reader._order(epoch)]
        assert sorted(names) == sorted(orders[0])


@pytest.mark.quick
def test_windows_are_adjacent_text_in_the_order_of_the_files(tmp_path):
    """The rows of a block, put in order again, are the text with a separator per document."""
    dataset = build(tmp_path, buffer=4)
    reader = dataset.open_reader(0)
    text = b"".join(b"\0" + file.path.read_bytes() for file in reader._order(0))
    rows = []
    for number in range(40):
        batch = reader.draw(np.array([number]))
        block = reader._block
        index = block.start.row + int(block.order[number - block.start.row])
        rows.append((index, bytes(batch["inputs"][0].astype(np.uint8))))
    assert [index for index, _ in rows] != sorted(index for index, _ in rows)
    joined = b"".join(row for index, row in sorted(rows) if index < block.start.row)
    assert len(joined) > 20 * LENGTH
    assert joined == text[: len(joined)]


@pytest.mark.quick
def test_documents_are_cut_between_characters_and_lines(tmp_path):
    for text in ("aä€🙂" * 40, "line\n" * 60, "ä" * 100, "a" * 41, ""):
        spans = list(streams._cut([text.encode()[:55], text.encode()[55:]], anywhere=False))
        assert b"".join(span for span, _ in spans).decode() == text
        assert [starts for _, starts in spans] == [True, *[False] * (len(spans) - 1)][: len(spans)]
        for span, _ in spans:
            span.decode()
            assert len(span) <= 40
    assert all(span.endswith(b"\n") for span, _ in streams._cut([b"line\n" * 60], anywhere=False))


@pytest.mark.quick
def test_compressed_files_and_tokenizers(tmp_path):
    pytest.importorskip("tokenizers")
    folder = write_shards(tmp_path / "train")
    trained = load_dataset(DataConfig("text", str(folder), LENGTH, tokenizer="bpe:300", cache=str(tmp_path / "c")))
    (tmp_path / "words.json").write_bytes(trained.tokenizer.data)
    for path in folder.iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    dataset = load_dataset(
        DataConfig(
            "text",
            str(folder),
            LENGTH,
            validation=str(write_shards(tmp_path / "validation", 1)),
            stream=True,
            tokenizer=str(tmp_path / "words.json"),
            cache=str(tmp_path / "cache"),
        )
    )
    batch = next(dataset.train_batches(BATCH, 0))
    assert batch["inputs"].max() >= 256
    text = "".join(map(dataset.tokenizer.decode, batch["inputs"]))
    assert set(text) <= set("0123456789 \n") | set("<|endoftext|>")
    names = {path.name for path in (tmp_path / "cache").rglob("train") if path.stat().st_size}
    assert names == set()  # no training tokens on disk


@pytest.mark.quick
def test_description_and_preview(dataset):
    lines = [*dataset.describe(), *preview(dataset, 0, 3)]
    assert len([line for line in lines if line.startswith("row ")]) == 3
    assert any("rows are shuffled at once" in line for line in lines)
    assert next(iter(dataset.validation_batches(BATCH)))["inputs"].shape == (BATCH, LENGTH)


@pytest.mark.quick
def test_only_the_start_of_a_file_is_read_before_training(tmp_path):
    """The digest and the inspection do not read the text."""
    write_shards(tmp_path / "validation", 1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "3.txt").write_text("line\n" * 20_000)
    dataset = build_again(tmp_path)
    with (tmp_path / "train" / "3.txt").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    again = build_again(tmp_path)
    assert again.digest == dataset.digest
    with rejects(DataError, "data.files"):
        list(islice(again.train_batches(BATCH, 0), 2000))
    (tmp_path / "train" / "9.txt").write_text("new")
    assert build_again(tmp_path).digest != dataset.digest


def build_again(folder):
    files = {"validation": str(folder / "validation"), "stream": True}
    return load_dataset(DataConfig("text", str(folder / "train"), LENGTH, buffer=8, **files))


@pytest.mark.quick
def test_the_text_of_a_phase_is_listed_once(tmp_path):
    dataset = build(tmp_path)
    longer = DataConfig(**vars(dataset.config) | {"length": 32})
    phase = load_dataset(longer, loaded=dataset)
    assert phase.training.text is dataset.training.text
    assert next(phase.train_batches(2, 0))["inputs"].shape == (2, 32)


MEMORY = """
import resource, sys
from itertools import islice
from sparsejax.data import DataConfig, load_dataset
files, validation = sys.argv[1:]
dataset = load_dataset(DataConfig("text", files, 256, validation=validation, stream=True, buffer=256))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(len(batch["inputs"]) for batch in islice(dataset.train_batches(64, 0), 7000))
print(rows * 256, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_bounded(tmp_path):
    """One file of 64 MB, which is one document, is read in less than 24 MB."""
    (tmp_path / "large.txt").write_bytes(b"The quick brown fox jumps over the lazy dog.\n" * 1_450_000)
    (tmp_path / "small.txt").write_bytes(b"validation text\n" * 1000)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large.txt"), str(tmp_path / "small.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens > 1.5 * (tmp_path / "large.txt").stat().st_size
    assert grown < 24 * 2**20


STREAM = {"data.stream": True, "data.buffer": 16, "train.steps": 60}


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    train, held_out = write_shards(tmp_path / "train"), write_shards(tmp_path / "validation", 1)
    keys = STREAM | {"data.files": train, "data.validation": held_out}
    arguments = ["train", f"--config={runs.RECIPE}", *(f"--config.{key}={value}" for key, value in keys.items())]
    whole, killed = Workdir(tmp_path / "whole"), Workdir(tmp_path / "killed")
    assert runs.finish(runs.start(*arguments, f"--workdir={whole.path}"))[0] == 0
    process = runs.start(*arguments, f"--workdir={killed.path}")
    while not (killed.checkpoints / "25").is_dir():
        runs.wait_for_row(process, killed.path, 25)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    assert runs.finish(runs.start(*arguments, f"--workdir={killed.path}"))[0] == 0
    step = list_steps(whole.checkpoints)[-1]
    runs.assert_same_bits(read_arrays(killed.checkpoints, step), read_arrays(whole.checkpoints, step))
    assert read_iterator(killed.checkpoints, step) == read_iterator(whole.checkpoints, step)
    assert whole.metrics.read_bytes() == killed.metrics.read_bytes()
    assert read_rows(whole.metrics)[-1]["train/loss"] < read_rows(whole.metrics)[0]["train/loss"] / 1.5
    assert read_json(whole.data)["training"]["files"] == 6


def test_one_process_resumes_the_stream_of_two(tmp_path, monkeypatch):
    """The checkpoint has the readers of both processes."""
    monkeypatch.undo()  # the spans are those of the other processes
    train, held_out = write_shards(tmp_path / "train"), write_shards(tmp_path / "validation", 1)
    keys = STREAM | {"data.files": train, "data.validation": held_out, "data.readers": 2, "model.schedule": "full"}
    keys |= {"train.steps": 20, "checkpoint.every": 5}
    arguments = [f"--config={runs.RECIPE}", *(f"--config.{key}={value}" for key, value in keys.items())]
    address = f"127.0.0.1:{find_port()}"
    arguments.append(f"--workdir={tmp_path / 'two'}")
    pair = [runs.start("train", *arguments, f"--distributed={address},{index}/2") for index in range(2)]
    for code, _, err in [runs.finish(process) for process in pair]:
        assert code == 0, err
    two = Workdir(tmp_path / "two")
    assert read_iterator(two.checkpoints, 20)["readers"].keys() == {"0", "1"}
    alone = runs.load(str(train), keys)
    runs.train_here(alone, tmp_path / "one")
    for a, b in zip(read_rows(two.metrics), read_rows(Workdir(tmp_path / "one").metrics), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    shutil.rmtree(two.checkpoints / "20")
    two.result.unlink()
    assert "at step 15\n" in runs.train_here(alone, two.path)
    assert read_iterator(two.checkpoints, 20) == read_iterator(Workdir(tmp_path / "one").checkpoints, 20)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("data.validation", {"data.validation": ""}),
        ("data.files", {"data.files": ""}),
        ("data.stream", {"data.task": "mqar"}),
        ("data.stream", {"data.objective": "classify", "data.label": "label", "model.causal": False}),
        ("data.tokenizer", {"data.tokenizer": "bpe:300"}),
        ("data.buffer", {"data.buffer": 0}),
        ("data.readers", {"data.readers": 2, "data.stream": False}),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_that_do_not_fit_a_stream(argument, settings):
    with rejects(ConfigError, argument):
        check(runs.load("train", STREAM | {"data.validation": "validation"} | settings))


@pytest.mark.quick
def test_readers_need_files_and_rows(tmp_path):
    with rejects(DataError, "data.readers"):
        build(tmp_path, readers=7)
    with rejects(DataError, "data.readers"):
        build(tmp_path, readers=3).train_batches(4, 0)


@pytest.mark.quick
def test_validation_text_is_no_training_text(tmp_path):
    folder = write_shards(tmp_path / "train")
    with rejects(DataError, "data.validation"):
        load_dataset(DataConfig("text", str(folder), LENGTH, validation=str(folder / "0.txt"), stream=True))


@pytest.mark.quick
def test_a_stream_without_a_token_ends(tmp_path):
    write_shards(tmp_path / "validation", 1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with rejects(DataError, "data.files"):
        next(build_again(tmp_path).train_batches(BATCH, 0))
