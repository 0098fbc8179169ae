"""Native sparse attention against the whole mixer in float64, written out query by query."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.account import count_bytes
from sparsejax.errors import InputError
from sparsejax.layers import Context, NormConfig, NsaConfig, RopeConfig, Stream, Tokens
from sparsejax.layers.mixers import make_mixer
from tests.layers import reference
from tests.layers.reference import ACTIVATIONS, linear, norm, rotate, sigmoid
from tests.layers.test_extend import cut, extend, stagger
from tests.messages import rejects
from tests.tolerances import assert_close

WIDTH, LENGTH, BATCH = 6, 53, 2
CONFIG = NsaConfig(
    heads=4,
    kv_heads=2,
    head_width=4,
    value_width=3,
    rope=RopeConfig(base=50.0),
    qk_norm=NormConfig(kind="rms", eps=1e-6),
    impl="auto",
    compress_length=6,
    compress_stride=3,
    compress_width=7,
    select_block=6,
    count=4,
    window=7,
)
CONFIGS = {
    "mlp": CONFIG,
    "mean": dataclasses.replace(CONFIG, compress="mean", compress_width=None, kv_heads=1, qk_norm=None),
    "shared": dataclasses.replace(CONFIG, shared_kv=True, kv_heads=4, rope=None, value_width=None),
    "disjoint": dataclasses.replace(CONFIG, compress_length=4, compress_stride=4, select_block=8, count=3, local=1),
    "long": dataclasses.replace(CONFIG, compress_length=8, compress_stride=2, select_block=4, count=5, initial=0),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
FIRST = pytest.mark.parametrize(
    "config", [pytest.param(c, id=i, marks=() if i == "mlp" else pytest.mark.nightly) for i, c in CONFIGS.items()]
)


def build(config) -> nnx.Module:
    return reference.fill(lambda: make_mixer(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)))


def make_x(length=LENGTH, seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, length, WIDTH)).astype(np.float32)


def attend(q, k, v):
    """Attention of a query [r, d] to keys [s, d], and the probabilities; zeros without keys."""
    scores = q @ k.T * q.shape[-1] ** -0.5
    p = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf)) if len(k) else scores
    p = p / p.sum(axis=-1, keepdims=True) if len(k) else p
    return p @ v, p


def compress(config, w, name, window):
    """A vector per key/value head [g, d] for a window [length, g, d]."""
    if config.compress == "mean":
        return window.mean(axis=0)
    w = w[f"compress_{name}"]
    rows = (window + w["positions"][:, None]).swapaxes(0, 1).reshape(config.kv_heads, -1)
    return linear(w["down"], ACTIVATIONS["gelu_tanh"](linear(w["up"], rows)))


def choose(config, p, query, starts):
    """The blocks of a query from the probability of each window."""
    size, current = config.select_block, query // config.select_block
    scores = np.zeros(current + 1)
    for block, (start, probability) in itertools.product(range(current + 1), zip(starts, p, strict=True)):
        both = min(start + config.compress_length, (block + 1) * size) - max(start, block * size)
        scores[block] += probability * max(both, 0) / config.compress_stride
    scores[: config.initial] = scores[max(current - config.local + 1, 0) :] = np.inf
    return np.argsort(-scores, kind="stable")[: config.count]


def mix(config, w, x, is_dense=False):
    """The output of a document [t, m]; with `is_dense` every key is selected."""
    t, g = len(x), config.kv_heads

    def rotate_at(y, at):
        if config.rope is None or not len(at):
            return y
        row = np.zeros((1, t, *y.shape[1:]))
        row[0, at] = y
        return rotate(row, config.rope)[0, at]

    def split(layer, heads):
        return linear(layer, x).reshape(t, heads, -1)

    q = norm(config.qk_norm, w.get("query_norm"), split(w["query"], config.heads))
    q, gates = rotate_at(q, np.arange(t)).reshape(t, g, -1, 4), sigmoid(split(w["gate"], g).reshape(t, g, -1, 3))
    raw, v = {}, {}
    for branch in ("compress", "select", "window"):
        name = "shared" if config.shared_kv else branch
        raw[branch] = norm(config.qk_norm, w.get("key_norms", {}).get(name), split(w["keys"][name], g))
        v[branch] = split(w["values"][name], g)
    k = {branch: rotate_at(keys, np.arange(t)) for branch, keys in raw.items()}
    starts = np.arange(0, t - config.compress_length + 1, config.compress_stride)
    windows = [slice(start, start + config.compress_length) for start in starts]
    keys, values = (
        np.array([compress(config, w, part, arrays["compress"][window]) for window in windows])
        for part, arrays in (("key", raw), ("value", v))
    )
    keys = rotate_at(keys, starts)
    out = np.zeros((t, g, config.heads // g, v["select"].shape[-1]))
    for i, head in itertools.product(range(t), range(g)):
        ended = starts + config.compress_length <= i + 1
        compressed, p = np.zeros(out.shape[2:]), np.zeros((1, 0))
        if ended.any():
            compressed, p = attend(q[i, head], keys[ended, head], values[ended, head])
        chosen = choose(config, p.sum(axis=0), i, starts[ended])
        near = np.arange(i + 1)
        selected = near if is_dense else near[np.isin(near // config.select_block, chosen)]
        branches = (
            compressed,
            attend(q[i, head], k["select"][selected, head], v["select"][selected, head])[0],
            attend(q[i, head], *(y["window"][max(i + 1 - config.window, 0) : i + 1, head] for y in (k, v)))[0],
        )
        out[i, head] = sum(gates[i, head, :, [j]].T * branch for j, branch in enumerate(branches))
    return linear(w["out"], out.reshape(t, -1))


def mix_batch(config, w, x, **options):
    return np.stack([mix(config, w, row, **options) for row in np.float64(x)])


@EVERY
def test_the_mixer_equals_numpy(config):
    module, x = build(config), make_x()
    assert_close("y", jax.jit(module)(x), mix_batch(config, reference.weights(module), x), "float32")


@pytest.mark.parametrize("length", [1, 5, 6, 7, 11])
def test_short_sequences(length):
    module, x = build(CONFIG), make_x(length)
    y = jax.jit(module)(x)
    assert_close("y", y, mix_batch(CONFIG, reference.weights(module), x), "float32")
    assert_close("steps", extend(module, x, length, cut(length, 1)), y, "float32")


def test_enough_blocks_give_dense_attention_in_the_select_branch():
    config = dataclasses.replace(CONFIG, count=LENGTH)
    module, x = build(config), make_x()
    expected = mix_batch(config, reference.weights(module), x, is_dense=True)
    assert_close("y", jax.jit(module)(x), expected, "float32")


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.nightly) for seed in range(60)])
def test_random_sizes(seed):
    rng = np.random.default_rng(seed)
    stride, kv_heads = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    config = dataclasses.replace(
        CONFIG,
        heads=kv_heads * int(rng.choice([1, 2, 4])),
        kv_heads=kv_heads,
        compress_stride=stride,
        compress_length=max(stride * int(rng.integers(1, 5)), 2 * (stride == 1)),
        select_block=stride * int(rng.integers(1, 5)),
        count=int(rng.integers(3, 8)),
        window=int(rng.integers(1, 20)),
        shared_kv=bool(rng.random() < 0.5),
        impl=str(rng.choice(["gather", "segment", "dense"])),
    )
    length = int(rng.integers(1, 150))
    module, x = build(config), make_x(length, seed)
    y = jax.jit(module)(x)
    assert_close("y", y, mix_batch(config, reference.weights(module), x), "float32")
    assert_close("chunks", extend(module, x, length, stagger(length, 20, seed)), y, "float32")


@FIRST
def test_chunks_of_ragged_rows_equal_the_whole(config):
    module, x = build(config), make_x()
    y = jax.jit(module)(x)
    for advances in (cut(LENGTH, 1), stagger(LENGTH, 17)):
        assert_close("chunks", extend(module, x, LENGTH, advances), y, "float32")


@EVERY
def test_a_packed_document_is_mixed_as_alone(config):
    """Padding splits the second row, and follows it."""
    module, x = build(config), make_x()
    segments = np.searchsorted([17, 44], np.arange(LENGTH), side="right")[None].repeat(BATCH, axis=0)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, 40:44] = mask[1, 50:] = False
    tokens = Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(mask))
    y, w = jax.jit(module)(x, Context(tokens)), reference.weights(module)
    for row, start, stop in ((0, 0, 17), (0, 17, 44), (0, 44, LENGTH), (1, 0, 17), (1, 17, 40), (1, 44, 50)):
        expected = mix(config, w, np.float64(x[row, start:stop]))
        assert_close(f"row {row}, {start} to {stop}", y[row, start:stop], expected, "float32")


def test_later_tokens_change_nothing():
    module, x = build(CONFIG), make_x()
    run = jax.jit(module)
    before = run(x)
    for start in (1, 20, 42, LENGTH - 1):
        edited = np.concatenate([x[:, :start], make_x(seed=1)[:, start:]], axis=1)
        np.testing.assert_array_equal(run(edited)[:, :start], before[:, :start])


@FIRST
def test_gradients_equal_finite_differences(config):
    """Along a random direction of the input and of every parameter."""
    config = dataclasses.replace(config, count=3)
    module, x, rng = build(config), make_x(27), np.random.default_rng(2)
    d_y, (graph, state) = rng.normal(size=x.shape), nnx.split(module)
    arrays = {"x": jnp.asarray(x), "w": nnx.to_pure_dict(state)}
    moves = jax.tree.map(lambda a: rng.normal(size=a.shape) / a.size**0.5, arrays)

    @jax.jit
    @jax.grad
    def differentiate(arrays):
        replaced = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(replaced, arrays["w"])
        return (nnx.merge(graph, replaced)(arrays["x"]) * d_y).sum()

    actual = jax.tree.map(lambda grad, move: (np.float64(grad) * move).sum(), differentiate(arrays), moves)
    exact, leaves = jax.tree.map(np.float64, arrays), jax.tree.leaves(moves)

    def total(index, step):
        shifts = [move * step * (i == index) for i, move in enumerate(leaves)]
        moved = jax.tree.map(np.add, exact, jax.tree.unflatten(jax.tree.structure(moves), shifts))
        return (mix_batch(config, moved["w"], moved["x"]) * d_y).sum()

    expected = [(total(index, 1e-5) - total(index, -1e-5)) / 2e-5 for index in range(len(leaves))]
    assert_close("gradients", np.array(jax.tree.leaves(actual)), np.array(expected), "float32")


def test_the_cache_holds_every_key_and_rings():
    cache = build(CONFIG).init_cache(BATCH, LENGTH)
    slots = {"compress": 16, "latest": 5, "select": LENGTH, "window": 7}
    for name, count in slots.items():
        assert count_bytes(cache[name]) == 4 * BATCH * count * 2 * (4 + 3)


def test_the_account_counts_the_keys_of_all_branches():
    module = build(CONFIG)
    windows = [max(0, (t - 5) // 3 + 1) for t in range(LENGTH)]
    selected = [sum(1 for key in range(t + 1) if key // 6 > t // 6 - 4) for t in range(LENGTH)]
    near = [min(t + 1, 7) for t in range(LENGTH)]
    cost, pairs = module.cost(LENGTH), 4 * (sum(windows) + sum(selected) + sum(near))
    assert cost.pairs == pairs
    projections = 16 + 3 * 4 + 3 * 2 * (4 + 3) + 12
    mlps = 7 * (6 * 4 + 4) + 7 * (6 * 3 + 3)
    flops = 2 * WIDTH * projections + (2 * pairs * (4 + 3) + 2 * 2 * windows[-1] * mlps) / LENGTH
    assert cost.flops == pytest.approx(flops)


def test_the_summary_names_the_sizes():
    assert CONFIG.summary == "nsa 4/2 x 4, mlp of 6 / 3, top 4 blocks of 6, window of 7"


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("heads", {"heads": 3}),
        ("compress", {"compress": "max"}),
        ("compress_length", {"compress_length": 7}),
        ("compress_length", {"compress_length": 1, "compress_stride": 1}),
        ("compress_width", {"compress": "mean"}),
        ("select_block", {"select_block": 4}),
        ("count", {"count": 2}),
        ("local", {"local": 0}),
        ("window", {"window": 0}),
        ("impl", {"impl": "fast"}),
        ("rope.fraction", {"head_width": 5}),
    ],
)
def test_invalid_sections(key, options):
    with rejects(InputError, key):
        dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize("name", ["compress_length", "select_block"])
def test_a_window_or_block_longer_than_the_sequence(name):
    with rejects(InputError, name):
        dataclasses.replace(CONFIG, **{name: 12}).check(11)


def test_globals_are_not_supported():
    with rejects(InputError, "globals"):
        build(CONFIG)(jnp.asarray(make_x()), Context().with_extras(globals=jnp.zeros((BATCH, 1), jnp.int32)))
