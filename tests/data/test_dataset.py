"""Batches of every source are functions of seed and step, resume, are shared by processes, and match the counts."""

import json
from itertools import islice

import numpy as np
import pytest

from sparsejax.data import DataConfig, DataError, load_dataset, preview
from sparsejax.data.config import MaskConfig
from sparsejax.data.probes import PROBES
from tests.messages import rejects

pytestmark = pytest.mark.quick

SOURCES = {
    "bytes": {},
    "chars": {"tokenizer": "chars"},
    "bpe": {"tokenizer": "bpe:280"},
    "mapped": {"cache": "cache"},
    "records": {"records": True},
    "packed": {"records": True, "packing": "packed"},
    "masked": {"objective": "masked"},
    "packed masked spans": {
        "records": True,
        "packing": "packed",
        "objective": "masked",
        "mask": MaskConfig(unit="span"),
    },
    "prefix": {"objective": "prefix", "prefix": 5},
    "classify": {"records": True, "objective": "classify", "label": "label"},
    "mqar": {"task": "mqar", "probe": PROBES["mqar"](length=16, pairs=2, vocab=32)},
    "state_tracking": {"task": "state_tracking"},
}
LENGTH, BATCH = 16, 4


@pytest.fixture(params=SOURCES)
def dataset(request, tmp_path):
    return build(tmp_path, SOURCES[request.param])


def build(folder, settings, stride=0):
    settings = dict(settings)
    if settings.get("tokenizer", "").startswith("bpe"):
        pytest.importorskip("tokenizers")
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abcdefghij "), (60, 90))
    texts = ["".join(row[: rng.integers(5, 90)]) for row in letters]
    if settings.pop("records", False):
        files = folder / "text.jsonl"
        files.write_text("".join(json.dumps({"text": text, "label": i % 5}) + "\n" for i, text in enumerate(texts)))
    else:
        files = folder / "text"
        files.mkdir()
        for i, text in enumerate(texts):
            (files / f"{i}.txt").write_text(text)
    task = settings.pop("task", "text")
    length = getattr(settings.get("probe"), "length", LENGTH) if task != "state_tracking" else PROBES[task]().length
    cache = (
        {"cache": str(folder / settings.pop("cache", "other"))}
        if "cache" in settings or "tokenizer" in settings
        else {}
    )
    return load_dataset(DataConfig(task, str(files) if task == "text" else "", length, **cache, **settings), stride)


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype == (np.float32 if name == "weights" else np.int32)
            np.testing.assert_array_equal(a[name], b[name])


def epoch(dataset):
    """A number of steps that ends within the second epoch."""
    return 3 * len(dataset.training) // (2 * BATCH) + 1 if dataset.corpus is not None else 10


def test_resuming_in_the_middle_of_an_epoch(dataset):
    steps = epoch(dataset)
    running = dataset.train_batches(BATCH, 7)
    list(islice(running, steps))
    state = running.get_state()
    expected = list(islice(running, 5))
    fresh = dataset.train_batches(BATCH, 7)
    fresh.set_state(state)
    assert_same(islice(fresh, 5), expected)


def test_seeds_differ(dataset):
    first, second = (np.concatenate([b["inputs"] for b in islice(dataset.train_batches(BATCH, s), 5)]) for s in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batches(dataset, count):
    def join(shares):
        for parts in zip(*shares, strict=True):
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    steps = min(epoch(dataset), 30)
    shares = [
        islice(dataset.train_batches(BATCH, 3, process_index=i, process_count=count), steps) for i in range(count)
    ]
    assert_same(join(shares), islice(dataset.train_batches(BATCH, 3), steps))
    held_out = [dataset.validation_batches(BATCH, limit=5, process_index=i, process_count=count) for i in range(count)]
    assert_same(join(held_out), dataset.validation_batches(BATCH, limit=5))


def test_validation_is_the_same_every_time(dataset):
    assert_same(dataset.validation_batches(BATCH, limit=3), dataset.validation_batches(BATCH, limit=3))


def test_tokens_are_within_the_vocabulary(dataset):
    batches = [*islice(dataset.train_batches(BATCH, 0), 20), *dataset.validation_batches(BATCH, limit=5)]
    for batch in batches:
        assert all(0 <= batch[name].min() <= batch[name].max() < dataset.vocab for name in ("inputs", "targets"))
        assert set(np.unique(batch["weights"])) <= {0, 1}


def test_description_and_preview(dataset):
    lines = [*dataset.describe(), *preview(dataset, 0, 2)]
    assert len([line for line in lines if line.startswith("row ")]) == 2
    assert all("\n" not in line for line in lines)
    if dataset.corpus is None:
        return
    for name, side in (("training", dataset.corpus.training), ("validation", dataset.corpus.held_out)):
        assert dataset.counts[name]["documents_read"] == side.read
        assert f"{name}: {side.read:,} documents read" in "\n".join(lines)


def test_masks_differ_between_epochs(tmp_path):
    dataset = build(tmp_path, SOURCES["masked"])
    masks = {}  # by row
    for batch in islice(dataset.train_batches(1, 0), 3 * len(dataset.training)):
        masks.setdefault(batch["targets"].tobytes(), []).append(batch["weights"].tobytes())
    assert {len(drawn) for drawn in masks.values()} == {3}
    assert sum(len(set(drawn)) == 3 for drawn in masks.values()) > 0.9 * len(masks)


def test_counts_of_tokens_add_up(tmp_path):
    packed = build(tmp_path, SOURCES["packed"])
    stream = build(tmp_path, SOURCES["records"])
    for dataset in (packed, stream):
        counts = dataset.counts["training"]
        weights = sum(batch["weights"].sum() for batch in islice(dataset.train_batches(1, 0), len(dataset.training)))
        assert weights == counts["scored_tokens"]
    assert stream.counts["training"]["tokens_left_over"] == (len(stream.corpus.train) - 1) % LENGTH
    # Every byte of every document and its end.
    side = packed.corpus.training
    assert packed.counts["training"]["scored_tokens"] == len(side.tokens) + 1
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    with rejects(DataError, "data.files"):
        load_dataset(DataConfig("text", str(tmp_path / "one.jsonl"), 4, packing="packed"))
