"""Attention over edge lists that are computed from the data. Lists of patterns are in test_attend.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import ImplementationError, attend, attend_edges, segment
from sparsejax.patterns import parse
from tests.ops.test_attend import QUICK, Case, Result, draw_inputs, oracle
from tests.tolerances import assert_close


def draw_edges(random: np.random.Generator, count: int, t: int, s: int) -> np.ndarray:
    """Different edges in no order, some of them outside, int32 [2, count]."""
    queries, keys = np.divmod(random.permutation(t * s)[:count], s)
    edges = np.stack([queries, keys]).astype(np.int32)
    edges[:, :4] = [[-1, 0, t, 3], [0, -1, 3, s + 7]]
    return edges


def mask_of(edges: np.ndarray, t: int, s: int) -> np.ndarray:
    mask = np.zeros((t, s), bool)
    mask[tuple(edges[:, ((edges >= 0) & (edges < [[t], [s]])).all(axis=0)])] = True
    return mask


@pytest.mark.parametrize(("count", "chunk"), [(4, 7), (150, 7), (150, 150), (150, 151), (150, 10_000)])
def test_each_sequence_has_a_traced_list_of_its_own(monkeypatch, count, chunk):
    case = Case("full", 23, 31, heads=(4, 2), softcap=2.0, sink=True)
    inputs = draw_inputs(case)
    lists = np.stack([draw_edges(np.random.default_rng(i), count, case.t, case.s) for i in range(2)])
    monkeypatch.setattr(segment, "CHUNK", chunk * 4 * 8)

    @jax.jit
    def compute(q, k, v, sink, lists, d_out, d_lse):
        def one(q, k, v, edges, sink):
            arrays = (x[None] for x in (q, k, v))
            out, lse = attend_edges(*arrays, *edges, softcap=case.softcap, sink_logits=sink, return_lse=True)
            return out[0], lse[0]

        forward = lambda q, k, v, sink: jax.vmap(one, (0, 0, 0, 0, None))(q, k, v, lists, sink)  # noqa: E731
        (out, lse), backward = jax.vjp(forward, q, k, v, sink)
        return Result(out, lse, *backward((d_out, d_lse)))

    masks = np.stack([mask_of(edges, case.t, case.s) for edges in lists])
    assert count == 4 or masks.sum() == 2 * (count - 4)
    expected = oracle(case, inputs, np.broadcast_to(masks[:, None], (2, 4, case.t, case.s)))
    found = compute(*inputs[:4], lists, *inputs[5:])
    for name, one, other in zip(Result._fields, found, expected, strict=True):
        assert_close(name, one, other, "float32")


def test_the_edges_of_a_pattern_are_the_pattern():
    case = Case("causal & window(9)", 40, 40)
    q, k, v = draw_inputs(case)[:3]
    pattern = parse(case.pattern)
    ids = np.arange(80, dtype=np.int32).reshape(2, 40) // 25
    found = attend_edges(q, k, v, *pattern.edges(40), scale=0.7, segment_ids=(ids, ids))
    expected = attend(q, k, v, pattern, impl="dense", scale=0.7, segment_ids=ids)
    assert isinstance(found, jax.Array)
    assert_close("out", found, expected, "float32")


def test_an_edge_that_occurs_twice_counts_twice():
    q, k, v = (jnp.asarray(x) for x in draw_inputs(Case("full", 1, 2, heads=(1, 1)))[:3])
    keys = jnp.array([0, 1, 1, 1])
    found = attend_edges(q, k, v, jnp.zeros(4, int), keys)
    expected = attend(q, k[:, keys], v[:, keys], parse("full"), impl="dense")
    assert_close("out", found, expected, "float32")


def test_an_empty_list():
    q, k, v = draw_inputs(Case("full", 3, 2))[:3]
    none = jnp.zeros(0, jnp.int32)
    out, lse = attend_edges(q, k, v, none, none, return_lse=True)
    assert out.shape == q.shape
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (2, 3)), ((), ())])
def test_lists_that_do_not_fit(shapes):
    q, k, v = draw_inputs(Case("full", 3, 2))[:3]
    with pytest.raises(ValueError, match=r"queries and keys must be \[e\]"):
        attend_edges(q, k, v, *(np.zeros(shape, np.int32) for shape in shapes))


def test_more_edges_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(segment, "MAX_EDGES", 10)
    few, many = (jnp.zeros((1, length, 2, 8)) for length in (4, 5))
    attend(few, few, few, parse("per_head(causal, window(0))"), impl="segment")
    with pytest.raises(ImplementationError, match=r"segment: 15 edges in one head; .* stops at 10"):
        attend(many, many, many, parse("per_head(causal, window(0))"), impl="segment")


def temporary_mib(text: str, batch: int = 1) -> float:
    shape = jax.ShapeDtypeStruct((batch, 1024, 4, 16), jnp.float32)
    loss = lambda q, k, v: attend(q, k, v, parse(text), impl="segment").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile(QUICK)
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_memory_does_not_grow_with_the_edges():
    few, many = temporary_mib("window(3)"), temporary_mib("causal")  # 4 thousand and half a million: 32 MiB of q alone
    assert many < few + 8  # the list itself is 4 MiB
