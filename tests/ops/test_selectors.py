"""Choices by content against golden values in float64, and attention to them against NumPy."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import attend
from sparsejax.ops.blocks import make_blocks, make_windows
from sparsejax.ops.indexer import Index, indexer_divergence, select_indexed
from sparsejax.ops.reference import attend_reference
from sparsejax.ops.selection import Selection, choose
from sparsejax.ops.selectors import (
    block_means,
    infllm,
    moba,
    nsa,
    route,
    top_tiles,
    top_tokens,
)
from sparsejax.patterns import parse
from tests.messages import rejects
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "selectors"
IMPLEMENTATIONS = "dense", "gather", "segment"
CAUSAL = parse("causal")


def read(name, case):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key.partition("/")[2]: arrays[key] for key in arrays.files if key.startswith(f"case{case}/")}


def pack(values):
    """Segment ids of the queries and the keys, or None for one document."""
    bounds = values.get("document_bounds", [])
    if len(bounds) <= 2:
        return None
    ids = number_documents(bounds)
    return ids, ids


def number_documents(bounds):
    """Segment ids [1, t] of documents between these positions, of which the first is 0 and the last t."""
    return jnp.asarray(np.searchsorted(bounds[1:-1], np.arange(bounds[-1]), side="right"))[None]


def batch(values, *names):
    return [jnp.asarray(values[name])[None] for name in names]


def select(name, values, q, k):
    size = {key: int(value) for key, value in values.items() if value.shape == () and value.dtype.kind == "i"}
    if name == "moba":
        return moba(q, k, size["block_size"], size["top_k"], CAUSAL, segments=pack(values))
    if name == "tile_topk":
        return top_tiles(q, k, size["key_tile"], size["top_k"], CAUSAL, query_tile=size["query_tile"])
    if name == "exact_topk":
        scope = {"kv_group": "kv_head", "q_head": "query_head"}[str(values["scope"])]
        pooling = {"prob_sum": "probabilities", "logit_sum": "logits"}[str(values["pooling"])]
        return top_tokens(q, k, size["top_k"], CAUSAL, scope=scope, pooling=pooling)
    return route(jnp.asarray(values["route"])[None], jnp.asarray(values["centroids"]), size["members"])


def compress(q, k, v, length, stride, block, count, segments=None, **forced):
    """`nsa` with means of windows."""
    ids = None if segments is None else segments[1]
    windows, blocks = make_windows(k.shape[1], length, stride, ids), make_blocks(k.shape[1], block, ids)
    k, v = (windows.split(x).mean(axis=2) for x in (k, v))
    return nsa(q, k, v, windows, blocks, count, CAUSAL, segments=segments, **forced)


def assert_groups(selection, expected, number):
    """Compares groups, which the golden values pad; blocks are numbered within their document."""
    groups = np.asarray(selection.groups[0])
    if number:
        groups = np.where(groups < 0, -1, np.asarray(selection.blocks.numbers[0])[groups])
    missing = expected.shape[-1] - groups.shape[-1]
    np.testing.assert_array_equal(np.pad(groups, ((0, 0), (0, 0), (0, missing)), constant_values=-1), expected)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("moba", "selected_blocks"),
        ("tile_topk", "selected_tiles"),
        ("exact_topk", "selected_tokens"),
        ("causal_kmeans", "selected_tokens"),
    ],
)
def test_golden_values(name, groups, case):
    values = read(name, case)

    @jax.jit
    def run(q, k, v, d_out):
        selection = select(name, values, q, k)
        options = {"selection": selection, "impl": "gather", "segment_ids": pack(values)}
        out, pull = jax.vjp(lambda *x: attend(*x, CAUSAL, **options), q, k, v)
        return selection, out, pull(d_out)

    selection, out, grads = run(*batch(values, "q", "k", "v", "d_out"))
    tile = int(values.get("query_tile", 1))
    chosen = Selection(selection.groups[:, :, ::tile], selection.blocks)
    assert_groups(chosen, values[groups], number=groups != "selected_tokens")
    assert_close("out", out[0], values["out"], "float32")
    for grad, array in zip(grads, "qkv", strict=True):
        assert_close(f"d_{array}", grad[0], values[f"d_{array}"], "float32")


@pytest.mark.parametrize("case", range(3))
def test_golden_values_of_nsa(case):
    values = read("nsa", case)
    branches = "compress", "select", "window"
    arrays = [batch(values, f"{name}_{branch}") for branch in branches for name in "kv"]
    (q, gates, d_out), segments = batch(values, "q", "gates", "d_out"), pack(values)
    sizes = [int(values[name]) for name in ("compress_length", "compress_stride", "select_block", "select_count")]
    forced = {"initial": int(values["init_blocks"]), "local": int(values["local_blocks"])}

    def mix(q, compressed, selected, window, gates):
        out, selection = compress(q, *compressed, *sizes, segments, **forced)
        outs = (
            out,
            attend(q, *selected, CAUSAL, selection=selection, impl="gather", segment_ids=segments),
            attend(q, *window, f"causal & window({int(values['window']) - 1})", segment_ids=segments),
        )
        return sum(gates[..., i, None] * out for i, out in enumerate(outs)), (outs, selection)

    pairs = [(arrays[i][0], arrays[i + 1][0]) for i in (0, 2, 4)]

    @jax.jit
    def differentiate(d_out, *arrays):
        out, pull, others = jax.vjp(mix, *arrays, has_aux=True)
        return out, pull(d_out), others

    out, (d_q, *d_pairs, d_gates), (outs, selection) = differentiate(d_out, q, *pairs, gates)
    assert_groups(selection, values["selected_blocks"], number=True)
    assert_close("out", out[0], values["out"], "float32")
    for branch, part in zip(branches, outs, strict=True):
        assert_close(branch, part[0], values[f"out_{branch}"], "float32")
    assert_close("d_q", d_q[0], values["d_q"], "float32")
    assert_close("d_gates", d_gates[0], values["d_gates"], "float32")
    for branch, pair in zip(branches, d_pairs, strict=True):
        for name, grad in zip("kv", pair, strict=True):
            assert_close(f"d_{name}_{branch}", grad[0], values[f"d_{name}_{branch}"], "float32")


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_golden_values_of_the_loss_of_an_indexer(stage, case):
    values = read("dsa_kl", case)
    q, k = batch(values, "q", "k")
    if "index_q" in values:
        index = Index(*batch(values, "index_q", "index_k", "index_weights"))
    else:  # one head of width t whose products are the scores: sqrt(t) * max(score + shift, 0), and the shift drops out
        length = len(values["q"])
        shifted = values["index_scores"] - values["index_scores"].min() + 1
        unit = jnp.eye(length)[None] * length**0.5
        index = Index(jnp.asarray(shifted)[None, :, None], unit, jnp.ones((1, length, 1)))
    chosen = None
    if stage == "sparse":
        chosen = Selection(
            jnp.asarray(values["selected_tokens"])[None, None, :, : len(values["q"])], make_blocks(len(values["q"]), 1)
        )

    @jax.jit
    def run(index):
        divergence, pull = jax.vjp(lambda index: indexer_divergence(index, q, k, CAUSAL, chosen)[0], index)
        return divergence, pull(jnp.ones_like(divergence))[0]

    divergence, grads = run(index)
    assert_close("divergence", divergence, values[f"{stage}_kl_per_query"], "float32")
    if "index_q" not in values:
        assert_close("scores", grads.q[0, :, 0], values[f"{stage}_grad_index_scores_of_sum"], "float32")
        return
    for name in ("q", "k", "weights"):
        assert_close(name, getattr(grads, name)[0], values[f"{stage}_grad_index_{name}_of_sum"], "float32")


@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_gradient_of_the_divergence_is_student_minus_teacher(stage, size):
    """For keys of blocks, and for keys beside others whose share of the attention `lse` states."""
    rng, t, h = np.random.default_rng(size), 18, 3
    q, k = (rng.normal(size=(1, t, heads, 5)).astype(np.float32) for heads in (h, 1))
    blocks = make_blocks(t, size)
    n = blocks.count
    scores, others = rng.normal(size=(t, n)), rng.uniform(0.1, 2, size=(1, t, h))
    index = Index(jnp.asarray(scores[None, :, None] * np.sqrt(n), jnp.float32), jnp.eye(n)[None], relu=False)
    selection = select_indexed(index, 2, CAUSAL, blocks=blocks, has_block_keys=True)
    chosen = np.asarray(selection.mask)[0, 0] if stage == "sparse" else np.ones((t, t), bool)
    weights = np.exp(np.einsum("thd,sd->hts", q[0].astype(np.float64), k[0, :, 0]) / np.sqrt(5)) * (np.tri(t) * chosen)
    totals = weights.sum(axis=-1, keepdims=True) + (others[0].T[..., None] if size == 1 else 0)
    mass = (weights / totals).mean(axis=0)
    teacher, expected = np.add.reduceat(mass, np.arange(0, t, size), axis=1), np.zeros((t, n))
    for query, block in np.ndindex(t, n):
        if (block + 1) * size > query + 1 or not chosen[query, block * size]:
            teacher[query, block] = 0
    for query in np.flatnonzero(teacher.any(axis=1)):
        compared = teacher[query] > 0
        student = np.exp(scores[query, compared])
        expected[query, compared] = student / student.sum() - teacher[query, compared] / teacher[query].sum()
    options = {"blocks": blocks} if size > 1 else {"lse": jnp.log(totals[..., 0].T[None])}
    selected, keys = selection if stage == "sparse" else None, (jnp.asarray(q), jnp.asarray(k), CAUSAL)
    gradient = jax.jit(jax.grad(lambda i: indexer_divergence(i, *keys, selected, **options).sum()))(index)
    assert_close("scores", gradient.q[0, :, 0] * np.sqrt(n), expected, "float32")


# Attention to random choices


def draw_call(seed, draw=0):
    """Random sizes and options by seed; random documents, choices and arrays, with some queries that choose nothing."""
    rng = np.random.default_rng(seed)
    b, t, g, share, size, count = (
        int(rng.choice(values)) for values in ((1, 2), range(1, 70), (1, 2, 3), (1, 2), (1, 3, 8, 20), range(1, 5))
    )
    h = g * share
    scopes, packed, *has = int(rng.choice([1, g, h])), rng.random() < 0.6, *(rng.random(3) < 0.3)
    rng = np.random.default_rng((seed, draw))
    segments = np.sort(rng.integers(0, 3, (b, t)), axis=1) if packed else None
    blocks = make_blocks(t, size, None if segments is None else jnp.asarray(segments))
    scores, visible = rng.normal(size=(b, scopes, t, blocks.count)), rng.random((b, scopes, t, blocks.count)) < 0.7
    groups = choose(jnp.asarray(scores), jnp.asarray(visible), count)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((b, t, h, 6), (b, t, g, 6), (b, t, g, 5))]
    options = {
        "softcap": 2.0 if has[0] else None,
        "sink_logits": rng.normal(size=h).astype(np.float32) if has[1] else None,
        "alibi_slopes": rng.random(h).astype(np.float32) if has[2] else None,
    }
    return arrays, Selection(groups, blocks), segments, options, rng


def count_keys(selection, segments, heads):
    """The chosen keys [b, h, t, s] that are not after the query, by loops."""
    groups, of_key = np.asarray(selection.groups), np.asarray(selection.blocks.of_key)
    b, scopes, t, _ = groups.shape
    counts = np.zeros((b, heads, t, of_key.shape[1]), int)
    for row, head, query in np.ndindex(b, heads, t):
        for key in range(query + 1):
            block = of_key[row % len(of_key), key]
            same = segments is None or segments[row, key] == segments[row, query]
            counts[row, head, query, key] = same and block in groups[row, head // (heads // scopes), query]
    return counts


@pytest.mark.parametrize(
    ("seed", "draws"),
    [*((seed, 1) for seed in range(6)), *(pytest.param(seed, 50, marks=pytest.mark.nightly) for seed in range(6, 46))],
)
def test_attention_to_random_choices(seed, draws):
    """Every draw of a seed has the same shapes, so that each implementation compiles once."""
    softcap = draw_call(seed)[3]["softcap"]

    def run(arrays, sink, slopes, selection, ids, d_out, d_lse, finite, impl):
        arguments = {"selection": selection, "impl": impl, "segment_ids": ids, "sink_logits": sink, "return_lse": True}
        out, lse = attend(*arrays, CAUSAL, **arguments, softcap=softcap, alibi_slopes=slopes)
        return (out * d_out).sum() + jnp.where(finite, lse * d_lse, 0).sum(), (out, lse)

    steps = {
        impl: jax.jit(jax.grad(functools.partial(run, impl=impl), (0, 1), has_aux=True)) for impl in IMPLEMENTATIONS
    }
    for draw in range(draws):
        arrays, selection, segments, options, rng = draw_call(seed, draw)
        (b, t, h, _), value = arrays[0].shape, arrays[2].shape[-1]
        d_out, d_lse = rng.normal(size=(b, t, h, value)), rng.normal(size=(b, t, h))
        expected = attend_reference(*arrays, count_keys(selection, segments, h), d_out, d_lse, **options)
        per_head = options["sink_logits"], options["alibi_slopes"]
        inputs = arrays, *per_head, selection, segments, d_out, d_lse, np.isfinite(expected.lse)
        for impl, step in steps.items():
            (grads, d_sink), (out, lse) = step(*jax.tree.map(jnp.asarray, inputs))
            assert_close(f"{draw}: {impl} out", out, expected.out, "float32")
            assert_close(f"{draw}: {impl} lse", lse, expected.lse, "float32")
            for name, grad in zip(("q", "k", "v", "sink"), (*grads, d_sink), strict=True):
                if grad is not None:
                    assert_close(f"{draw}: {impl} d_{name}", grad, getattr(expected, name), "float32")


@pytest.mark.parametrize("impl", ["gather", "segment"])
def test_derivatives_of_every_mode_and_order(impl):
    arrays, selection, segments, _, rng = draw_call(3)
    (q, k, v), ids = map(jnp.asarray, arrays), None if segments is None else jnp.asarray(segments)
    moved, weights = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (q, v))

    def differentiate(impl):
        def total(q):
            out = attend(q, k, v, CAUSAL, selection=selection, impl=impl, segment_ids=ids)
            return (jnp.sin(out) * weights[:, :, :1]).sum()

        second = jax.grad(lambda q: (jax.grad(total)(q) * moved).sum())
        return jax.jit(lambda q: (jax.jvp(total, (q,), (moved,))[1], second(q)))(q)

    for name, actual, expected in zip(("jvp", "second"), differentiate(impl), differentiate("dense"), strict=True):
        assert_close(name, actual, expected, "float32")


# Properties of mechanisms

MECHANISMS = {
    "top tokens": lambda q, k, count, ids: top_tokens(q, k, count, CAUSAL, segments=ids),
    "top tokens of kv heads": lambda q, k, count, ids: top_tokens(
        q, k, count, CAUSAL, scope="kv_head", pooling="probabilities", segments=ids
    ),
    "tiles by maximum": lambda q, k, count, ids: top_tiles(q, k, 7, count, CAUSAL, segments=ids),
    "tiles by mean": lambda q, k, count, ids: top_tiles(q, k, 7, count, CAUSAL, pooling="mean", segments=ids),
    "tiles by logsumexp": lambda q, k, count, ids: top_tiles(q, k, 7, count, CAUSAL, pooling="logsumexp", segments=ids),
    "moba": lambda q, k, count, ids: moba(q, k, 8, count, CAUSAL, segments=ids),
    "nsa": lambda q, k, count, ids: compress(q, k, k, 4, 2, 6, count, ids)[1],
    "infllm": lambda q, k, count, ids: infllm(q, k, 6, count, CAUSAL, window=4, stride=2, segments=ids),
    "infllm, dense at first": lambda q, k, count, ids: infllm(
        q, k, 6, count, CAUSAL, window=4, stride=2, dense_below=40, segments=ids
    ),
    "blocks of index keys": lambda q, k, count, ids: index_blocks(q, k, count, ids),
    "blocks of mean index keys": lambda q, k, count, ids: index_blocks(q, k, count, ids, has_block_keys=True),
    "routing": lambda q, k, count, ids: route(
        k, CENTROIDS, count, segments=None if ids is None else ids[1]
    ),
}  # fmt: skip


def index_blocks(q, k, count, ids, has_block_keys=False):
    """MiniMax-M3's choice, with the last block; or Qwen4's, from the mean key of a block."""
    blocks, keys = make_blocks(k.shape[1], 6, None if ids is None else ids[1]), k[:, :, :1]
    keys = block_means(keys, blocks)[:, :, 0] if has_block_keys else keys[:, :, 0]
    options = {"has_block_keys": True} if has_block_keys else {"local": 1}
    return select_indexed(Index(q, keys), count, CAUSAL, blocks=blocks, segments=ids, **options)


CENTROIDS = jnp.asarray(np.random.default_rng(7).normal(size=(2, 3, 6)), jnp.float32)
SHAPES = ((4, 6), jnp.float32), ((2, 6), jnp.float32), ((), jnp.int32)
LENGTH = 70  # above that up to which `attend` uses the dense implementation


@pytest.fixture(scope="module")
def arrays():
    return draw_arrays(LENGTH)


def draw_arrays(length):
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 6), (2, length, 2, 6), (2, length, 2, 5)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "routing"])
def test_every_visible_group_gives_dense_attention(name, arrays):
    q, k, v = arrays
    run = jax.jit(lambda selection: attend(q, k, v, CAUSAL, selection=selection, impl="dense"))
    np.testing.assert_array_equal(run(jax.jit(lambda: MECHANISMS[name](q, k, LENGTH, None))()), run(None))


@pytest.mark.parametrize("name", MECHANISMS)
def test_later_tokens_change_nothing(name, arrays):
    rng = np.random.default_rng(1)

    @jax.jit
    def run(q, k, v):
        selection = MECHANISMS[name](q, k, 3, None)
        return attend(q, k, v, CAUSAL, selection=selection), selection.groups

    before, groups = run(*arrays)
    for cut in (1, 24, 41, LENGTH - 1):
        edited = [x.at[:, cut:].set(jnp.asarray(rng.normal(size=x[:, cut:].shape), x.dtype)) for x in arrays]
        after, chosen = run(*edited)
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        np.testing.assert_array_equal(chosen[:, :, :cut], groups[:, :, :cut])


@pytest.mark.parametrize("bounds", [[0, 17, 45, 70], [0, 1, 2, 42, 82, 182, 222, 322, 330]], ids=["few", "many"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_packed_document_chooses_as_alone(name, bounds):
    """Rows of some chunks of queries; a chunk sees the blocks of its documents only."""
    arrays = draw_arrays(bounds[-1])
    ids = number_documents(bounds).repeat(2, axis=0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(packed, q, k, v):
        selection = MECHANISMS[name](q, k, 3, (ids, ids) if packed else None)
        return attend(q, k, v, CAUSAL, selection=selection, impl="dense", segment_ids=ids if packed else None)

    out = run(True, *arrays)
    for start, stop in itertools.pairwise(bounds):
        assert_close(
            f"{start} to {stop}", out[:, start:stop], run(False, *(x[:, start:stop] for x in arrays)), "float32"
        )


def test_blocks_of_documents_without_segments_are_all_visible():
    q, k, _ = draw_arrays(330)
    blocks = make_blocks(330, 6, number_documents([0, 100, 222, 330]).repeat(2, axis=0))
    selection = jax.jit(lambda: select_indexed(Index(q, k[:, :, 0]), 330, CAUSAL, blocks=blocks))()
    assert (selection.mask | ~np.tri(330, dtype=bool)).all()


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in ("routing", "top tokens of kv heads")])
def test_memory_of_a_packed_row(name):
    """A row of documents takes a few times the memory of one document of its length, which is the scores of a chunk."""
    q, k, ids = (jax.ShapeDtypeStruct((1, 4096, *shape), dtype) for shape, dtype in SHAPES)

    def measure(run, *arrays):
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    alone = measure(lambda q, k: MECHANISMS[name](q, k, 3, None).groups, q, k)
    assert measure(lambda q, k, ids: MECHANISMS[name](q, k, 3, (ids, ids)).groups, q, k, ids) < 8 * alone


@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
def test_the_divergence_of_a_packed_document_is_that_of_it_alone(stage):
    bounds = [0, 1, 2, 42, 82, 122, 162]
    q, k, _ = draw_arrays(bounds[-1])
    ids = number_documents(bounds).repeat(2, axis=0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(packed, q, k):
        segments = (ids, ids) if packed else None
        blocks = make_blocks(q.shape[1], 6, ids if packed else None)
        index, options = Index(q, block_means(k[:, :, :1], blocks)[:, :, 0]), {"blocks": blocks, "segments": segments}
        selection = select_indexed(index, 3, CAUSAL, has_block_keys=True, **options)
        return indexer_divergence(index, q, k, CAUSAL, selection if stage == "sparse" else None, **options)

    divergence = run(True, q, k)
    for start, stop in itertools.pairwise(bounds):
        alone = run(False, q[:, start:stop], k[:, start:stop])
        assert_close(f"{start} to {stop}", divergence[:, start:stop], alone, "float32")
    assert divergence.max() > 0.01


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("mass", [0.3, 0.9])
def test_the_fewest_keys_that_hold_a_mass(scope, mass, arrays):
    q, k, _ = arrays
    run = jax.jit(lambda: top_tokens(q, k, 12, CAUSAL, scope=scope, pooling="probabilities", mass=mass).groups)
    groups = np.asarray(run())
    for row, head, query in np.ndindex(*groups.shape[:3]):
        heads = [head] if scope == "query_head" else [2 * head, 2 * head + 1]
        logits = [np.asarray(k)[row, : query + 1, h // 2].astype(float) @ np.asarray(q)[row, query, h] for h in heads]
        p = np.mean([np.exp(x / 6**0.5) / np.exp(x / 6**0.5).sum() for x in logits], axis=0)
        order = np.argsort(-p, kind="stable")
        count = min(12, 1 + int((np.cumsum(p[order]) < mass).sum()))
        expected = sorted(order[:count])
        assert [key for key in groups[row, head, query] if key >= 0] == expected


def test_queries_that_choose_together_leak(arrays):
    q, k, _ = arrays
    edited = q.at[:, 30].add(5.0)
    first, second = (top_tiles(x, k, 4, 2, CAUSAL, query_tile=4).groups for x in (q, edited))
    assert not np.array_equal(first[:, :, 28:30], second[:, :, 28:30])


def test_of_equal_scores_the_lower_index_wins():
    scores, visible = jnp.asarray([[0.0, 1.0, -0.0, 1.0, 0.0]]), jnp.asarray([[True, True, True, False, True]])
    assert choose(scores, visible, 3).tolist() == [[0, 1, 2]]
    assert choose(scores, visible, 9).tolist() == [[0, 1, 2, 4, -1]]
    assert choose(scores, visible, 2, jnp.arange(5) >= 3).tolist() == [[1, 4]]  # what is not visible is not forced


# InfLLM-V2


def choose_by_windows(q, k, block, count, window, stride, initial, local, dense_below):
    """The blocks of each key/value head and query of a document, by loops in float64."""
    (t, h, d), g = q.shape, k.shape[1]
    starts, blocks = range(0, t - window + 1, stride), -(-t // block)
    chosen = np.full((g, t, blocks), -1)
    for head, query in np.ndindex(g, t):
        scores = np.zeros(query // block + 1)
        ended = [start for start in starts if start + window <= query + 1]
        means = np.array([k[start : start + window, head].mean(axis=0) for start in ended])
        if ended:
            logits = q[query].reshape(g, h // g, d)[head] @ means.T * d**-0.5
            p = np.exp(logits - logits.max(axis=-1, keepdims=True))
            p = (p / p.sum(axis=-1, keepdims=True)).sum(axis=0)
            for i, start in enumerate(ended):
                last = min((start + window - 1) // block, len(scores) - 1)
                scores[start // block : last + 1] = np.maximum(scores[start // block : last + 1], p[i])
        scores[:initial] = scores[max(len(scores) - local, 0) :] = np.inf
        kept = len(scores) if query < dense_below else count
        best = np.sort(np.argsort(-scores, kind="stable")[:kept])
        chosen[head, query, : len(best)] = best
    return chosen


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 100))]
)
def test_blocks_by_windows(seed):
    rng = np.random.default_rng(seed)
    t, g, stride = int(rng.integers(1, 150)), int(rng.choice([1, 2])), int(rng.choice([1, 2, 3]))
    sizes = {"window": stride * int(rng.integers(1, 4)), "initial": int(rng.integers(0, 3))}
    sizes |= {"local": int(rng.integers(1, 4)), "dense_below": int(rng.choice([0, 29, 200]))}
    block, count = stride * int(rng.integers(1, 6)), int(rng.integers(1, 9))
    q, k = (rng.normal(size=(t, heads, 6)).astype(np.float32) for heads in (g * int(rng.choice([1, 2, 4])), g))
    bounds = [0, *sorted(set(rng.integers(1, t + 1, 2).tolist()) | {t})]
    ids = number_documents(bounds)

    @jax.jit
    def run(q, k):
        return infllm(q[None], k[None], block, count, CAUSAL, stride=stride, segments=(ids, ids), **sizes)

    selection = run(q, k)
    groups, numbers = np.asarray(selection.groups[0]), np.asarray(selection.blocks.numbers[0])
    for start, stop in itertools.pairwise(bounds):
        rows = slice(start, stop)
        expected = choose_by_windows(np.float64(q[rows]), np.float64(k[rows]), block, count, stride=stride, **sizes)
        actual = np.where(groups[:, rows] < 0, -1, numbers[groups[:, rows]])
        width = max(actual.shape[-1], expected.shape[-1])
        actual, expected = (
            np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])), constant_values=-1) for x in (actual, expected)
        )
        np.testing.assert_array_equal(actual, expected)


# The lightning indexer


def make_index(length):
    random = np.random.default_rng(length)
    shapes = (2, length, 3, 4), (2, length, 3), (2, length, 4)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def scores_of(q, weights, k):
    products = np.maximum(np.einsum("bthd,bsd->bths", q.astype(np.float64), k.astype(np.float64)) / 2, 0)
    return np.einsum("bths,bth->bts", products, weights)


def test_index_scores():
    index = make_index(9)
    q, weights, k = map(jnp.asarray, index)
    assert_close("scores", Index(q, k, weights).scores(q, weights)[:, 0], scores_of(*index), "float32")


@pytest.mark.parametrize(("length", "top_k"), [(1, 3), (63, 5), (65, 64), (150, 7)])
def test_every_query_selects_its_best_keys_of_its_document(length, top_k):
    index, segments = make_index(length), np.sort(np.random.default_rng(0).integers(0, 3, size=(2, length)))
    ids = jnp.asarray(segments)
    run = jax.jit(lambda q, weights, k: select_indexed(Index(q, k, weights), top_k, CAUSAL, segments=(ids, ids)).groups)
    (selected, scores) = np.asarray(run(*map(jnp.asarray, index))), scores_of(*index)
    assert selected.shape == (2, 1, length, min(top_k, length))
    for row, query in np.ndindex(2, length):
        allowed = [key for key in range(query + 1) if segments[row, key] == segments[row, query]]
        best = sorted(allowed, key=lambda key: (-scores[row, query, key].astype(np.float32), key))[:top_k]
        assert [key for key in selected[row, 0, query] if key >= 0] == sorted(best)


def test_no_gradient_flows_through_a_selection():
    def total(index):
        q, weights, k = index
        groups = select_indexed(Index(q, k, weights), 2, CAUSAL).groups
        return sum(x.sum() for x in index) + groups.sum().astype(jnp.float32)

    for gradient in jax.jit(jax.grad(total))([jnp.asarray(x) for x in make_index(5)]):
        np.testing.assert_array_equal(gradient, 1)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("top_k", lambda q, k: moba(q, k, 8, 0, CAUSAL)),
        ("block", lambda q, k: moba(q, k, 0, 1, CAUSAL)),
        ("pooling", lambda q, k: top_tiles(q, k, 8, 1, CAUSAL, pooling="sum")),
        ("scope", lambda q, k: top_tokens(q, k, 1, CAUSAL, scope="head")),
        ("mass", lambda q, k: top_tokens(q, k, 1, CAUSAL, mass=1.5)),
        ("pattern", lambda q, k: moba(q, k, 8, 1, parse("per_head(causal, causal, causal, causal)"))),
        ("members", lambda q, k: route(k, CENTROIDS, 0)),
        ("length", lambda q, k: compress(q, k, k, 5, 2, 8, 3)),
        ("stride", lambda q, k: compress(q, k, k, 4, 0, 8, 3)),
        ("block", lambda q, k: compress(q, k, k, 4, 2, 7, 3)),
        ("count", lambda q, k: compress(q, k, k, 4, 2, 8, 0)),
        ("block", lambda q, k: infllm(q, k, 8, 3, CAUSAL)),
        ("window", lambda q, k: infllm(q, k, 16, 3, CAUSAL, window=24)),
        ("count", lambda q, k: infllm(q, k, 16, 0, CAUSAL)),
        ("pattern", lambda q, k: infllm(q, k, 16, 3, parse("per_head(causal, causal, causal, causal)"))),
        ("selection", lambda q, k: attend(q, k, k, CAUSAL, selection=moba(q[:, :9], k[:, :9], 8, 1, CAUSAL))),
        ("selection", lambda q, k: attend(q, k, k, CAUSAL, selection=moba(q[:1], k[:1], 8, 1, CAUSAL))),
        ("impl", lambda q, k: attend(q, k, k, CAUSAL, selection=moba(q, k, 8, 1, CAUSAL), impl="cudnn")),
    ],
)
def test_invalid_input(argument, call, arrays):
    with rejects(InputError, argument):
        call(*arrays[:2])
