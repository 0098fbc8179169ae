"""Accuracies equal those of the logits on the same examples; the prediction equals the dense receptive field."""

import dataclasses

import numpy as np
import pytest

from sparsejax import analysis
from sparsejax.data.probes import KeyValue, Passkey
from sparsejax.errors import InputError
from sparsejax.patterns import receptive_field
from tests.analysis import models
from tests.messages import rejects

pytestmark = pytest.mark.quick

LOCAL = {"schedule": "2x(local)", "layers.local.mixer.pattern": "causal & (window(5) | sink(2))"}
PASSKEY = {"task": "passkey", "probe.length": 20, "probe.digits": 2, "probe.names": 4, "probe.fillers": 3}
PAIRS = {"task": "key_value", "probe.pairs": 4, "probe.digits": 2}


@pytest.fixture(scope="module")
def model(text):
    return models.build(text, LOCAL)


def assess(model, probe, examples):
    """Exact matches and correct tokens by the arg max of the logits, and answers in the dense receptive field."""
    field = receptive_field.matrix([pattern for _, pattern in model.config.connectivity], probe.length)
    rows, tokens, inside = [], [], []
    for index in range(examples):
        example = probe.example(0, index, validation=True)
        scored = np.flatnonzero(example["weights"])
        correct = np.asarray(model.logits(example["inputs"])).argmax(-1)[scored] == example["targets"][scored]
        rows.append(correct.all())
        tokens += correct.tolist()
        inside += [field[p, p - example["distance"][p] + 1] for p in scored]
    return np.mean(rows), np.mean(tokens), np.mean(inside)


def test_needles_are_scored_like_the_logits(model, tmp_path):
    options = {"lengths": (16, 24), "depths": (0.0, 0.5, 1.0), "needles": (1, 2), "examples": 4}
    findings = analysis.analyze(model, "needle", tmp_path, PASSKEY, **options)
    rows = findings.tables["accuracy"]
    assert len(rows) == 12
    for row in rows:
        probe = Passkey(row["length"], row["needles"], 2, 4, 3, depth=row["depth"])
        expected = assess(model, probe, 4)
        assert (row["exact_match"], row["accuracy"], row["reachable"]) == pytest.approx(expected)
    assert {0.0, 1.0} <= {row["reachable"] for row in rows}  # both sides of the boundary


def test_pairs_are_scored_like_the_logits(model, tmp_path):
    findings = analysis.analyze(model, "retrieval", tmp_path, PAIRS, queries=4, examples=4)
    rows = findings.tables["accuracy"]
    assert [row["pair"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        probe = KeyValue(4, 2, row["pair"])
        expected = assess(model, probe, 4)
        assert (row["exact_match"], row["accuracy"], row["reachable"]) == pytest.approx(expected)
        assert row["length"] == probe.length
    assert rows[0]["reachable"] < rows[-1]["reachable"] == 1


def test_models_and_options_that_do_not_fit_are_refused(text, model, tmp_path):
    encoder = models.build(text, LOCAL)
    encoder.config = dataclasses.replace(encoder.config, causal=False)
    with rejects(InputError, "kind"):
        analysis.analyze(encoder, "needle", tmp_path, PASSKEY)
    learned = models.build(text, LOCAL | {"embedding.positions": 24})
    with rejects(InputError, "lengths"):
        analysis.analyze(learned, "needle", tmp_path, PASSKEY, lengths=(16, 48))
    with rejects(InputError, "data.probe.pairs"):
        analysis.analyze(learned, "retrieval", tmp_path, PAIRS | {"probe.pairs": 16})
    for options, argument in (
        ({"lengths": (4,)}, "lengths"),
        ({"depths": (0.5, 1.5)}, "depths"),
        ({"needles": (9,)}, "names"),
        ({"examples": 0}, "examples"),
    ):
        with rejects(InputError, argument):
            analysis.analyze(model, "needle", tmp_path, PASSKEY, **options)
    with rejects(InputError, "data.task"):
        analysis.analyze(model, "needle", tmp_path, {"task": "mqar"})
    with rejects(InputError, "queries"):
        analysis.analyze(model, "retrieval", tmp_path, PAIRS, queries=1)
    assert not list(tmp_path.iterdir())
