"""Mixtures draw from their sources by weight, exactly, and evaluate every source alone."""

from itertools import islice

import numpy as np
import pytest

import sparsejax
from sparsejax import config as configs
from sparsejax.analysis import analyze
from sparsejax.config import ConfigError
from sparsejax.data import DataConfig, DataError, Mixture, SourceConfig, load_dataset
from sparsejax.data.dataset import source_seed
from sparsejax.data.mixture import MixtureOrder
from sparsejax.data.probes import PROBES
from sparsejax.errors import InputError
from sparsejax.runs import list_steps, read_arrays, read_iterator
from sparsejax.signals import Interrupted
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs

LENGTH, BATCH = 16, 4
WEIGHTS = ([0.7, 0.3], [0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.05, 0, 0.95], [2, 7, 1, 1e-3, 0.5], [1])


@pytest.mark.quick
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_stretch_has_the_proportions(weights):
    order = MixtureOrder(weights)
    located = np.array([order.locate(number) for number in range(3000)])
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        rows = located[located[:, 0] == source, 1]
        np.testing.assert_array_equal(rows, np.arange(len(rows)))  # no row is left out
        drawn = np.cumsum(located[:, 0] == source)
        assert np.abs(drawn - share * np.arange(1, 3001)).max() < max(1, len(weights) - 1)


@pytest.mark.quick
def test_proportions_are_exact_after_a_period():
    order = MixtureOrder([0.7, 0.2, 0.1])
    start = 10**15
    counts = np.bincount([order.locate(number)[0] for number in range(start, start + 1000)])
    assert counts.tolist() == [700, 200, 100]


def write_sources(folder):
    """Two folders of text of different letters."""
    rng = np.random.default_rng(0)
    for name, letters in (("low", "abcdefgh "), ("high", "ABCDEFGH ")):
        (folder / name).mkdir(exist_ok=True)
        for i in range(30):
            (folder / name / f"{i}.txt").write_text("".join(rng.choice(list(letters), 90)))


def build(folder, weights=(0.75, 0.25), **settings):
    write_sources(folder)
    sources = {
        name: SourceConfig(weight, files=str(folder / name))
        for name, weight in zip(("low", "high"), weights, strict=True)
    }
    return load_dataset(DataConfig("text", "", LENGTH, sources=sources, cache=str(folder / "cache"), **settings))


def is_high(batch):
    return np.array([(bytes(row.astype(np.uint8)).isupper()) for row in batch["inputs"]])


@pytest.mark.quick
@pytest.mark.parametrize("packing", ["none", "packed"])
def test_rows_are_those_of_the_sources(tmp_path, packing):
    dataset = build(tmp_path, packing=packing)
    assert isinstance(dataset, Mixture)
    batches = list(islice(dataset.train_batches(BATCH, 3), 30))
    order, seen = MixtureOrder([0.25, 0.75]), {"low": 0, "high": 0}
    for number in range(30 * BATCH):
        source, row = order.locate(number)
        name = ("high", "low")[source]  # sorted
        expected = dataset.sources[name].draw(np.array([row]), source_seed(3, name))
        batch = batches[number // BATCH]
        assert batch.keys() == expected.keys()
        for field, values in expected.items():
            np.testing.assert_array_equal(batch[field][number % BATCH], values[0])
            assert batch[field].dtype == values.dtype
        seen[name] += 1
    assert seen == {"low": 90, "high": 30}


@pytest.mark.quick
def test_batches_resume_and_are_shared(tmp_path):
    dataset = build(tmp_path)
    batches = list(islice(dataset.train_batches(BATCH, 0), 20))
    iterator = dataset.train_batches(BATCH, 0)
    list(islice(iterator, 11))
    resumed = dataset.train_batches(BATCH, 0)
    resumed.set_state(iterator.get_state())
    shares = [dataset.train_batches(BATCH, 0, process_index=i, process_count=2) for i in range(2)]
    for step, batch in enumerate(batches):
        parts = [next(share)["inputs"] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), batch["inputs"])
        if step >= 11:
            np.testing.assert_array_equal(next(resumed)["inputs"], batch["inputs"])
    other = next(dataset.train_batches(BATCH, 1))
    assert not np.array_equal(other["inputs"], batches[0]["inputs"])


@pytest.mark.quick
def test_an_epoch_of_a_source_has_each_of_its_rows_once(tmp_path):
    dataset = build(tmp_path, weights=(0.5, 0.5))
    for name, source in dataset.sources.items():
        count = len(source.training)
        batches = islice(dataset.train_batches(2, 0), count)
        rows = np.concatenate([batch["inputs"][is_high(batch) == (name == "high")] for batch in batches])
        expected = source.training.take(np.arange(count))["inputs"]
        assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))


@pytest.mark.quick
def test_sources_share_one_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    dataset = build(tmp_path, tokenizer="bpe:300")
    assert dataset.tokenizer is dataset.sources["low"].tokenizer is dataset.sources["high"].tokenizer
    merged = [token for token in range(256, 300) if len(dataset.tokenizer.decode(np.array([token]))) > 1]
    texts = "".join(dataset.tokenizer.decode(np.array([token])) for token in merged)
    assert any(map(str.islower, texts))
    assert any(map(str.isupper, texts))
    phase = load_dataset(dataset.config, loaded=dataset)
    assert phase.sources["low"].corpus is dataset.sources["low"].corpus


@pytest.mark.quick
def test_a_probe_beside_packed_text(tmp_path):
    probe = PROBES["mqar"](length=LENGTH, pairs=2, vocab=32)
    write_sources(tmp_path)
    sources = {
        "text": SourceConfig(1.0, files=str(tmp_path / "low")),
        "recall": SourceConfig(1.0, task="mqar", probe=probe),
    }
    dataset = load_dataset(DataConfig("text", "", LENGTH, packing="packed", sources=sources))
    batch = next(dataset.train_batches(BATCH, 0))
    assert batch.keys() == {"inputs", "targets", "weights", "segments", "positions", "distance"}
    assert (batch["segments"][1::2] == 1).all()
    np.testing.assert_array_equal(batch["positions"][1], np.arange(LENGTH))
    assert (batch["distance"][::2] == 0).all()
    assert dataset.tokens_per_byte is None
    assert not dataset.scores_accuracy


MIXED = {"data.files": "", "data.sources.low.weight": 0.75, "data.sources.high.weight": 0.25, "train.batch": 4}
PHASE = {"train.phases.late.start": 10, "train.phases.late.set.data.sources.high.weight": 2.25}


def load(folder, **settings):
    write_sources(folder)
    files = {f"data.sources.{name}.files": str(folder / name) for name in ("low", "high")}
    return runs.load("", MIXED | files | settings)


def test_a_run_evaluates_every_source_and_resumes(tmp_path, monkeypatch):
    settings = load(tmp_path, **PHASE)
    runs.train_here(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 13)
        with pytest.raises(Interrupted):
            runs.train_here(settings, tmp_path / "run")
    runs.train_here(settings, tmp_path / "run")
    whole, resumed = Workdir(tmp_path / "whole"), Workdir(tmp_path / "run")
    assert read_rows(whole.metrics) == read_rows(resumed.metrics)
    step = list_steps(whole.checkpoints)[-1]
    runs.assert_same_bits(read_arrays(resumed.checkpoints, step), read_arrays(whole.checkpoints, step))
    assert read_iterator(resumed.checkpoints, step) == read_iterator(whole.checkpoints, step)

    evaluated = [row for row in read_rows(whole.metrics) if "eval/loss" in row]
    for row, shares in ((evaluated[0], (0.75, 0.25)), (evaluated[-1], (0.25, 0.75))):
        expected = sum(share * row[f"eval/loss/{name}"] for share, name in zip(shares, ("low", "high"), strict=True))
        assert row["eval/loss"] == pytest.approx(expected, rel=1e-12)
    result = read_json(whole.result)
    assert result["eval/bits_per_byte/low"] == pytest.approx(result["eval/loss/low"] / np.log(2))
    assert read_json(whole.data)["sources"].keys() == {"low", "high"}

    model = sparsejax.load(whole.path)
    assessment = model.evaluate()
    assert assessment.metrics["eval/loss"] == pytest.approx(result["eval/loss"], rel=1e-6)
    assert assessment.evaluation.sources.keys() == {"low", "high"}
    alone = model.evaluate({"files": str(tmp_path / "low")})
    assert not alone.evaluation.sources
    assert alone.metrics["eval/loss"] == pytest.approx(result["eval/loss/low"], rel=0.1)
    with rejects(InputError, "data.files"):
        analyze(model, "position", tmp_path / "analysis")


@pytest.mark.quick
def test_a_phase_changes_weights_only(tmp_path):
    with rejects(ConfigError, "train.phases.late.set.data.sources.other"):
        configs.check(load(tmp_path, **PHASE | {"train.phases.late.set.data.sources.other.weight": 1.0}))
    with pytest.raises(ConfigError, match=r"late\.set\.data\.sources\.low\.files: cannot be set here"):
        configs.check(load(tmp_path, **PHASE | {"train.phases.late.set.data.sources.low.files": "x"}))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("data.files", {"data.files": "text"}),
        ("data.sources", {"data.sources.low.weight": 0, "data.sources.high.weight": 0}),
        ("data.sources.low.weight", {"data.sources.low.weight": -1}),
        ("data.sources.other.weight", {"data.sources.other.files": "x"}),
        ("data.sources.high.task", {"data.sources.high.task": "rhymes"}),
        ("data.sources.high.objective", {"data.sources.high.task": "mqar", "data.objective": "masked"}),
        ("data.sources.high.probe.length", {"data.sources.high.task": "mqar", "data.sources.high.files": ""}),
        ("eval.also", {"eval.also.low.data.length": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(tmp_path, argument, settings):
    with rejects(ConfigError, argument):
        configs.check(load(tmp_path, **settings))


@pytest.mark.quick
def test_errors_about_a_source_name_it(tmp_path):
    sources = {"low": SourceConfig(1.0, files=str(tmp_path / "missing"))}
    with rejects(DataError, "data.sources.low.files"):
        load_dataset(DataConfig("text", "", LENGTH, sources=sources))
