"""Losses by position equal those of the logits."""

import numpy as np
import optax
import pytest

from sparsejax import analysis
from sparsejax.analysis.position import bin_positions
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
            assert row["loss"] == pytest.approx(np.mean(losses[row["position"]]), rel=1e-5)
        mean = next(row for row in findings.tables["mean"] if row["length"] == n)
        beyond = [value for position in range(models.LENGTH, n) for value in losses[position]]
        assert mean["beyond_trained"] == (pytest.approx(np.mean(beyond), rel=1e-5) if beyond else None)
        assert mean["reach"] == n - 1


def test_bins_keep_the_mean():
    rng = np.random.default_rng(0)
    losses, tokens = rng.random(100), rng.integers(1, 5, 100)
    middles, means = bin_positions(np.arange(100), losses, tokens)
    assert middles[0] == 1
    assert (np.diff(middles) > 0).all()
    bins = np.floor(2 * np.log2(np.arange(1, 101)))
    for value, number in zip(means, np.unique(bins), strict=True):
        assert value == pytest.approx(np.average(losses[bins == number], weights=tokens[bins == number]))


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
