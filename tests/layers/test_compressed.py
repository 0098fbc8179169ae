"""Compressed attention against float64 NumPy, query by query and head by head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import (
    CompressedConfig,
    CompressionConfig,
    Context,
    EntryIndexerConfig,
    NormConfig,
    RopeConfig,
    RopeScaling,
    Stream,
    Tokens,
)
from sparsejax.layers.compressed import Compressed
from sparsejax.model import Functional
from tests.check import models
from tests.layers import reference
from tests.layers.properties import assert_only_the_indexer_learns
from tests.layers.test_mixers import decode
from tests.messages import rejects
from tests.ops.test_entries import compress, list_windows
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

LENGTH, WIDTH = 23, 10
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
WINDOW = CompressedConfig(
    heads=4,
    head_width=6,
    query_rank=7,
    window=3,
    rope_width=4,
    rope=RopeConfig(base=50.0, interleaved=True),
    groups=2,
    out_rank=5,
    norm_eps=1e-6,
    impl="auto",
)
SCALED = RopeConfig(
    base=50.0, interleaved=True, scaling=RopeScaling(kind="yarn", factor=4.0, original_length=8, attention_factor=1.0)
)
HCA = dataclasses.replace(WINDOW, compression=CompressionConfig(ratio=5), rope=SCALED)
INDEXER = EntryIndexerConfig(heads=3, width=5, top_k=2)
CSA = dataclasses.replace(WINDOW, compression=CompressionConfig(ratio=4, overlap=True, indexer=INDEXER))
CONFIGS = {
    "window": WINDOW,
    "hca": HCA,
    "csa": CSA,
    "all entries, overlapping": dataclasses.replace(HCA, compression=CompressionConfig(ratio=3, overlap=True)),
    "selected entries": dataclasses.replace(
        WINDOW, compression=CompressionConfig(ratio=1, indexer=dataclasses.replace(INDEXER, top_k=1))
    ),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: CompressedConfig, dtype=jnp.float32) -> Compressed:
    return reference.fill(lambda: Compressed(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def rotate_last(config, x, at, sign=1):
    """Rotates the last features of x [n, d] at positions [n], pair by pair."""
    y, start = x.copy(), x.shape[-1] - config.rope_width
    radians, _ = reference.frequencies(config.rope, config.rope_width)
    for i, pair in np.ndindex(len(x), config.rope_width // 2):
        first = start + 2 * pair
        rotated = (x[i, first] + 1j * x[i, first + 1]) * np.exp(sign * 1j * at[i] * radians[pair])
        y[i, first], y[i, first + 1] = rotated.real, rotated.imag
    return y


def rms(config, x, w=None):
    plain = NormConfig(kind="rms", eps=config.norm_eps, scale=w is not None)
    return reference.norm(plain, w, x)


def entries_of(config, w, x, windows):
    parts = (x @ w[name]["weight"] for name in ("values", "gates"))
    entries = compress(*parts, w["bias"], windows, config.compression.overlap)
    return rotate_last(config, rms(config, entries, w["norm"]), [tokens[0] for tokens, _ in windows])


def select(config, w, x, latent, windows, seen):
    """The entries to which each query attends among those that it sees, and their scores."""
    at, indexer = np.arange(len(x)), config.indexer
    keys, q = entries_of(config, w["compressor"], x, windows), (latent @ w["queries"]["weight"])
    q = q.reshape(len(x), indexer.heads, -1)
    q = np.stack([rotate_last(config, q[:, head], at) for head in range(indexer.heads)], axis=1)
    products = np.maximum(np.einsum("thd,nd->thn", q, keys), 0) / np.sqrt(indexer.width)
    scores = np.einsum("thn,th->tn", products, x @ w["weights"]["weight"] / np.sqrt(indexer.heads))
    if indexer.dense:
        return seen, scores
    return [sorted(sorted(seen[t], key=lambda i, t=t: (-scores[t, i], i))[: indexer.top_k]) for t in at], scores


def compressed_attention(config, w, x, ids=None):
    """Output for one sequence x [t, m], the entries to which each query attends, and its divergence from them."""
    t, d, at = len(x), config.head_width, np.arange(len(x))
    ids = np.zeros(t, int) if ids is None else ids
    latent = rms(config, x @ w["query_latent"]["weight"], w["query_norm"])
    q = rms(config, (latent @ w["query"]["weight"]).reshape(t, -1, d))
    q = np.stack([rotate_last(config, q[:, head], at) for head in range(config.heads)], axis=1)
    k = rotate_last(config, rms(config, x @ w["key"]["weight"], w["key_norm"]), at)
    attended = [[] for _ in range(t)]
    entries = np.zeros((0, d))
    if config.compression is not None:
        windows = list_windows(ids, config.compression.ratio)
        if windows:
            entries = entries_of(config, w["compressor"], x, windows)
        ends = [tokens[-1] for tokens, _ in windows]
        attended = [[i for i, end in enumerate(ends) if end <= t and ids[end] == ids[t]] for t in at]
        if config.indexer is not None and windows:
            attended, scores = select(config, w["indexer"], x, latent, windows, attended)
    y, mass = np.zeros_like(q), np.zeros((t, len(entries)))
    for now, head in np.ndindex(t, config.heads):
        near = [s for s in range(max(0, now - config.window + 1), now + 1) if ids[s] == ids[now]]
        keys = np.concatenate([k[near], entries[attended[now]]])
        terms = np.exp(keys @ q[now, head] / np.sqrt(d))
        total = terms.sum() + np.exp(w["sinks"][head])
        y[now, head] = terms @ keys / total
        mass[now, attended[now]] += terms[len(near) :] / total
    y = np.stack([rotate_last(config, y[:, head], at, -1) for head in range(config.heads)], axis=1)
    y = np.einsum("tgi,gir->tgr", y.reshape(t, config.groups, -1), w["group"])
    kl = np.zeros(t)
    for now in at if config.indexer is not None else ():
        if attended[now]:
            teacher = mass[now, attended[now]] / mass[now].sum()
            student = np.exp(scores[now, attended[now]])
            kl[now] = (teacher * np.log(teacher * student.sum() / student)).sum()
    return y.reshape(t, -1) @ w["out"]["weight"], attended, kl


@EVERY
def test_equals_the_reference_whole_and_in_steps(config):
    module = build(config)
    w = reference.weights(module)
    expected, attended, _ = zip(*(compressed_attention(config, w, np.asarray(x, np.float64)) for x in X), strict=True)
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(X)
    assert_close("call", y, np.stack(expected), "float32")
    assert_close("steps", steps, np.stack(expected), "float32")
    selection = jax.jit(module.select)(jnp.asarray(X))
    assert (selection is None) == (config.indexer is None)
    if selection is not None:
        chosen = [[[i for i in row if i >= 0] for row in rows] for rows in np.asarray(selection.groups[:, 0])]
        assert chosen == list(map(list, attended))


@pytest.mark.parametrize("config", [HCA, CSA], ids=["hca", "csa"])
def test_documents_do_not_see_each_other_and_nobody_sees_padding(config):
    module = build(config)
    w, segments = reference.weights(module), np.array([[0] * 9 + [1] * 14, [2] * 7 + [3] * 7 + [4] * 9])
    real = (np.arange(LENGTH) < np.array([[LENGTH], [19]])) & (np.arange(LENGTH) >= np.array([[0], [2]]))
    run = jax.jit(lambda x: module(x, Context(Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(real)))))
    y = run(jnp.where(real[..., None], X, jnp.nan))
    for row in range(2):
        ids = np.where(real[row], segments[row], 99 + np.arange(LENGTH))
        expected, *_ = compressed_attention(config, w, np.asarray(X[row], np.float64), ids)
        assert_close("documents", y[row][real[row]], expected[real[row]], "float32")


@pytest.mark.parametrize("config", [HCA, CSA], ids=["hca", "csa"])
def test_edits_of_a_suffix_change_no_earlier_bit(config):
    module, random = build(config), np.random.default_rng(1)
    cuts = [1, 3, 4, 5, 8, 15, 16, 20, 22]
    rows = np.where(np.arange(LENGTH)[:, None] < np.array([LENGTH, *cuts])[:, None, None], X[0], 0)
    rows += np.where(rows == 0, random.normal(size=rows.shape), 0).astype(np.float32)
    y = np.asarray(jax.jit(module.__call__)(jnp.asarray(rows, jnp.float32)))
    for row, cut in enumerate(cuts, 1):
        np.testing.assert_array_equal(y[row, :cut], y[0, :cut])


@pytest.mark.parametrize("config", [HCA, CSA], ids=["hca", "csa"])
@pytest.mark.parametrize(
    "size", [7, pytest.param(2, marks=pytest.mark.nightly), pytest.param(12, marks=pytest.mark.nightly)]
)
def test_chunks_of_rows_at_different_positions_equal_the_call(config, size):
    module, random = build(config), np.random.default_rng(2)
    y = np.asarray(jax.jit(module.__call__)(jnp.asarray(X)))
    lengths = np.array([LENGTH, LENGTH - 4])

    @jax.jit
    def extend(chunk, cache, positions, mask):
        return module.extend(chunk, cache, positions, LENGTH, Context(Tokens(mask=mask)))

    cache, at = module.init_cache(2, LENGTH), np.zeros(2, int)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    while (at < lengths).any():
        counts = np.minimum(random.integers(0, size + 1, 2), lengths - at)
        mask = np.arange(size) < counts[:, None]
        index = np.minimum(at[:, None] + np.arange(size), LENGTH - 1)
        chunk = np.where(mask[..., None], np.take_along_axis(X, index[..., None], axis=1), np.nan)
        out, cache = extend(jnp.asarray(chunk), cache, jnp.asarray(at), jnp.asarray(mask))
        for row, count in enumerate(counts):
            assert_close("chunk", out[row, :count], y[row, at[row] : at[row] + count], "float32")
        at = at + counts
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes


def with_loss(config=CSA, **changes):
    indexer = dataclasses.replace(INDEXER, loss_weight=1.0, **changes)
    return dataclasses.replace(config, compression=dataclasses.replace(config.compression, indexer=indexer))


PACKED = np.array([[0] * 9 + [1] * 14, [2] * 7 + [3] * 1 + [4] * 15])
DENSE = pytest.mark.parametrize("dense", [True, False], ids=["warm-up", "sparse"])


@DENSE
@pytest.mark.parametrize("segments", [np.zeros((2, LENGTH), int), PACKED], ids=["whole", "packed"])
def test_the_loss_of_the_indexer(dense, segments):
    config, context = with_loss(dense=dense), Context(Tokens(segments=jnp.asarray(segments)))
    module = build(config)
    w = reference.weights(module)
    rows = [compressed_attention(config, w, x.astype(np.float64), i) for x, i in zip(X, segments, strict=True)]
    expected, kl = (np.stack([row[part] for row in rows]) for part in (0, 2))
    y, auxiliary, metrics = jax.jit(lambda x: (*module.mix(x, context), module.measure(x, context)))(X)
    assert_close("out", y, expected, "float32")
    assert_close("loss", auxiliary.losses["indexer"], kl.mean(), "float32")
    assert auxiliary.selection is None
    assert_close("kl", metrics["kl"], kl.mean(), "float32")
    assert 0 < float(metrics["mass"]) <= float(metrics["recall"]) <= 1
    assert 0 < float(metrics["entropy"]) <= 1
    assert float(metrics["forced"]) == 0


@DENSE
def test_the_loss_trains_the_indexer_and_nothing_else(dense):
    config = with_loss(dense=dense)
    assert_only_the_indexer_learns(build(config), X)


@DENSE
def test_the_gradient_of_the_loss_by_differences(dense):
    config = with_loss(dense=dense)
    module, x = build(config), X[:1].astype(np.float64)
    graph, parameters = nnx.split(module)
    gradient = jax.jit(jax.grad(lambda p: nnx.merge(graph, p).mix(jnp.asarray(X[:1]))[1].losses["indexer"]))(parameters)
    gradient, w, random = nnx.to_pure_dict(gradient)["indexer"], reference.weights(module), np.random.default_rng(3)
    direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), w["indexer"])

    def loss(step):
        moved = w | {"indexer": jax.tree.map(lambda a, b: a + step * b, w["indexer"], direction)}
        return compressed_attention(config, moved, x[0])[2].mean()

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    products = jax.tree.map(lambda a, b: float((np.asarray(a) * b).sum()), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-3)


def test_attention_gives_the_indexer_no_gradient_and_all_else_one():
    graph, parameters = nnx.split(build(CSA))
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(jnp.asarray(X)) ** 2).sum()))(parameters)
    gradient = nnx.to_pure_dict(gradient)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.pop("indexer")))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_warm_up_attends_to_all_entries_whole_and_in_steps():
    module = build(with_loss(dense=True))
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(X)
    assert_close("steps", steps, y, "float32")
    assert set(module.init_cache(2, 50)) == {"k", "compressor"}
    assert not module.config.selects
    assert module.selections(jnp.asarray(X)) == {}
    assert module.config.is_measured


@pytest.mark.parametrize("config", [HCA, CSA], ids=["hca", "csa"])
def test_gradients_are_those_of_the_reference_by_differences(config):
    module = build(config)
    w, x = reference.weights(module), X[0].astype(np.float64)
    direction = np.random.default_rng(1).normal(size=x.shape)
    mix = np.random.default_rng(2).normal(size=x.shape)
    step = 1e-6  # small enough to select the same entries
    ends = [(mix * compressed_attention(config, w, x + s * step * direction)[0]).sum() for s in (1, -1)]
    gradient = jax.jit(jax.grad(lambda x: (mix.astype(np.float32) * module(x[None])[0]).sum()))(X[0])
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_with_all_entries_selected_csa_attends_to_all():
    indexer = dataclasses.replace(INDEXER, top_k=LENGTH)
    every = dataclasses.replace(CSA, compression=CompressionConfig(ratio=4, overlap=True, indexer=indexer))
    none = dataclasses.replace(CSA, compression=CompressionConfig(ratio=4, overlap=True))
    module, dense = build(every), build(none)
    nnx.update(dense, {k: v for k, v in nnx.to_pure_dict(nnx.state(module)).items() if k != "indexer"})
    y, expected = jax.jit(lambda x: (module(x), dense(x)))(X[:, :13])
    assert_close("all", y, expected, "float32")


def test_the_cache_is_a_window_entries_and_the_tokens_that_later_entries_cover():
    shapes = jax.tree.map(lambda x: x.shape, build(CSA).init_cache(2, 50))
    assert shapes == {
        "k": (2, 1, 3, 6),
        "compressor": {"values": (2, 8, 12), "gates": (2, 8, 12), "entries": (2, 12, 6)},
        "indexer": {"values": (2, 8, 10), "gates": (2, 8, 10), "entries": (2, 12, 5)},
    }
    assert set(build(HCA).init_cache(2, 50)["compressor"]) == {"values", "gates", "entries"}
    assert set(build(WINDOW).init_cache(2, 50)) == {"k"}


def test_the_caches_of_scanned_layers_are_stacked():
    model = Functional(models.build("compressed"))
    cache = jax.eval_shape(lambda key: model.bind(model.init(key)).init_cache(2, 50), jax.random.key(0))
    (layer,) = cache["period"]
    assert layer["compressor"]["values"].shape == (3, 2, 8, 16)
    assert layer["indexer"]["entries"].shape == (3, 2, 12, 8)


def test_the_cost():
    near = 1 + 2 + 3 * 18
    linear = 2 * (WIDTH * 7 + 7 * 4 * 6 + WIDTH * 6 + 2 * 12 * 5 + 2 * 5 * WIDTH)
    cost = build(WINDOW).cost(20)
    assert cost.pairs == 4 * near
    assert cost.flops == pytest.approx(linear + 2 * 4 * near * 12 / 20)
    seen = sum((t + 1) // 5 for t in range(20))
    cost, projections = build(HCA).cost(20), 2 * 2 * WIDTH * 6
    assert cost.pairs == 4 * (near + seen)
    assert cost.flops == pytest.approx(linear + projections + 2 * 4 * (near + seen) * 12 / 20)
    seen = [(t + 1) // 4 for t in range(20)]
    kept = sum(min(2, n) for n in seen)
    cost = build(CSA).cost(20)
    assert (cost.pairs, cost.index_pairs) == (4 * (near + kept), 3 * sum(seen))
    projections = 2 * (2 * WIDTH * 12 + 2 * WIDTH * 10 + 7 * 15 + WIDTH * 3)
    scores = 2 * (4 * (near + kept) * 12 + 3 * sum(seen) * 5) / 20
    assert cost.flops == pytest.approx(linear + projections + scores)
    loss = 2 * kept * (4 * 6 + 3 * 3 * 5)
    trained = build(with_loss()).cost(20)
    assert trained == dataclasses.replace(cost, loss_flops=trained.loss_flops)
    assert trained.loss_flops * 20 == pytest.approx(loss)
    loss = 2 * sum(seen) * (4 * 6 + 3 * 3 * 5) + 3 * 20 * 2 * (2 * WIDTH * 10 + 7 * 15 + WIDTH * 3)
    trained = build(with_loss(dense=True)).cost(20)
    assert trained.pairs == 4 * (near + sum(seen))
    assert trained.loss_flops * 20 == pytest.approx(loss)


def test_what_it_states():
    assert [str(config.connectivity) for config in (WINDOW, HCA)] == ["window(2)", "causal"]
    assert [config.selects for config in (WINDOW, HCA, CSA)] == [False, False, True]
    assert CSA.summary == "compressed attention 4 x 6, window 3, entries of 4, top 2"


def test_bfloat16():
    module = build(HCA, jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(x)
    assert y.dtype == steps.dtype == jnp.bfloat16
    rows = np.asarray(x, np.float64)
    expected = np.stack([compressed_attention(HCA, reference.weights(module), row)[0] for row in rows])
    assert_close("call", y.astype(jnp.float32), expected, "bfloat16")
    assert_close("steps", steps.astype(jnp.float32), expected, "bfloat16")


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"window": 0}, "window"),
        ({"out_rank": 0}, "out_rank"),
        ({"groups": 3}, "heads"),
        ({"rope_width": 3}, "rope.fraction"),
        ({"rope_width": 8}, "rope_width"),
        ({"impl": "magic"}, "impl"),
        ({"rope_width": 6}, "compression.indexer.width"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CSA, **change)


def test_rejects_empty_windows_and_indexers():
    with rejects(InputError, "ratio"):
        CompressionConfig(ratio=0)
    with rejects(InputError, "top_k"):
        EntryIndexerConfig(heads=4, width=6, top_k=0)
    with rejects(InputError, "compression.indexer.loss_weight"):
        with_loss().check(11)
    with_loss().check(12)
