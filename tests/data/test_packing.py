"""Windows and packed documents score every token once and keep documents apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data import ordered_batches
from sparsejax.data.packing import pack
from sparsejax.data.rows import Labelled, Packed, Windows

pytestmark = pytest.mark.quick

SEPARATOR = 99


def build(sizes, length, separator=SEPARATOR, stride=0):
    """Packed documents of these sizes; token 1000 n + i is token i of document n, from 1."""
    documents, tokens = [], []
    for number, size in enumerate(sizes):
        if number and separator is not None:
            tokens.append(separator)
        documents.append((len(tokens), len(tokens) + size))
        tokens += [1000 * (number + 1) + i for i in range(size)]
    documents = np.array(documents, np.int64).reshape(-1, 2)
    return Packed(np.array(tokens, np.uint32), documents, separator, length, stride)


def batch_of(rows):
    return rows.take(np.arange(len(rows)))


@given(st.lists(st.integers(1, 40), max_size=60))
def test_packing_respects_the_capacity(sizes):
    rows = pack(np.array(sizes, np.int64), 40)
    used = np.bincount(rows, sizes, minlength=1)
    assert used.max(initial=0) <= 40
    assert set(rows) == set(range(len(set(rows))))
    _, first = np.unique(rows, return_index=True)
    assert (np.diff(first) > 0).all()  # in the order of their first items
    # No two rows fit into one.
    smallest = np.sort(used)[:2]
    assert len(set(rows)) < 2 or smallest.sum() > 40


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20), st.sampled_from([SEPARATOR, None]), st.sampled_from([0, 3])
)
def test_every_token_is_scored_once_in_its_context(sizes, separator, stride):
    rows = build(sizes, 8, separator, stride)
    batch = batch_of(rows)
    scored = []
    for row in range(len(rows)):
        inputs, targets, segments, positions, weights = (
            batch[name][row].tolist() for name in ("inputs", "targets", "segments", "positions", "weights")
        )
        for i, (token, target, segment, position) in enumerate(zip(inputs, targets, segments, positions, strict=True)):
            if not segment:
                assert (token, target, position, weights[i]) == (0, 0, 0, 0)
                continue
            start = i == 0 or segments[i - 1] != segment
            assert position == (0 if start else positions[i - 1] + 1)
            if not start:
                assert token == targets[i - 1]
            if token != separator:
                number, offset = divmod(token, 1000)
                last = offset == sizes[number - 1] - 1
                assert target == (separator if last else token + 1)
            else:
                assert start
                assert target % 1000 == 0
            if weights[i]:
                scored.append((token, target) if token == separator or target == separator else target)
        assert [s for s in segments if s] == sorted(s for s in segments if s)
    text = [1000 * (n + 1) + i for n, size in enumerate(sizes) for i in range(1, size)]
    ends = [(1000 * (n + 1) + size - 1, SEPARATOR) for n, size in enumerate(sizes)]
    starts = [(SEPARATOR, 1000 * (n + 1)) for n in range(len(sizes))]
    expected = text if separator is None else text + ends + starts
    assert sorted(map(str, scored)) == sorted(map(str, expected))
    counts = rows.counts()
    assert counts["scored_tokens"] == len(scored) == batch["weights"].sum()
    assert counts["documents_unscored"] == (separator is None) * sizes.count(1)
    assert counts["documents_cut"] == sum(size + (1 if separator else -1) > 8 for size in sizes)


def test_padding_rows_and_padded_batches():
    rows = build([3, 3, 3], 4)
    batches = list(ordered_batches(rows, 2))
    assert [batch["segments"].max(1).tolist() for batch in batches] == [[1, 1], [1, 0]]
    assert not any(batches[-1][name][1].any() for name in batches[-1])
    assert rows.counts()["efficiency"] == 1


def test_windows_with_a_stride_score_every_target_once():
    data = np.arange(1, 101, dtype=np.uint8)
    for size in (9, 10, 11, 12, 13, 50, 99, 100):
        windows = Windows(data[:size], 8, stride=3, drop_last=False)
        batch = batch_of(windows)
        scored = batch["weights"] > 0
        assert sorted(batch["targets"][scored]) == list(range(2, size + 1))
        assert (batch["inputs"][scored] == batch["targets"][scored] - 1).all()
        # Targets after the first window have a context of at least length - stride tokens.
        assert not scored[1:, :5].any()
        assert windows.counts() == {"scored_tokens": size - 1, "tokens_left_over": 0}
    assert Windows(data, 8).counts() == {"scored_tokens": 96, "tokens_left_over": 3}


def test_labelled_documents_predict_their_class_at_the_first_token():
    data = np.arange(20, dtype=np.uint8)
    rows = Labelled(data, np.array([[0, 5], [6, 20]]), np.array([1, 2], np.int32), 8)
    batch = rows.take(np.array([1, 0, -1]))
    assert batch["inputs"].tolist() == [list(range(6, 14)), [0, 1, 2, 3, 4, 0, 0, 0], [0] * 8]
    assert batch["segments"].sum(1).tolist() == [8, 5, 0]
    assert batch["targets"][:, 0].tolist() == [2, 1, 0]
    assert batch["weights"].sum(1).tolist() == [1, 1, 0]
    assert rows.counts()["tokens_cut_off"] == 6


@pytest.mark.parametrize("length", [64, 1024])
def test_packing_is_nearly_full(length):
    sizes = np.random.default_rng(0).geometric(1 / 40, 5000)
    assert build(sizes.tolist(), length).counts()["efficiency"] > 0.99
