"""Attention over edge lists computed from the data. The lists of patterns are in test_attend.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import ImplementationError, attend, attend_edges, segment
from sparsejax.ops.reference import Attention
from sparsejax.patterns import parse
from tests.messages import rejects
from tests.ops.test_attend import Case, draw_inputs, reference
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick


def draw_edges(random: np.random.Generator, count: int, t: int, s: int) -> np.ndarray:
    """Distinct edges in random order, four of them outside the sequences, int32 [2, count]."""
    queries, keys = np.divmod(random.permutation(t * s)[:count], s)
    edges = np.stack([queries, keys]).astype(np.int32)
    edges[:, :4] = [[-1, 0, t, 3], [0, -1, 3, s + 7]]
    return edges


def mask_of(edges: np.ndarray, t: int, s: int) -> np.ndarray:
    mask = np.zeros((t, s), bool)
    mask[tuple(edges[:, ((edges >= 0) & (edges < [[t], [s]])).all(axis=0)])] = True
    return mask


@pytest.mark.parametrize(("count", "chunk"), [(4, 7), (150, 7), (150, 150), (150, 151), (150, 10_000)])
def test_a_traced_list_per_sequence(monkeypatch, count, chunk):
    case = Case("full", 23, 31, heads=(4, 2), softcap=2.0, sink=True)
    inputs = draw_inputs(case)
    lists = np.stack([draw_edges(np.random.default_rng(i), count, case.t, case.s) for i in range(2)])
    monkeypatch.setattr(segment, "CHUNK", chunk * 4 * 8)

    @jax.jit
    def compute(q, k, v, sink, lists, d_out, d_lse):
        def attend_sequence(q, k, v, edges, sink):
            arrays = (x[None] for x in (q, k, v))
            out, lse = attend_edges(*arrays, *edges, softcap=case.softcap, sink_logits=sink, return_lse=True)
            return out[0], lse[0]

        forward = lambda q, k, v, sink: jax.vmap(attend_sequence, (0, 0, 0, 0, None))(q, k, v, lists, sink)  # noqa: E731
        (out, lse), backward = jax.vjp(forward, q, k, v, sink)
        return Attention(out, lse, *backward((d_out, d_lse)))

    masks = np.stack([mask_of(edges, case.t, case.s) for edges in lists])
    assert count == 4 or masks.sum() == 2 * (count - 4)
    expected = reference(case, inputs, np.broadcast_to(masks[:, None], (2, 4, case.t, case.s)))
    actual = compute(*inputs[:4], lists, inputs.d_out, inputs.d_lse)
    for name, *pair in zip(Attention._fields, actual, expected, strict=True):
        assert_close(name, *pair, "float32")


def test_the_edges_of_a_pattern_are_the_pattern():
    case = Case("causal & window(9)", 40, 40)
    q, k, v = map(jnp.asarray, draw_inputs(case)[:3])
    pattern = parse(case.pattern)
    ids = jnp.arange(80).reshape(2, 40) // 25
    out = attend_edges(q, k, v, *pattern.edges(40), scale=0.7, segment_ids=(ids, ids))
    expected = attend(q, k, v, pattern, impl="dense", scale=0.7, segment_ids=ids)
    assert isinstance(out, jax.Array)
    assert_close("out", out, expected, "float32")


def test_an_edge_that_occurs_twice_counts_twice():
    q, k, v = (jnp.asarray(x) for x in draw_inputs(Case("full", 1, 2, heads=(1, 1)))[:3])
    keys = jnp.array([0, 1, 1, 1])
    out = attend_edges(q, k, v, jnp.zeros(4, int), keys)
    expected = attend(q, k[:, keys], v[:, keys], parse("full"), impl="dense")
    assert_close("out", out, expected, "float32")


def test_an_empty_list():
    q, k, v = map(jnp.asarray, draw_inputs(Case("full", 3, 2))[:3])
    empty = jnp.zeros(0, jnp.int32)
    out, lse = attend_edges(q, k, v, empty, empty, return_lse=True)
    assert out.shape == q.shape
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (2, 3)), ((), ())])
def test_lists_that_do_not_agree(shapes):
    q, k, v = map(jnp.asarray, draw_inputs(Case("full", 3, 2))[:3])
    with rejects(InputError, "queries"):
        attend_edges(q, k, v, *(np.zeros(shape, np.int32) for shape in shapes))


def test_edges_that_memory_cannot_hold(monkeypatch):
    monkeypatch.setattr(segment, "MAX_EDGES", 10)
    few, many = (jnp.zeros((1, length, 2, 8)) for length in (4, 5))
    attend(few, few, few, parse("per_head(causal, window(0))"), impl="segment")
    with rejects(ImplementationError, "impl"):
        attend(many, many, many, parse("per_head(causal, window(0))"), impl="segment")


def temporary_mib(text: str, batch: int = 1) -> float:
    shape = jax.ShapeDtypeStruct((batch, 1024, 4, 16), jnp.float32)
    loss = lambda q, k, v: attend(q, k, v, parse(text), impl="segment").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_memory_does_not_grow_with_the_edges():
    few, many = temporary_mib("window(3)"), temporary_mib("causal")  # 4 thousand and half a million: 32 MiB of q alone
    assert many < few + 8  # the list itself is 4 MiB
