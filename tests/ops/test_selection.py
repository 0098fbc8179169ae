"""Selection of keys, and attention to them, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import attend_selected, index_scores, select_keys, top_keys
from sparsejax.patterns import parse
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

HEADS, WIDTH = 3, 4


def make_index(length: int, batch: int = 2) -> list[np.ndarray]:
    random = np.random.default_rng(length)
    shapes = (batch, length, HEADS, WIDTH), (batch, length, HEADS), (batch, length, WIDTH)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def scores_of(q, weights, k):
    products = np.maximum(np.einsum("bthd,bsd->bths", *(x.astype(np.float64) for x in (q, k))) / np.sqrt(WIDTH), 0)
    return np.einsum("bths,bth->bts", products, weights)


def test_index_scores():
    index = make_index(9)
    assert_close("scores", index_scores(*map(jnp.asarray, index)), scores_of(*index), "float32")


def test_ties_go_to_the_lower_position_and_missing_keys_are_minus_one():
    scores = jnp.asarray([[0.0, -0.0, 2.0, -0.0, 0.0, -1.0]])
    allowed = jnp.asarray([[True, True, True, False, True, True]])
    assert top_keys(scores, allowed, 4).tolist() == [[2, 0, 1, 4]]
    assert top_keys(scores[:, ::-1], allowed[:, ::-1], 9).tolist() == [[3, 1, 4, 5, 0, -1]]


@pytest.mark.parametrize(("length", "top_k"), [(1, 3), (63, 5), (65, 64), (150, 7)])
def test_every_query_selects_its_best_keys_of_its_document(length, top_k):
    index, segments = make_index(length), np.sort(np.random.default_rng(0).integers(0, 3, size=(2, length)))
    ids = jnp.asarray(segments)
    select = jax.jit(lambda index: select_keys(*index, top_k, parse("causal"), (ids, ids)))
    selected = np.asarray(select([jnp.asarray(x) for x in index]))
    scores = scores_of(*index)
    assert selected.shape == (2, length, min(top_k, length))
    for row, query in np.ndindex(2, length):
        allowed = [key for key in range(query + 1) if segments[row, key] == segments[row, query]]
        best = sorted(allowed, key=lambda key: (-scores[row, query, key].astype(np.float32), key))[:top_k]
        assert [key for key in selected[row, query] if key >= 0] == best


def test_attends_to_the_selected_keys_only():
    random = np.random.default_rng(0)
    shapes = (2, 6, 4, 3), (2, 6, 2, 3), (2, 6, 2, 5)
    q, k, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    keys = np.stack([[random.permutation(6)[:3] for _ in range(6)] for _ in range(2)])
    keys[:, 1, 1:] = -1
    keys[1, 4] = -1
    expected = np.zeros((2, 6, 4, 5))
    for row, query, head in np.ndindex(2, 6, 4):
        chosen = [key for key in keys[row, query] if key >= 0]
        scores = 0.7 * k[row, chosen, head // 2].astype(np.float64) @ q[row, query, head]
        p = np.exp(scores)
        expected[row, query, head] = p @ v[row, chosen, head // 2] / max(p.sum(), 1e-30)
    out = jax.jit(lambda *x: attend_selected(*x, scale=0.7))(q, k, v, keys)
    assert_close("out", out, expected, "float32")


def test_no_gradient_flows_through_a_selection():
    index = [jnp.asarray(x) for x in make_index(5)]

    def total(index):
        keys = select_keys(*index, 2, parse("causal"))
        return sum(x.sum() for x in index) + keys.sum().astype(jnp.float32)

    for gradient in jax.jit(jax.grad(total))(index):
        np.testing.assert_array_equal(gradient, 1)
