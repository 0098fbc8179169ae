"""Closed windows, their entries and attention to them, against loops in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import attend_entries, close_windows, compress_windows
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

# Tokens of a row and of a window, whether documents are packed, and whether entries overlap.
CASES = [
    *((1, 1, False, False), (12, 4, False, True), (7, 8, False, True), (150, 7, False, False)),
    *((13, 4, True, True), (9, 1, True, False), (7, 8, True, False), (150, 7, True, True)),
]


def documents(random, length):
    """Segment ids of a row: documents of random lengths, which no window divides."""
    cuts = np.sort(random.integers(0, length + 1, size=3))
    return np.searchsorted(cuts, np.arange(length), side="right")


def list_windows(ids, size):
    """The tokens of each closed window of a row, and whether it follows another one of its document."""
    windows = []
    for document in np.unique(ids):
        tokens = np.flatnonzero(ids == document)
        closed = range(0, len(tokens) - size + 1, size)
        windows += [(tokens[first : first + size], first > 0) for first in closed]
    return windows


def compress(values, gates, bias, windows, overlap):
    """Entries of a row [t, w]."""
    entries, before = [], None
    for tokens, follows in windows:
        v, g = values[tokens], gates[tokens] + bias
        half = v.shape[1] // 2
        if overlap:
            parts = [(v[:, half:], g[:, half:])]
            parts += [(x[:, :half] for x in before)] if follows else []
            before = v, g
            v, g = (np.concatenate(part) for part in zip(*parts, strict=True))
        shares = np.exp(g - g.max(axis=0))
        entries.append((shares / shares.sum(axis=0) * v).sum(axis=0))
    return np.array(entries)


def attend(q, entries, windows, ids, scale):
    """Output [t, h, d] and log-sum-exp [t, h] of a row."""
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    for at, head in np.ndindex(q.shape[:2]):
        seen = [i for i, (tokens, _) in enumerate(windows) if tokens[-1] <= at and ids[tokens[-1]] == ids[at]]
        if seen:
            terms = np.exp(scale * entries[seen] @ q[at, head])
            out[at, head], lse[at, head] = terms @ entries[seen] / terms.sum(), np.log(terms.sum())
    return out, lse


@pytest.mark.parametrize(("length", "size", "packed", "overlap"), CASES)
def test_equals_the_reference(length, size, packed, overlap):
    random = np.random.default_rng(length)
    width = 6
    values, gates = (random.normal(size=(2, length, width)).astype(np.float32) for _ in range(2))
    bias = jnp.asarray(random.normal(size=(size, width)), jnp.float32)
    q = random.normal(size=(2, length, 2, width // (1 + overlap))).astype(np.float32)
    ids = np.stack([documents(random, length) for _ in range(2)]) if packed else np.zeros((2, length), int)
    segments = jnp.asarray(ids, jnp.int32) if packed else None

    @jax.jit
    def run(q, values, gates):
        windows = close_windows(length, size, segments)
        entries = compress_windows(values, gates, bias, windows, overlap=overlap)
        if not entries.shape[1]:
            return windows.ends, entries, (jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf))
        return windows.ends, entries, attend_entries(q, entries, windows, scale=0.4, segments=segments)

    ends, entries, (out, lse) = run(q, values, gates)
    ends = np.broadcast_to(ends, (2, length // size))
    for row in range(2):
        windows = list_windows(ids[row], size)
        real = np.flatnonzero(ends[row] >= 0)
        np.testing.assert_array_equal(real, np.arange(len(windows)))
        assert [int(end) for end in ends[row][real]] == [tokens[-1] for tokens, _ in windows]
        arrays = (np.asarray(x, np.float64) for x in (values[row], gates[row], bias))
        expected = compress(*arrays, windows, overlap)
        if windows:
            assert_close("entries", entries[row][real], expected, "float32")
        expected = attend(q[row].astype(np.float64), expected, windows, ids[row], 0.4)
        assert_close("out", out[row], expected[0], "float32")
        assert_close("lse", lse[row], expected[1], "float32")


def test_gradients_are_those_by_differences():
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(random.normal(size=shape)) for shape in ((1, 11, 2, 3), (1, 11, 6), (1, 11, 6), (4, 6))]
        segments = jnp.asarray([[0] * 9 + [1] * 2])
        directions = [jnp.asarray(random.normal(size=x.shape)) for x in arrays]

        @jax.jit
        def run(q, values, gates, bias):
            windows = close_windows(11, 4, segments)
            entries = compress_windows(values, gates, bias, windows, overlap=True)
            out, lse = attend_entries(q, entries, windows, scale=0.7, segments=segments)
            return (jnp.sin(out)).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        step = 1e-5
        for i, direction in enumerate(directions):
            ends = [run(*(x + s * step * direction if j == i else x for j, x in enumerate(arrays))) for s in (1, -1)]
            gradient = jax.grad(run, i)(*arrays)
            assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2 / step, rel=1e-6)


def test_an_entry_that_is_not_finite_affects_only_queries_that_see_it():
    random = np.random.default_rng(0)
    q, entries = random.normal(size=(1, 12, 2, 3)), random.normal(size=(1, 3, 3))
    windows = close_windows(12, 4)
    expected, _ = attend_entries(jnp.asarray(q), jnp.asarray(entries), windows, scale=1.0)
    entries[0, 1] = np.nan
    out, _ = attend_entries(jnp.asarray(q), jnp.asarray(entries), windows, scale=1.0)
    np.testing.assert_array_equal(out[:, :7], expected[:, :7])
    assert np.isnan(out[:, 7:]).all()


def test_rejects_an_empty_window():
    with rejects(InputError, "size"):
        close_windows(4, 0)
