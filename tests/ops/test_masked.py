"""Choices scored in tiles of keys, and attention to single keys by masked tiles, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import attend, masked, selection
from sparsejax.ops.attention import _preferences
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.indexer import Index, select_indexed
from sparsejax.ops.reference import attend_reference
from sparsejax.ops.selection import Selection, choose
from sparsejax.ops.selectors import top_tiles
from sparsejax.patterns import parse
from tests.tolerances import assert_close

CAUSAL = parse("causal")
LENGTH, KEYS = 75, 12


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(selection, "QUERIES", 16)
    monkeypatch.setattr(selection, "KEYS", KEYS)
    monkeypatch.setattr(masked, "QUERIES", 16)
    monkeypatch.setattr(masked, "KEYS", KEYS)


def best_blocks(scores, visible, size, count):
    """The blocks of the largest visible scores, -1 where there are fewer."""
    blocks = range(0, len(scores), size)
    best = [np.where(visible[i : i + size], scores[i : i + size], -np.inf).max() for i in blocks]
    chosen = sorted(np.argsort(-np.array(best), kind="stable")[:count])
    chosen = [block for block in chosen if best[block] > -np.inf]
    return chosen + [-1] * (min(count, len(best)) - len(chosen))


@pytest.mark.parametrize("pattern", ["causal", "causal & window(20)", "full"])
@pytest.mark.parametrize(("size", "count"), [(5, 3), (16, 2)])
def test_tiles_of_keys(pattern, size, count):
    rng, pattern = np.random.default_rng(size), parse(pattern)
    q, k = (rng.normal(size=(1, LENGTH, heads, 6)).astype(np.float32) for heads in (4, 2))
    groups = jax.jit(lambda q, k: top_tiles(q, k, size, count, pattern).groups)(q, k)
    visible = pattern.dense(LENGTH)
    for head, query in np.ndindex(4, LENGTH):
        scores = np.float64(k)[0, :, head // 2] @ np.float64(q)[0, query, head]
        assert groups[0, head, query].tolist() == best_blocks(scores, visible[query], size, count)


@pytest.mark.parametrize("case", ["whole", "packed", "cached"])
def test_index_scores_in_tiles_of_keys(case):
    rng = np.random.default_rng(1)
    t = 7 if case == "cached" else LENGTH
    q, weights, k = (rng.normal(size=s).astype(np.float32) for s in ((1, t, 9, 4), (1, t, 9), (1, LENGTH, 4)))
    q_at, k_at, ids = np.arange(t), np.arange(LENGTH), np.zeros(LENGTH, int)
    options = {}
    if case == "packed":
        ids = np.sort(rng.integers(0, 4, LENGTH))
        options["segments"] = jnp.asarray(ids)[None], jnp.asarray(ids)[None]
    if case == "cached":  # slots in any order, some empty
        k_at = rng.permutation(LENGTH) - 6
        k_at, q_at = np.maximum(k_at, -1), np.arange(40, 40 + t)
        options |= {"positions": (jnp.asarray(q_at)[None], jnp.asarray(k_at)[None]), "length": LENGTH}
    run = jax.jit(lambda *x: select_indexed(Index(x[0], x[2], x[1]), 5, CAUSAL, **options).groups)
    groups = run(q, weights, k)
    products = np.maximum(np.einsum("thd,sd->ths", np.float64(q[0]), np.float64(k[0])) / 2, 0)
    scores = np.einsum("ths,th->ts", products, weights[0])
    for query in range(t):
        visible = (k_at <= q_at[query]) & (k_at >= 0)
        if case == "packed":
            visible &= ids == ids[query]
        assert groups[0, 0, query].tolist() == best_blocks(scores[query], visible, 1, 5)


def test_later_keys_change_nothing():
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=(1, LENGTH, 2, 4)), jnp.float32) for _ in range(3)]

    @jax.jit
    def run(q, k, v):
        selection = select_indexed(Index(q, k[:, :, 0]), 9, CAUSAL)
        return top_tiles(q, k, 5, 3, CAUSAL).groups, attend(q, k, v, CAUSAL, selection=selection, impl="gather")

    groups, out = run(*arrays)
    for cut in (1, 15, 17, 48, LENGTH - 1):
        edited = run(*(x.at[:, cut:].set(x[:, cut:] * -3 + 1) for x in arrays))
        np.testing.assert_array_equal(edited[0][:, :, :cut], groups[:, :, :cut])
        np.testing.assert_array_equal(edited[1][:, :cut], out[:, :cut])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("scopes", [1, 2, 4])
def test_attention_by_masked_tiles(size, scopes):
    rng = np.random.default_rng(size)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, LENGTH)), axis=1))
    blocks = make_blocks(LENGTH, size, ids)
    shape = 2, scopes, LENGTH, blocks.count
    selection = Selection(choose(jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.random(shape) < 0.8), 9), blocks)
    arrays = [rng.normal(size=(2, LENGTH, heads, 6)).astype(np.float32) for heads in (4, 2, 2)]
    sink, slopes = rng.normal(size=4).astype(np.float32), rng.random(4).astype(np.float32)
    d_out, d_lse = rng.normal(size=(2, LENGTH, 4, 6)), rng.normal(size=(2, LENGTH, 4))
    counts = np.asarray(selection.mask).repeat(4 // scopes, axis=1) & CAUSAL.dense(LENGTH)
    counts &= np.asarray(ids[:, None, :, None] == ids[:, None, None])
    options = {"softcap": 2.0, "sink_logits": sink, "alibi_slopes": slopes}
    expected = attend_reference(*arrays, counts.astype(int), d_out, d_lse, **options)

    @jax.jit
    def run(q, k, v, sink):
        def total(q, k, v, sink):
            arguments = options | {"sink_logits": sink, "alibi_slopes": jnp.asarray(slopes), "return_lse": True}
            out, lse = attend(q, k, v, CAUSAL, selection=selection, impl="gather", segment_ids=ids, **arguments)
            return (out * d_out).sum() + (lse * d_lse).sum(), (out, lse)

        return jax.grad(total, (0, 1, 2, 3), has_aux=True)(q, k, v, sink)

    grads, (out, lse) = run(*map(jnp.asarray, arrays), jnp.asarray(sink))
    assert_close("out", out, expected.out, "float32")
    assert_close("lse", lse, expected.lse, "float32")
    for name, grad in zip(("q", "k", "v", "sink"), grads, strict=True):
        assert_close(f"d_{name}", grad, getattr(expected, name), "float32")


@pytest.mark.parametrize(("count", "size", "first"), [(4, 1, "gather"), (1, 1, "segment"), (1, 8, "gather")])
def test_few_single_keys_are_scored_one_by_one(count, size, first):
    x = jnp.zeros((1, 2 * LENGTH, 1, 4))
    chosen = Selection(jnp.zeros((1, 1, 2 * LENGTH, count), int), make_blocks(2 * LENGTH, size))
    call = AttentionCall(x, x, x, CAUSAL, 1.0, None, None, None, False, selection=chosen)
    assert next(name for name in _preferences(call) if name in ("gather", "segment")) == first
