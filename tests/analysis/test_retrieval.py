"""Accuracies equal those of the logits on the same examples; the prediction equals the dense receptive field."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from sparsejax import analysis
from sparsejax.analysis.prompts import (
    QUESTION,
    SENTENCE,
    Haystack,
    build_pairs,
    build_tracking,
    build_words,
    count_common,
    count_frequent,
)
from sparsejax.analysis.ruler import FREQUENT_QUESTION, TASKS
from sparsejax.data.probes import PROBES, KeyValue, Passkey
from sparsejax.data.tokenizers import Bytes
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


TEXT = "a window of a few tiles, a sink, and a scan over the rest; " * 20
RULER = {
    "needles": {"length": 24, "keys": 2, "values": 2, "digits": 2, "names": 4, "fillers": 3},
    "variable_tracking": {"length": 24, "hops": 1, "numbers": 4, "variables": 4, "fillers": 3},
    "common_words": {"length": 24, "common": 2, "repeats": 5, "rare": 2, "words": 16},
    "frequent_words": {"length": 24, "answers": 2, "words": 16},
}


@pytest.mark.parametrize("task", RULER)
def test_the_tasks_of_ruler_by_length(model, tmp_path, task):
    data = {"task": task} | {f"probe.{name}": value for name, value in RULER[task].items()}
    options = {"lengths": (24, 32), "examples": 4} | ({"depths": (0.0, 1.0)} if task == "needles" else {})
    rows = analysis.analyze(model, "needle", tmp_path, data, **options).tables["accuracy"]
    assert [row["length"] for row in rows] == ([24, 24, 32, 32] if task == "needles" else [24, 32])
    for row in rows:
        probe = PROBES[task](**RULER[task] | {name: row[name] for name in ("length", "depth") if name in row})
        if task in ("needles", "variable_tracking"):
            expected = assess(model, probe, 4)
        else:  # the evidence is everywhere
            field = receptive_field.matrix([pattern for _, pattern in model.config.connectivity], probe.length)
            scored = [np.flatnonzero(probe.example(0, index, validation=True)["weights"]) for index in range(4)]
            inside = np.mean([field[p, : positions[0]].mean() for positions in scored for p in positions])
            expected = (row["exact_match"], row["accuracy"], inside)
        assert (row["exact_match"], row["accuracy"], row["reachable"]) == pytest.approx(expected)
    with rejects(InputError, "needles"):
        analysis.analyze(model, "needle", tmp_path, data, needles=(2,))
    with rejects(InputError, "lengths"):
        analysis.analyze(model, "needle", tmp_path, data, lengths=(3,))


def build_reader(text, length):
    model = models.build(text, LOCAL | {"layers.local.mixer.pattern": "causal & window(15)"}, length=length)
    model.tokenizer = Bytes()  # the source of the model has no files
    return model


def test_needles_in_text_are_ranked_by_likelihood(text, tmp_path):
    model = build_reader(text, 112)
    options = {"lengths": (100, 112), "depths": (0.0, 1.0), "needles": (1, 2), "examples": 2, "candidates": 3}
    data = {"files": str(text / "0.txt")}
    findings = analysis.analyze(model, "needle", tmp_path, data, **options)
    rows = findings.tables["accuracy"]
    assert len(rows) == 8
    content = (text / "0.txt").read_text()
    haystack = Haystack(model, np.frombuffer(content.encode(), np.uint8), SENTENCE, QUESTION, 3)
    for row in rows:
        field = receptive_field.matrix([pattern for _, pattern in model.config.connectivity], row["length"])
        hits, losses, inside = [], [], []
        for seed in range(2):
            question = haystack.build(row["length"], row["depth"], row["needles"], seed)
            prompt = bytes(question.prompt.tolist()).decode()
            key = prompt.split()[-2]
            assert prompt.endswith(f" The code of {key} is")
            value = re.search(rf"The code of {key} is (\d+)\.", prompt)[1]
            candidates = [bytes(ids.tolist()).decode() for ids in question.candidates]
            assert candidates[0] == f" {value}"
            assert len(set(candidates)) == 3
            assert len(prompt) + 5 == row["length"] == question.length
            before = prompt.index(f" The code of {key}")
            assert question.evidence.tolist() == list(range(before, before + len(f" The code of {key} is 1234.")))
            assert prompt.count("The code of") == row["needles"] + 1
            if row["needles"] == 1:
                hay = re.sub(rf" The code of {key} is( \d+\.)?", "", prompt)
                assert hay in content
                assert before == round(row["depth"] * len(hay))
            likelihoods = []
            for ids in question.candidates:
                tokens = np.concatenate([question.prompt, ids])
                losses_of = jax.nn.log_softmax(model.logits(tokens[:-1]))
                likelihoods.append(float(losses_of[np.arange(len(tokens) - 1), tokens[1:]][-len(ids) :].sum()))
            hits.append(np.argmax(likelihoods) == 0)
            losses.append(-likelihoods[0] / 5)
            inside.append(field[len(prompt) - 1, question.evidence].mean())
        expected = (np.mean(hits), np.mean(losses), np.mean(inside))
        assert (row["exact_match"], row["loss"], row["reachable"]) == pytest.approx(expected, abs=1e-4)
    assert rows[0]["reachable"] < rows[1]["reachable"]
    for options, argument in (
        ({"sentence": "no fields"}, "sentence"),
        ({"question": "none"}, "question"),
        ({"needles": (17,)}, "needles"),
        ({"candidates": 1}, "candidates"),
        ({"lengths": (20,)}, "lengths"),
        ({"lengths": (100_000,)}, "lengths"),
    ):
        with rejects(InputError, argument):
            analysis.analyze(model, "needle", tmp_path / "other", data, **options)


def test_pairs_of_text_are_ranked_by_likelihood(text, tmp_path):
    model = build_reader(text, 96)
    findings = analysis.analyze(model, "retrieval", tmp_path, queries=3, examples=3, candidates=2, pairs=4)
    rows = findings.tables["accuracy"]
    assert [row["pair"] for row in rows] == [0, 2, 3]
    for row in rows:
        inside = []
        for seed in range(3):
            question = build_pairs(model, 4, row["pair"], 2, seed)
            *lines, asked = bytes(question.prompt.tolist()).decode().split("\n")
            pairs = [line.split(": ") for line in lines]
            assert asked == f"{pairs[row['pair']][0]}:"
            right, other = (bytes(ids.tolist()).decode().strip() for ids in question.candidates)
            assert right == pairs[row["pair"]][1]
            assert other in {value for _, value in pairs} - {right}
            assert bytes(question.prompt[question.evidence].tolist()).decode() == f"{lines[row['pair']]}\n"
            field = receptive_field.matrix([pattern for _, pattern in model.config.connectivity], question.length)
            inside.append(field[len(question.prompt) - 1, question.evidence].mean())
        assert row["reachable"] == pytest.approx(np.mean(inside))
    assert rows[1]["reachable"] < rows[-1]["reachable"]
    default = analysis.kind.open_analysis(analysis.KINDS, build_reader(text, 400), "retrieval", None)
    assert build_pairs(default.model, default.pairs, 0, 8, 0).length <= 400
    assert build_pairs(default.model, default.pairs + 1, 0, 8, 0).length > 400
    for options, data, argument in (
        ({"pairs": 7}, None, "pairs"),
        ({}, {"length": 3}, "data.length"),
        ({"pairs": 7}, PAIRS, "pairs"),
    ):
        with rejects(InputError, argument):
            analysis.analyze(model, "retrieval", tmp_path / "other", data, **options)


def read_question(question):
    return bytes(question.prompt.tolist()).decode(), [bytes(ids.tolist()).decode() for ids in question.candidates]


@pytest.mark.parametrize("length", [200, 333])
def test_variables_are_tracked_in_text(text, length):
    model = build_reader(text, 112)
    hay = np.frombuffer(TEXT.encode(), np.uint8)
    for seed in range(3):
        question = build_tracking(model, hay, length, chains=2, hops=2, candidates=6, seed=seed)
        prompt, candidates = read_question(question)
        assert question.length == length
        values = {}
        for name, assigned in re.findall(r" Let (\w+) = (\w+)\.", prompt):
            values[name] = values.get(assigned, assigned)
        asked = re.search(r" The variables with the value (\d+) are$", prompt)[1]
        right = [name for name, value in values.items() if value == asked]
        assert len(values) == 6
        assert candidates[0] == " " + ", ".join(right)
        assert len(set(candidates)) == 6
        evidence = bytes(question.prompt[question.evidence].tolist()).decode()
        assert re.findall(r" Let (\w+) = ", evidence) == right
    with rejects(InputError, "lengths"):
        build_tracking(model, hay, 40, chains=2, hops=2, candidates=6, seed=0)


@pytest.mark.parametrize("length", [230, 1000])
@pytest.mark.parametrize("ranked", [False, True])
def test_words_are_counted_in_text(text, length, ranked):
    model, end = build_reader(text, 112), " The words are"
    counts = functools.partial(count_frequent, alpha=2.0) if ranked else functools.partial(count_common, answers=3)
    for seed in range(3):
        question = build_words(model, length, counts, end, ranked, answers=3, candidates=8, seed=seed)
        prompt, candidates = read_question(question)
        assert length - 25 < question.length <= length
        words = prompt.removesuffix(end).split()
        ranking = collections.Counter(words).most_common()
        right = [word for word, _ in ranking[:3]]
        assert ranking[2][1] > ranking[3][1]
        if not ranked:
            right = [word for word in dict.fromkeys(words) if word in right]
        assert candidates[0].split() == right
        assert len(set(candidates)) == 8
        assert all(set(candidate.split()) - set(right) for candidate in candidates[1:])
        assert all(word in words for candidate in candidates for word in candidate.split())
    with rejects(InputError, "lengths"):
        build_words(model, 100, counts, end, ranked, answers=3, candidates=8, seed=0)


def test_the_tasks_of_ruler_in_text(text, tmp_path):
    model = models.build(text, LOCAL | {"layers.local.mixer.pattern": "causal & window(60)"}, length=240)
    model.tokenizer = Bytes()
    options = {"lengths": (240, 260), "examples": 2, "candidates": 4}
    findings = analysis.analyze(model, "ruler", tmp_path, {"files": str(text / "0.txt")}, **options)
    rows = findings.tables["accuracy"]
    assert [(row["task"], row["length"]) for row in rows] == list(itertools.product(TASKS, (240, 260)))
    for row in rows[4:]:  # frequent words
        field = receptive_field.matrix([pattern for _, pattern in model.config.connectivity], row["length"])
        counts = functools.partial(count_frequent, alpha=2.0)
        questions = [
            build_words(model, row["length"], counts, FREQUENT_QUESTION, True, 3, 4, seed) for seed in range(2)
        ]
        inside = [field[len(question.prompt) - 1, question.evidence].mean() for question in questions]
        assert row["reachable"] == pytest.approx(np.mean(inside))
    assert (tmp_path / "ruler.html").exists()
    with rejects(InputError, "tasks"):
        analysis.analyze(model, "ruler", tmp_path, tasks=("needle",))
    with rejects(InputError, "data.task"):
        analysis.analyze(model, "ruler", tmp_path, PASSKEY)
