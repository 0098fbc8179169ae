"""The LSH mixer: its projections, rotations and steps around `ops.lsh`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Context, Extras, Lsh, LshConfig, Stream, Tokens
from sparsejax.ops import hash_buckets
from tests.layers import reference
from tests.layers.properties import assert_chunks_equal_whole, assert_later_tokens_change_nothing
from tests.layers.test_mixers import decode
from tests.messages import rejects
from tests.ops.test_lsh import loop
from tests.tolerances import assert_close

LENGTH, WIDTH = 11, 6
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = LshConfig(heads=2, head_width=5, chunk=3, buckets=(2, 4), hashes=2, causal=True, seed=3)
ROTATIONS = np.random.default_rng(1).normal(size=(2, 5, 2, 3)).astype(np.float32)


def build(dtype=jnp.float32, **change) -> Lsh:
    config = dataclasses.replace(CONFIG, **change)
    return reference.fill(lambda: Lsh(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def expected(module, x, rotations, **options):
    config, w = module.config, reference.weights(module)
    qk, v = (
        (x.astype(np.float64) @ w[name]["weight"]).reshape(*x.shape[:2], config.heads, -1)
        for name in ("query_key", "value")
    )
    buckets = hash_buckets(jnp.asarray(qk, jnp.float32), jnp.asarray(rotations), config.buckets)
    sizes = {"chunk": config.chunk, "before": config.before, "after": config.after, "causal": config.causal}
    y = loop(qk, v, np.asarray(buckets), **sizes, **options)
    return y.reshape(*x.shape[:2], -1) @ w["out"]["weight"]


@pytest.mark.parametrize("change", [{}, {"causal": False, "after": 1}, {"before": 0, "chunk": 5}], ids=str)
def test_equals_the_reference(change):
    module = build(**change)
    y = jax.jit(lambda x: module(x, Context(extras=Extras(rotations=jnp.asarray(ROTATIONS)))))(X)
    assert_close("lsh", y, expected(module, X, ROTATIONS), "float32")


def test_documents_and_padding_come_from_the_context():
    module = build()
    segments, mask = np.array([[0] * 5 + [1] * 6, [0] * 11]), np.arange(LENGTH) < np.array([[11], [7]])
    context = Context(
        Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(mask)), Extras(rotations=jnp.asarray(ROTATIONS))
    )
    y = jax.jit(lambda x: module(x, context))(X)
    assert_close("lsh", y, expected(module, X, ROTATIONS, segments=segments, mask=mask), "float32")


def test_rotations_follow_from_the_seed():
    module, other = build(), build(seed=4)
    run = jax.jit(lambda x: (module(x), build()(x), other(x)))
    first, same, differs = run(X)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - differs).max() > 1e-3


def test_a_step_is_the_last_row_of_a_call_over_the_tokens_so_far():
    module = build()
    steps = jax.jit(lambda x: decode(module, x, LENGTH))(X)
    rotations = jax.random.normal(jax.random.key(3), ROTATIONS.shape)
    for n in range(1, LENGTH + 1):
        assert_close(f"{n} tokens", steps[:, n - 1], expected(module, X[:, :n], rotations)[:, -1], "float32")


def test_the_cost_and_the_cache():
    cost = build().cost(10)
    pairs = 2 * (2 * 12) * (2 * 3)  # heads x queries of two padded rounds x keys of two chunks
    assert cost.pairs == pairs
    assert cost.flops == pytest.approx(2 * 3 * WIDTH * 10 + 2 * 2 * 2 * 5 * 3 + 4 * 5 * pairs / 10)
    shapes = {name: leaf.shape for name, leaf in build().init_cache(2, 10).items()}
    assert shapes == {"qk": (2, 10, 2, 5), "v": (2, 10, 2, 5), "buckets": (2, 2, 2, 10)}


def test_bfloat16():
    module = build(jnp.bfloat16, chunk=16)  # a single chunk, so that rounding cannot move a token to another
    y, steps = jax.jit(lambda x: (module(x), decode(module, x, LENGTH)))(X)
    assert y.dtype == steps.dtype == jnp.bfloat16
    assert_close("lsh", y.astype(jnp.float32), expected(module, X, ROTATIONS), "bfloat16")
    assert_close("steps", steps.astype(jnp.float32), y.astype(jnp.float32), "bfloat16")


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"hashes": 0}, "hashes"),
        ({"before": -1}, "before"),
        ({"buckets": ()}, "buckets"),
        ({"buckets": (4, 3)}, "buckets"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)


def test_rejects_rotations_of_another_shape_and_run_time_globals():
    with rejects(InputError, "rotations"):
        build()(jnp.asarray(X), Context(extras=Extras(rotations=jnp.asarray(ROTATIONS[:, :, :1]))))
    with rejects(InputError, "globals"):
        build()(jnp.asarray(X), Context(extras=Extras(globals=jnp.zeros((2, 1), jnp.int32))))


# The strictly causal form

STRICT = {"strict": True, "chunk": 2}


def attend_strictly(module, x, rotations, segments):
    """Output of the strictly causal form by loops, for rows of packed documents."""
    config, w = module.config, reference.weights(module)
    qk, v = (
        (x.astype(np.float64) @ w[name]["weight"]).reshape(*x.shape[:2], config.heads, -1)
        for name in ("query_key", "value")
    )
    buckets = np.asarray(hash_buckets(jnp.asarray(qk, jnp.float32), jnp.asarray(rotations), config.buckets))
    keys = qk / np.sqrt((qk**2).mean(-1, keepdims=True) + 1e-6) / np.sqrt(config.head_width)
    y = np.zeros_like(v)
    for row, head, query in np.ndindex(len(x), config.heads, x.shape[1]):
        chosen = set()
        for ids in buckets[row, head]:
            same = [s for s in range(query + 1) if ids[s] == ids[query] and segments[row, s] == segments[row, query]]
            chosen |= set(same[-config.chunk * (config.before + 1) :])
        chosen = sorted(chosen - {query}) or [query]
        scores = keys[row, chosen, head] @ qk[row, query, head]
        p = np.exp(scores - scores.max())
        y[row, query, head] = p / p.sum() @ v[row, chosen, head]
    return y.reshape(*x.shape[:2], -1) @ w["out"]["weight"]


@pytest.mark.parametrize("change", [{}, {"before": 0, "hashes": 3}, {"buckets": (2,), "hashes": 1}], ids=str)
@pytest.mark.parametrize("segments", [np.zeros((2, LENGTH), int), np.array([[0] * 5 + [1] * 6, [0] * 10 + [1]])])
def test_the_strict_form_equals_loops(change, segments):
    module = build(**STRICT | change)
    shape = 2, 5, module.config.hashes, sum(module.config.buckets) // 2
    rotations = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    context = Context(Tokens(segments=jnp.asarray(segments)), Extras(rotations=jnp.asarray(rotations)))
    y = jax.jit(lambda x: module(x, context))(X)
    assert_close("strict", y, attend_strictly(module, X, rotations, segments), "float32")


def test_the_strict_form_decodes():
    assert_chunks_equal_whole(build(**STRICT), X, ((4, (4, 2)), (1, (1, 1)), (5, (5, 3)), (1, (1, 1))))


def test_later_tokens_change_nothing_in_the_strict_form():
    module = build(**STRICT)
    assert module.config.leaks == ""
    assert_later_tokens_change_nothing(module, X, range(1, LENGTH))


@pytest.mark.parametrize("change", [{"causal": False}, {"after": 1}])
def test_the_strict_form_is_causal(change):
    with rejects(InputError, "strict"):
        dataclasses.replace(CONFIG, strict=True, **change)
