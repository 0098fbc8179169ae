"""Latent attention against float64 NumPy, with expanded keys and values, query by query and head by head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import (
    Context,
    Extras,
    IndexerConfig,
    Latent,
    LatentConfig,
    NormConfig,
    RopeConfig,
    Stream,
    Tokens,
)
from sparsejax.patterns import parse
from tests.layers import reference
from tests.layers.test_mixers import decode
from tests.messages import rejects
from tests.patterns.definition import mask
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

LENGTH, WIDTH = 13, 10
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = LatentConfig(
    pattern="causal",
    heads=3,
    query_rank=7,
    kv_rank=5,
    nope_width=4,
    rope_width=2,
    value_width=6,
    rope=RopeConfig(base=100.0, interleaved=True),
    norm_eps=1e-6,
    impl="auto",
)
SPARSE = dataclasses.replace(CONFIG, indexer=IndexerConfig(heads=4, width=6, top_k=4))
CHANGES = {
    "deepseek-v2": CONFIG,
    "kimi": dataclasses.replace(CONFIG, query_rank=None, rope=None),
    "window": dataclasses.replace(CONFIG, pattern="causal & (window(3) | sink(1))", scale=0.3, bias=True),
    "heads": dataclasses.replace(CONFIG, pattern="per_head(causal, window(2), causal & chunk(4))"),
    "deepseek-v3.2": SPARSE,
    "one key": dataclasses.replace(SPARSE, indexer=IndexerConfig(heads=1, width=4, top_k=1), rope=None),
}
EVERY = pytest.mark.parametrize("config", CHANGES.values(), ids=CHANGES)


def build(config: LatentConfig, dtype=jnp.float32) -> Latent:
    return reference.fill(lambda: Latent(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def rotate_pairs(x, rope, interleaved):
    """Rotates x [t, d] pair by pair."""
    if rope is None:
        return x
    y, half = x.copy(), x.shape[-1] // 2
    for at, pair in np.ndindex(len(x), half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        rotated = (x[at, first] + 1j * x[at, second]) * np.exp(1j * at * rope.base ** (-2 * pair / x.shape[-1]))
        y[at, first], y[at, second] = rotated.real, rotated.imag
    return y


def latent_attention(config, w, x, segments=None):
    """Output for one sequence x [t, m]."""
    t, d, e, rms = len(x), config.nope_width, config.value_width, NormConfig(kind="rms", eps=config.norm_eps)
    q_latent, rope = x, config.rope

    def linear(name, x, w=w):
        return x @ w[name]["weight"] + w[name].get("bias", 0)

    if config.query_rank is not None:
        q_latent = reference.norm(rms, w["query_norm"], linear("query_latent", x))
    queries = linear("query", q_latent).reshape(t, config.heads, -1)
    latent, tail = np.split(linear("latent", x), [config.kv_rank], axis=-1)
    expanded = linear("expand", reference.norm(rms, w["latent_norm"], latent)).reshape(t, config.heads, d + e)
    tail = rotate_pairs(tail, rope, rope is not None and rope.interleaved)
    allowed = np.broadcast_to(mask(parse(config.pattern), t, t), (config.heads, t, t)).copy()
    if segments is not None:
        allowed &= segments[:, None] == segments
    if config.indexer is not None:
        allowed &= selected(config, w["indexer"], x, q_latent, allowed[0], linear)
    y = np.zeros((t, config.heads, e))
    scale = (d + config.rope_width) ** -0.5 if config.scale is None else config.scale
    for head in range(config.heads):
        q = queries[:, head]
        q = np.concatenate([q[:, :d], rotate_pairs(q[:, d:], rope, rope is not None and rope.interleaved)], axis=-1)
        k = np.concatenate([expanded[:, head, :d], tail], axis=-1)
        scores = np.where(allowed[head], scale * q @ k.T, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, head] = shares / shares.sum(-1, keepdims=True) @ expanded[:, head, d:]
    return linear("out", y.reshape(t, -1))


def selected(config, w, x, q_latent, allowed, linear):
    """Mask of the selected keys, bool [t, t]."""
    indexer, p, t = config.indexer, config.rope_width, len(x)
    k = reference.norm(NormConfig(kind="layer", eps=indexer.norm_eps), w["key_norm"], linear("keys", x, w))
    k = np.concatenate([rotate_pairs(k[:, :p], config.rope, False), k[:, p:]], axis=-1)
    q, weights = linear("queries", q_latent, w).reshape(t, indexer.heads, -1), linear("weights", x, w)
    scores = np.zeros((t, t))
    for head in range(indexer.heads):
        query = np.concatenate([rotate_pairs(q[:, head, :p], config.rope, False), q[:, head, p:]], axis=-1)
        products = np.maximum(query @ k.T, 0) / np.sqrt(indexer.width)
        scores += weights[:, head, None] / np.sqrt(indexer.heads) * products
    chosen = np.zeros((t, t), bool)
    for query in range(t):
        keys = sorted(np.flatnonzero(allowed[query]), key=lambda key: (-scores[query, key], key))
        chosen[query, keys[: indexer.top_k]] = True
    return chosen


@EVERY
def test_equals_the_reference_whole_and_in_absorbed_steps(config):
    module = build(config)
    w = reference.weights(module)
    expected = np.stack([latent_attention(config, w, np.asarray(x, np.float64)) for x in X])
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(X)
    assert_close("call", y, expected, "float32")
    assert_close("steps", steps, expected, "float32")


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["all keys", "selected keys"])
def test_documents_do_not_see_each_other_and_nobody_sees_padding(config):
    module = build(config)
    w, segments = reference.weights(module), np.array([[0] * 5 + [1] * 8, [2] * 9 + [3] * 4])
    real = np.arange(LENGTH) < np.array([[LENGTH], [11]])
    y = jax.jit(lambda x: module(x, Context(Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(real)))))(X)
    for row in range(2):
        ids = np.where(real[row], segments[row], 99)
        expected = latent_attention(config, w, np.asarray(X[row], np.float64), ids)
        assert_close("documents", y[row][real[row]], expected[real[row]], "float32")


def test_the_indexer_gets_no_gradient_and_all_else_does():
    graph, parameters = nnx.split(build(SPARSE))
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(jnp.asarray(X)) ** 2).sum()))(parameters)
    gradient = nnx.to_pure_dict(gradient)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.pop("indexer")))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_gradients_are_those_of_the_reference_by_differences():
    module = build(SPARSE)
    w, x = reference.weights(module), X[0].astype(np.float64)
    direction = np.random.default_rng(1).normal(size=x.shape)
    mix = np.random.default_rng(2).normal(size=x.shape)
    step = 1e-6  # small enough to select the same keys
    ends = [(mix * latent_attention(SPARSE, w, x + s * step * direction)).sum() for s in (1, -1)]
    gradient = jax.jit(jax.grad(lambda x: (mix.astype(np.float32) * module(x[None])[0]).sum()))(X[0])
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_the_cache_is_the_latent():
    cache = build(SPARSE).init_cache(2, 50)
    assert {name: leaf.shape for name, leaf in cache.items()} == {
        "latent": (2, 50, 5 + 2),
        "index": (2, 50, 6),
    }
    windowed = build(dataclasses.replace(CONFIG, pattern="causal & window(3)"))
    assert windowed.init_cache(2, 50)["latent"].shape == (2, 4, 5 + 2)


def test_the_cost():
    linear = 2 * (WIDTH * 7 + 7 * 3 * 6 + WIDTH * (5 + 2) + 5 * 3 * (4 + 6) + 3 * 6 * WIDTH)
    cost, pairs = build(CONFIG).cost(20), 20 * 21 // 2
    assert cost.pairs == 3 * pairs
    assert cost.flops == pytest.approx(linear + 2 * 3 * pairs * (4 + 2 + 6) / 20)
    cost, kept = build(SPARSE).cost(20), 1 + 2 + 3 + 17 * 4
    assert (cost.pairs, cost.index_pairs) == (3 * kept, 4 * pairs)
    linear += 2 * (7 * 4 * 6 + WIDTH * 6 + WIDTH * 4)
    assert cost.flops == pytest.approx(linear + 2 * (3 * kept * (4 + 2 + 6) + 4 * pairs * 6) / 20)


def test_bfloat16():
    module = build(CONFIG, jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(x)
    assert y.dtype == steps.dtype == jnp.bfloat16
    expected = np.stack([latent_attention(CONFIG, reference.weights(module), row) for row in np.asarray(x, np.float64)])
    assert_close("call", y.astype(jnp.float32), expected, "bfloat16")
    assert_close("steps", steps.astype(jnp.float32), expected, "bfloat16")


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kv_rank": 0}, "kv_rank"),
        ({"query_rank": 0}, "query_rank"),
        ({"rope_width": 3}, "rope.fraction"),
        ({"impl": "magic"}, "impl"),
        ({"pattern": "per_head(causal, causal)"}, "pattern"),
        ({"indexer": SPARSE.indexer, "pattern": "causal & window(3)"}, "pattern"),
        ({"indexer": SPARSE.indexer, "query_rank": None}, "query_rank"),
        ({"indexer": IndexerConfig(heads=1, width=1, top_k=1)}, "indexer.width"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)


def test_rejects_an_empty_indexer_and_run_time_globals():
    with rejects(InputError, "top_k"):
        IndexerConfig(heads=4, width=6, top_k=0)
    with rejects(InputError, "globals"):
        build(CONFIG)(jnp.asarray(X), Context(extras=Extras(globals=jnp.zeros((2, 1), jnp.int32))))
