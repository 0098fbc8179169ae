"""The mixer of the gated delta rule against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Context, Delta, DeltaConfig, Stream, Tokens
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

LENGTH, WIDTH = 21, 6  # more than two chunks
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
QWEN = DeltaConfig(heads=4, key_heads=2, key_width=3, value_width=5, conv=4, norm_eps=1e-5, chunk=8)
KIMI = DeltaConfig(
    heads=2,
    key_heads=2,
    key_width=4,
    value_width=4,
    conv=3,
    norm_eps=1e-5,
    channel_decay=True,
    rank=3,
    gate="sigmoid",
    dt_min=1e-2,
    dt_max=0.5,
    chunk=8,
)
BOTH = pytest.mark.parametrize("config", [QWEN, KIMI], ids=["qwen", "kimi"])


def build(config: DeltaConfig, dtype=jnp.float32) -> Delta:
    return reference.fill(lambda: Delta(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def delta(config, w, x):
    """The recurrence, position by position and head by head."""
    b, t, _ = x.shape
    h, g, n, p = config.heads, config.key_heads, config.key_width, config.value_width

    def short(name):
        return reference.ACTIVATIONS["silu"](reference.conv(w[f"conv_{name}"], reference.linear(w[name], x)))

    def low(name):
        return x if config.rank is None else reference.linear(w[f"{name}_low"], x)

    q, k = (short(name).reshape(b, t, g, n) for name in ("query", "key"))
    q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    v, beta = short("value").reshape(b, t, h, p), reference.sigmoid(reference.linear(w["beta"], x))
    beta = 2 * beta if config.negative else beta
    steps = np.log1p(np.exp(reference.linear(w["decay"], low("decay")) + w["dt_bias"])).reshape(b, t, h, -1)
    kept = np.exp(-np.exp(w["log_decay"])[:, None] * steps)  # per head, or per channel
    y = np.zeros((b, t, h, p))
    for row, head in np.ndindex(b, h):
        state, shared = np.zeros((n, p)), head // (h // g)
        for now in range(t):
            key, query = k[row, now, shared], q[row, now, shared] / np.sqrt(n)
            state = kept[row, now, head][:, None] * state
            state = state + beta[row, now, head] * np.outer(key, v[row, now, head] - key @ state)
            y[row, now, head] = query @ state
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * w["norm"]["scale"]
    gate = reference.linear(w["gate"], low("gate"))
    activation = reference.sigmoid if config.gate == "sigmoid" else reference.ACTIVATIONS["silu"]
    return reference.linear(w["out"], y.reshape(b, t, -1) * activation(gate))


@pytest.mark.parametrize(
    "config",
    [
        QWEN,
        KIMI,
        dataclasses.replace(QWEN, rank=2, gate="sigmoid", conv=1, chunk=64),
        dataclasses.replace(QWEN, channel_decay=True, key_heads=1),
        dataclasses.replace(QWEN, negative=True),
    ],
    ids=["qwen", "kimi", "one decay of low rank", "shared keys with channel decay", "negative eigenvalues"],
)
def test_equals_the_reference(config):
    module = build(config)
    assert_close("delta", jax.jit(lambda x: module(x))(X), delta(config, reference.weights(module), X), "float32")


@BOTH
def test_padding_on_the_left_changes_nothing(config):
    module, pad = build(config), 5
    mask = np.ones((2, LENGTH), bool)
    mask[0, :pad] = False
    y = jax.jit(lambda x: module(x, Context(Tokens(mask=jnp.asarray(mask)))))(X)
    expected = delta(config, reference.weights(module), X[:1, pad:])
    assert_close("real tokens", y[:1, pad:], expected, "float32")


def test_padding_between_tokens_does_what_zeros_do():
    module = build(KIMI)
    mask = np.ones((2, LENGTH), bool)
    mask[:, 9:12] = False
    y = jax.jit(lambda x: module(x, Context(Tokens(mask=jnp.asarray(mask)))))(X)
    zeros = np.where(mask[..., None], X, 0)
    far = 12 + KIMI.conv - 1  # beyond the taps, which read the tokens before the padding in only one of the cases
    with_zeros = jax.jit(lambda x: module(x))(zeros)
    assert_close("before", y[:, :9], with_zeros[:, :9], "float32")
    assert np.abs(y[:, far:] - with_zeros[:, far:]).max() < 0.1 * np.abs(y[:, far:]).max()


@BOTH
def test_documents_are_apart(config):
    module, cut = build(config), 10
    segments = np.zeros((2, LENGTH), np.int32)
    segments[:, cut:] = 1
    y = jax.jit(lambda x: module(x, Context(Tokens(segments=jnp.asarray(segments)))))(X)
    w = reference.weights(module)
    assert_close("first", y[:, :cut], delta(config, w, X[:, :cut]), "float32")
    assert_close("second", y[:, cut:], delta(config, w, X[:, cut:]), "float32")


@BOTH
def test_bfloat16_keeps_a_float32_state(config):
    module = build(config, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(lambda x: module(x))(x)
    assert y.dtype == jnp.bfloat16
    expected = delta(config, reference.weights(module), np.asarray(x, np.float64))
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.05 * np.abs(expected).max())
    cache = module.init_cache(2, LENGTH)
    y, cache = jax.eval_shape(lambda x: module.extend(x, cache, jnp.zeros(2, jnp.int32), LENGTH), x)
    assert (y.dtype, cache["state"].dtype, cache["conv_key"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


@BOTH
def test_parameters_have_these_shapes(config):
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(build(config))))
    h, p = config.heads, config.value_width
    keys, values = config.key_heads * config.key_width, h * p
    decays, low = (h * config.key_width, 3) if config is KIMI else (h, WIDTH)
    expected = {name: {"weight": (WIDTH, keys)} for name in ("query", "key")} | {"value": {"weight": (WIDTH, values)}}
    expected |= {f"conv_{name}": {"weight": (config.conv, keys)} for name in ("query", "key")}
    expected |= {"conv_value": {"weight": (config.conv, values)}, "beta": {"weight": (WIDTH, h)}}
    expected |= {"decay": {"weight": (low, decays)}, "gate": {"weight": (low, values)}}
    expected |= {f"{name}_low": {"weight": (WIDTH, low)} for name in ("decay", "gate") if config is KIMI}
    expected |= {"dt_bias": (decays,), "log_decay": (h,), "norm": {"scale": (p,)}, "out": {"weight": (values, WIDTH)}}
    assert shapes == expected


def test_starts_with_step_sizes_and_decays_in_their_ranges():
    config = DeltaConfig(
        heads=200, key_heads=200, key_width=3, value_width=2, conv=2, norm_eps=1e-6, channel_decay=True
    )

    def start():
        module = Delta(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0))
        return jax.nn.softplus(module.dt_bias[...]), jnp.exp(module.log_decay[...])

    steps, rates = jax.jit(start)()
    assert 1e-3 * 0.999 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.1 * 1.001
    assert np.median(steps) == pytest.approx(0.01, rel=0.3)  # log-uniform
    assert 1 <= rates.min() < 2
    assert 15 < rates.max() <= 16


def test_the_cost_is_counted_from_projections_state_and_chunk():
    linear = WIDTH * (6 + 6 + 20) + WIDTH * (4 + 4 + 20) + 20 * WIDTH  # q, k, v; beta, decay, gate; out
    conv, state = 4 * (6 + 6 + 20), 4 * 3 * 5
    for length, seen in ((1, 1), (5, 5), (1000, 8)):
        cost = build(QWEN).cost(length)
        # Half a chunk on average, for two products of 2 x 3 elements and two sums of 4 x 5.
        assert (cost.pairs, cost.flops) == (0, 2 * (linear + conv) + 6 * state + seen / 2 * (4 * 6 + 4 * 20))
    low = WIDTH * (8 + 8 + 8) + WIDTH * (2 + 3 + 3) + 3 * (8 + 8) + 8 * WIDTH
    assert build(KIMI).cost(1000).flops == 2 * (low + 3 * 24) + 6 * 2 * 16 + 8 / 2 * (4 * 8 + 4 * 8)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"conv": 0}, "conv"),
        ({"key_heads": 3}, "heads"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rank": 0}, "rank"),
        ({"gate": "tanh"}, "gate"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(QWEN, **change)
