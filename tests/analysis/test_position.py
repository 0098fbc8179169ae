"""Losses by position equal those of the logits."""

import numpy as np
import optax
import pytest

from sparsejax import analysis
from sparsejax.analysis.position import average_windows, bin_edges
from sparsejax.errors import InputError
from tests.analysis import models
from tests.messages import rejects

pytestmark = pytest.mark.quick


def test_losses_are_those_of_the_logits(text, tmp_path):
    model = models.build(text)
    file = str(text / "0.txt")
    tokens = np.frombuffer((text / "0.txt").read_bytes(), np.uint8).astype(np.int32)
    findings = analysis.analyze(model, "position", tmp_path, {"files": file}, lengths=(16, 48), windows=100)
    for n in (16, 48):
        losses = {position: [] for position in range(n)}
        for start in range(0, len(tokens) - 1, n):
            window = tokens[start : start + n + 1]
            logits = model.logits(window[:-1])
            values = optax.softmax_cross_entropy_with_integer_labels(logits, window[1:])
            for position, value in enumerate(values):
                losses[position].append(float(value))
        rows = [row for row in findings.tables["loss"] if row["length"] == n]
        assert [row["position"] for row in rows] == list(range(n))
        for row in rows:
            assert row["tokens"] == len(losses[row["position"]])
            values = losses[row["position"]]
            assert row["loss"] == pytest.approx(np.mean(values), rel=1e-5)
            assert row["standard_error"] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-3)
        mean = next(row for row in findings.tables["mean"] if row["length"] == n)
        beyond = [value for position in range(models.LENGTH, n) for value in losses[position]]
        assert mean["beyond_trained"] == (pytest.approx(np.mean(beyond), rel=1e-5) if beyond else None)
        assert mean["reach"] == n - 1


def test_bins_and_errors():
    edges = bin_edges(100)
    bins = np.floor(2 * np.log2(np.arange(1, 101)))
    assert edges.tolist() == [int(np.flatnonzero(bins == number)[0]) for number in np.unique(bins)]
    rng = np.random.default_rng(0)
    sums = rng.random((40, 3)) + np.arange(3)
    mean, error, tokens, windows = average_windows(sums, np.ones((40, 3)))
    np.testing.assert_allclose(mean, sums.mean(axis=0))
    np.testing.assert_allclose(error, sums.std(axis=0, ddof=1) / np.sqrt(40))
    assert tokens.tolist() == windows.tolist() == [40] * 3
    # The spread of the estimate over repetitions, with windows of unequal numbers of dependent tokens.
    estimates, errors = [], []
    for _ in range(2000):
        counts = rng.integers(1, 5, (30, 1)).astype(float)
        sums = counts * rng.normal(size=(30, 1))
        mean, error, *_ = average_windows(sums, counts)
        estimates.append(mean[0])
        errors.append(error[0])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)
    assert average_windows(np.ones((1, 1)), np.ones((1, 1)))[1] == 0


def test_bins_of_an_analysis(text, tmp_path):
    model = models.build(text)
    findings = analysis.analyze(model, "position", tmp_path, {"files": str(text / "0.txt")}, lengths=(16,), windows=3)
    rows, bins = findings.tables["loss"], findings.tables["bin"]
    assert all(row["windows"] == row["tokens"] == 3 for row in rows)
    for row in bins:
        inside = rows[row["start"] : row["stop"]]
        assert row["loss"] == pytest.approx(np.mean([entry["loss"] for entry in inside]), rel=1e-5)
        assert row["mean_position"] == pytest.approx((row["start"] + row["stop"] - 1) / 2)
        assert row["standard_error"] <= np.mean([entry["standard_error"] for entry in inside]) + 1e-6
    assert bins[-1]["stop"] == 16


def test_lengths_that_do_not_fit_are_refused(text, tmp_path):
    model = models.build(text, {"embedding.positions": 32})
    for lengths in ((64,), (1,), (16, 10_000)):
        with rejects(InputError, "lengths"):
            analysis.analyze(model, "position", tmp_path, lengths=lengths)
    with rejects(InputError, "data.length"):
        analysis.analyze(model, "position", tmp_path, {"length": 16})
    with rejects(InputError, "kind"):
        analysis.analyze(model, "position", tmp_path, {"task": "passkey"})
    assert list(analysis.kind.open_analysis(analysis.KINDS, model, "position", None).units) == [24]
