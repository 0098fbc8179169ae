"""Routing attention against loops in float64 NumPy, and the state of its centroids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.layers import Context, RopeConfig, Routing, RoutingConfig, Stream, Tokens
from sparsejax.ops.routing import update_centroids
from tests.check.models import MIXERS, build
from tests.layers import reference
from tests.layers.properties import assert_chunks_equal_whole, assert_later_tokens_change_nothing
from tests.messages import rejects
from tests.tolerances import assert_close

WIDTH, LENGTH = 10, 41
CAUSAL = RoutingConfig(
    heads=4, kv_heads=2, head_width=6, clusters=3, members=4, rope=RopeConfig(base=100.0), impl="dense"
)
BALANCED = dataclasses.replace(CAUSAL, balanced=True)
SHARED = dataclasses.replace(CAUSAL, kv_heads=4, shared=True)
FORMS = {
    "shared": SHARED,
    "shared, balanced": dataclasses.replace(SHARED, balanced=True, members=7),
    "last members": CAUSAL,
    "balanced": BALANCED,
    "bidirectional": dataclasses.replace(BALANCED, causal=False, members=9, rope=None),
}
PACKED = np.array([[0] * 8 + [1] * 33, [0] * 20 + [1] * 1 + [2] * 20])


def make(config):
    mixer = reference.fill(lambda: Routing(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)))
    centroids = np.asarray(mixer.centroids[...])
    mixer.centroids[...] = jnp.asarray(centroids / np.linalg.norm(centroids, axis=-1, keepdims=True))
    return mixer


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


def softmax(scores):
    p = np.exp(scores - scores.max())
    return p / p.sum()


def run_reference(config, w, x, segments):
    """Output, and sums of normalized keys per cluster, of a row x [t, m]."""
    t, h, g = len(x), config.heads, config.kv_heads
    names = "query", "query" if config.shared else "key", "value"
    q, k, v = (reference.linear(w[name], x).reshape(t, -1, config.head_width) for name in names)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    k, scale = (unit, 1) if config.shared else (k, config.head_width**-0.5)

    def without(query, keys):
        return [key for key in keys if key != query] or keys if config.shared else keys

    if config.rope is not None:
        q, k = (reference.rotate(heads[None], config.rope)[0] for heads in (q, k))
    similarity = np.einsum("tgd,gcd->gct", unit, w["centroids"])
    nearest, sums = similarity.argmax(axis=1), np.zeros_like(w["centroids"])
    y = np.zeros((t, h, config.head_width))
    for head in range(h):
        kv = head // (h // g)
        logits = q[:, head] @ k[:, kv].T * scale
        if not config.balanced:
            for query in range(t):
                same = [s for s in range(query + 1) if nearest[kv, s] == nearest[kv, query]]
                keys = without(query, [s for s in same if segments[s] == segments[query]][-config.members :])
                y[query, head] = softmax(logits[query, keys]) @ v[keys, kv]
            continue
        count = np.zeros(t)
        for cluster in range(config.clusters):
            members = sorted(np.argsort(-similarity[kv, cluster], kind="stable")[: config.members])
            for query in members:
                keys = [s for s in members if segments[s] == segments[query] and (s <= query or not config.causal)]
                keys = without(query, keys)
                y[query, head] += softmax(logits[query, keys]) @ v[keys, kv]
                count[query] += 1
        y[:, head] /= np.maximum(count, 1)[:, None]
    for kv, token in np.ndindex(g, t):
        sums[kv, nearest[kv, token]] += unit[token, kv]
    distances = [((unit[:, kv] - w["centroids"][kv, nearest[kv]]) ** 2).mean() for kv in range(g)]
    return reference.linear(w["out"], y.reshape(t, -1)), sums, np.mean(distances)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segments", [np.zeros((2, LENGTH), int), PACKED], ids=["whole", "packed"])
def test_the_output_the_loss_and_the_sums(form, segments, x):
    config = dataclasses.replace(FORMS[form], commitment=0.5)
    mixer = make(config)
    w = reference.weights(mixer)
    rows = [run_reference(config, w, *row) for row in zip(x.astype(np.float64), segments, strict=True)]
    outputs, sums, distances = (np.stack(part) for part in zip(*rows, strict=True))
    y, auxiliary = jax.jit(lambda x: mixer.mix(x, Context(Tokens(segments=jnp.asarray(segments)))))(x)
    assert_close("out", y, outputs, "float32")
    assert_close("sums", auxiliary.statistics["sums"], sums.sum(axis=0), "float32")
    assert_close("loss", auxiliary.losses["commitment"], 0.5 * distances.mean(), "float32")


@pytest.mark.parametrize("config", [CAUSAL, SHARED], ids=["keys", "shared"])
def test_chunks_of_ragged_rows_equal_the_whole(config, x):
    chunks = (17, (17, 9)), (4, (4, 4)), (1, (1, 1)), (15, (15, 3)), (1, (1, 1))
    cache = assert_chunks_equal_whole(make(config), x, chunks)
    assert cache["k"].shape == (2, config.kv_heads, 3, 4, 6)  # the last members of each cluster, at any length


@pytest.mark.parametrize("config", [CAUSAL, SHARED], ids=["keys", "shared"])
def test_later_tokens_change_nothing(config, x):
    assert_later_tokens_change_nothing(make(config), x, (1, 16, 30, LENGTH - 1))


def test_balanced_clusters_read_the_future(x):
    run = jax.jit(make(BALANCED).__call__)
    edited = x.copy()
    edited[:, -1] += 3
    assert np.abs(run(edited)[:, :-1] - run(x)[:, :-1]).max() > 1e-2


def test_centroids_move_toward_their_members():
    random = np.random.default_rng(2)
    centroids, sums = random.normal(size=(2, 3, 5)), random.normal(size=(2, 3, 5))
    centroids /= np.linalg.norm(centroids, axis=-1, keepdims=True)
    sums[1, 2] = 0  # a cluster without members
    moved = 0.9 * centroids + 0.1 * sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), 1e-30)
    moved /= np.linalg.norm(moved, axis=-1, keepdims=True)
    moved[1, 2] = centroids[1, 2]
    assert_close("centroids", update_centroids(*map(jnp.float32, (centroids, sums)), 0.1), moved, "float32")


def test_no_gradient_reaches_the_centroids(x):
    graph, parameters = nnx.split(make(dataclasses.replace(CAUSAL, commitment=1.0)))

    def total(parameters):
        y, auxiliary = nnx.merge(graph, parameters).mix(jnp.asarray(x))
        return (y**2).sum() + auxiliary.losses["commitment"]

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(total))(parameters))
    np.testing.assert_array_equal(gradient.pop("centroids"), 0)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_one_cluster_is_a_window(x):
    """And one member is the value of the token itself."""
    mixer = make(dataclasses.replace(CAUSAL, clusters=1, members=1))
    w = reference.weights(mixer)
    values = np.repeat(reference.linear(w["value"], x.astype(np.float64)).reshape(2, LENGTH, 2, 6), 2, axis=2)
    expected = reference.linear(w["out"], values.reshape(2, LENGTH, -1))
    assert_close("out", jax.jit(mixer.__call__)(x), expected, "float32")


def test_the_account():
    cost = make(CAUSAL).cost(LENGTH)
    assert cost.pairs == 4 * (1 + 2 + 3 + 4 * (LENGTH - 3))
    linear = 2 * WIDTH * 6 * (4 + 2 + 2 + 4)
    assert cost.flops == pytest.approx(linear + 2 * 2 * 3 * 6 + 4 * 6 * cost.pairs / LENGTH)
    assert make(BALANCED).cost(LENGTH).pairs == 4 * 3 * 10
    shared = make(dataclasses.replace(SHARED, clusters=1)).cost(LENGTH)
    assert shared.pairs == 4 * (1 + 1 + 2 + 3 * (LENGTH - 3))
    assert shared.flops == pytest.approx(3 * 2 * WIDTH * 6 * 4 + 2 * 4 * 6 + 4 * 6 * shared.pairs / LENGTH)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("clusters", {"clusters": 0}),
        ("members", {"members": 0}),
        ("heads", {"heads": 3}),
        ("rate", {"rate": 1.5}),
        ("commitment", {"commitment": -1.0}),
        ("causal", {"causal": False}),
        ("shared", {"shared": True}),
    ],
)
def test_invalid_sections(argument, changes):
    with rejects(InputError, argument):
        dataclasses.replace(CAUSAL, **changes)


def test_a_causal_model_refuses_balanced_clusters():
    with rejects(ConfigError, "layers.mix.mixer"):
        build(MIXERS["routing"] | {"balanced": True})
    assert build(MIXERS["routing"] | {"balanced": True}, allow_leaks=True)


def test_run_time_globals(x):
    with rejects(InputError, "globals"):
        make(CAUSAL)(jnp.asarray(x), Context().with_extras(globals=jnp.zeros((2, 1), jnp.int32)))
