"""Attention among tokens with equal hashes, against a loop over tokens and rounds in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import attend_hashed, decode_attend_hashed, hash_buckets
from tests.tolerances import assert_close

HEADS, WIDTH, OUT, ROUNDS, BUCKETS = 2, 4, 3, 3, (4, 2)
CHUNK = 4


def make_inputs(length: int, rounds: int = ROUNDS, batch: int = 2):
    random = np.random.default_rng(length)
    qk, v = (random.normal(size=(batch, length, HEADS, width)) for width in (WIDTH, OUT))
    return qk, v, random.normal(size=(HEADS, WIDTH, rounds, sum(BUCKETS) // 2))


def hash_vector(x, rotations):
    """The bucket of a vector [d] under rotations [d, n] for factors 4 and 2."""
    y = x @ rotations
    first = int(np.argmax([*y[:2], *-y[:2]]))
    return first + 4 * int(np.argmax([y[2], -y[2]]))


def loop(qk, v, buckets, chunk, before=1, after=0, causal=True, segments=None, mask=None):
    """[b, t, h, value] of [b, t, h, d] and buckets [b, h, r, t], token by token."""
    (b, t, heads, d), rounds = qk.shape, buckets.shape[2]
    tokens = -(-t // chunk) * chunk
    y = np.zeros((b, t, heads, v.shape[-1]))
    for row, head in np.ndindex(b, heads):
        ids = np.full(tokens, np.inf)  # of padding
        ids[:t] = 0 if segments is None else segments[row]
        if mask is not None:
            ids[:t][~mask[row]] = np.inf
        numbers = np.pad(buckets[row, head], ((0, 0), (0, tokens - t)))
        orders = [sorted(range(tokens), key=lambda i, r=r: (ids[i], numbers[r, i], i)) for r in range(rounds)]
        chunks = [order[i : i + chunk] for order in orders for i in range(0, tokens, chunk)]
        per_round = len(chunks) // rounds
        for query in range(t):
            parts = []
            for r in range(rounds):
                at = next(n for n in range(r * per_round, (r + 1) * per_round) if query in chunks[n])
                keys = [key for i in range(-before, after + 1) for key in chunks[(at + i) % len(chunks)]]
                scores = []
                for key in keys:
                    allowed = ids[key] == ids[query] < np.inf and not (causal and key > query)
                    if key == query:
                        scores.append(-1e5)
                    elif allowed:
                        k = qk[row, key, head] / np.sqrt(np.mean(qk[row, key, head] ** 2) + 1e-6) / np.sqrt(d)
                        scores.append(qk[row, query, head] @ k)
                    else:
                        scores.append(-1e9)
                m = max(scores)
                p = np.exp(np.array(scores) - m)
                values = np.stack([v[row, key, head] if key < t else np.zeros(v.shape[-1]) for key in keys])
                parts.append((p @ values / p.sum(), m + np.log(p.sum())))
            outs, lses = (np.array(x) for x in zip(*parts, strict=True))
            weights = np.exp(lses - lses.max())
            y[row, query, head] = weights / weights.sum() @ outs
    return y


def test_hash_buckets_by_factors():
    qk, _, rotations = make_inputs(9)
    wide = [jnp.asarray(x, jnp.float32) for x in (qk, rotations)]
    buckets = hash_buckets(*wide, BUCKETS)
    for row, head, r, at in np.ndindex(2, HEADS, ROUNDS, 9):
        assert buckets[row, head, r, at] == hash_vector(qk[row, at, head], rotations[head, :, r])
    buckets = hash_buckets(wide[0], wide[1], (6,))  # the same rotations, six buckets of one factor
    projected = np.einsum("bthd,hdrn->bhrtn", qk, rotations)
    np.testing.assert_array_equal(buckets, np.concatenate([projected, -projected], axis=-1).argmax(-1))


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {}),
        (4, {}),
        (19, {}),
        (19, {"causal": False, "before": 1, "after": 1}),
        (19, {"before": 0}),
        (16, {"chunk": 2, "before": 3}),
    ],
    ids=str,
)
def test_attend_hashed_and_its_gradients(length, options):
    options = {"chunk": CHUNK} | options
    qk, v, rotations = make_inputs(length)
    with jax.enable_x64(True):
        inputs = jnp.asarray(qk), jnp.asarray(v)
        buckets = hash_buckets(inputs[0], jnp.asarray(rotations), BUCKETS)
        mix = np.random.default_rng(0).normal(size=v.shape)

        def total(qk, v):
            y = attend_hashed(qk, v, buckets, **options)
            return (mix * y).sum(), y

        (_, actual), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*inputs)
    numbers = np.asarray(buckets)
    assert_close("y", actual, loop(qk, v, numbers, **options), "float64")
    random, step = np.random.default_rng(1), 1e-5
    directions = [random.normal(size=gradient.shape) for gradient in gradients]
    for name, a, b in (("qk", 1, 0), ("v", 0, 1)):
        ends = [
            (mix * loop(qk + s * a * directions[0], v + s * b * directions[1], numbers, **options)).sum()
            for s in (step, -step)
        ]
        slope = (np.asarray(gradients[b]) * directions[b]).sum()
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6), name


def test_float32_is_exact_for_a_token_without_other_keys():
    qk, v, rotations = (x.astype(np.float32) for x in make_inputs(19))
    buckets = hash_buckets(jnp.asarray(qk), jnp.asarray(rotations), BUCKETS)
    actual = jax.jit(functools.partial(attend_hashed, chunk=CHUNK))(qk, v, buckets)
    expected = loop(*(x.astype(np.float64) for x in (qk, v)), np.asarray(buckets), CHUNK)
    assert_close("y", actual, expected, "float32")
    assert_close("the first token", actual[:, 0], v[:, 0], "float32")


def test_documents_and_padding():
    qk, v, rotations = (x.astype(np.float32) for x in make_inputs(19))
    buckets = hash_buckets(jnp.asarray(qk), jnp.asarray(rotations), BUCKETS)
    segments = np.array([[7] * 6 + [2] * 13, [0] * 19])
    mask = np.arange(19) < np.array([[17], [10]])
    run = jax.jit(functools.partial(attend_hashed, chunk=CHUNK))
    actual = run(qk, v, buckets, segments=jnp.asarray(segments), mask=jnp.asarray(mask))
    wide = [x.astype(np.float64) for x in (qk, v)]
    expected = loop(*wide, np.asarray(buckets), CHUNK, segments=segments, mask=mask)
    assert_close("y", actual, expected, "float32")
    moved = np.where((segments == 7)[..., None, None], v, v + 1)
    moved = np.where(mask[..., None, None], moved, 1e3)
    again = run(qk, moved, buckets, segments=jnp.asarray(segments), mask=jnp.asarray(mask))
    assert_close("the first document", again[0, :6], actual[0, :6], "float32")
    assert_close("before padding", again[1, :10], actual[1, :10] + 1, "float32")


@pytest.mark.parametrize(("rounds", "options"), [(1, {}), (3, {}), (2, {"before": 2, "after": 1})], ids=str)
def test_decode_attend_hashed_is_the_last_row_of_attend_hashed(rounds, options):
    length = 14
    qk, v, rotations = (x.astype(np.float32) for x in make_inputs(length, rounds))
    buckets = hash_buckets(jnp.asarray(qk), jnp.asarray(rotations), BUCKETS)
    run = jax.jit(functools.partial(decode_attend_hashed, chunk=CHUNK, **options))
    wide = [x.astype(np.float64) for x in (qk, v)]
    for position in range(length):
        n = position + 1
        filled = np.arange(length) < n  # later slots are ignored, whatever they hold
        cache = [np.where(filled[:, None, None], x, np.float32(1e3)) for x in (qk, v)]
        out = run(*cache, jnp.where(filled, buckets, 5), jnp.full((len(qk), 1), position), jnp.full(len(qk), n))[:, 0]
        expected = loop(*(x[:, :n] for x in wide), np.asarray(buckets)[..., :n], CHUNK, **options)
        assert_close(f"position {position}", out, expected[:, -1], "float32")


def test_a_later_token_can_move_the_chunks_of_earlier_ones():
    qk, v, rotations = (x.astype(np.float32) for x in make_inputs(19))
    buckets = np.array(hash_buckets(jnp.asarray(qk), jnp.asarray(rotations), BUCKETS))
    run = jax.jit(functools.partial(attend_hashed, chunk=CHUNK))
    before = run(qk, v, jnp.asarray(buckets))
    buckets[..., -1] = 7 - buckets[..., -1]
    assert np.abs(run(qk, v, jnp.asarray(buckets)) - before)[:, :-1].max() > 1e-2
