"""Lightning attention against a float64 loop over pairs of positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Context, Extras, Lightning, LightningConfig, Stream, Tokens
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

WIDTH, DEPTH, CHUNK = 6, 5, 8
CONFIG = LightningConfig(heads=3, head_width=4, norm_eps=1e-3, chunk=CHUNK)


def build() -> Lightning:
    return reference.fill(lambda: Lightning(CONFIG, Stream(WIDTH, DEPTH, jnp.float32), nnx.Rngs(0)))


def make_x(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, length, WIDTH)).astype(np.float32)


def expected(module: Lightning, x: np.ndarray, layer: int, segments: np.ndarray | None = None) -> np.ndarray:
    w, (b, t, _), h, d = reference.weights(module), x.shape, CONFIG.heads, CONFIG.head_width
    silu = reference.ACTIVATIONS["silu"]
    q, k, v = (silu(x @ w[name]["weight"]).reshape(b, t, h, d) for name in ("query", "key", "value"))
    o = np.zeros((b, t, h, d))
    for row in range(b):
        for head in range(h):
            rate = (2 ** (-8 / h)) ** (head + 1) * (1 - layer / (DEPTH - 1 + 1e-5) + 1e-5)
            for i in range(t):
                for j in range(i + 1):
                    if segments is None or segments[row, i] == segments[row, j]:
                        score = q[row, i, head] @ k[row, j, head]
                        o[row, i, head] += np.exp(-rate * (i - j)) * score * v[row, j, head]
    o = o.reshape(b, t, -1)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * w["norm"]["scale"]
    return (o * reference.sigmoid(x @ w["gate"]["weight"])) @ w["out"]["weight"]


@pytest.mark.parametrize("layer", [0, 2, DEPTH - 1])
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_every_layer_decays_at_its_rate(length, layer):
    module, x = build(), make_x(length)
    actual = module(jnp.asarray(x), Context(extras=Extras(layer=jnp.asarray(layer))))
    assert_close("lightning", actual, expected(module, x, layer), "float32")


def test_documents_are_apart():
    module, x = build(), make_x(29)
    segments = np.stack([np.arange(29) >= 11, np.arange(29) // 7]).astype(np.int32)
    actual = module(jnp.asarray(x), Context(Tokens(segments=jnp.asarray(segments))))
    assert_close("lightning", actual, expected(module, x, 0, segments), "float32")


def test_padding_on_the_left_changes_nothing():
    module, x = build(), make_x(20)
    mask = jnp.asarray(np.arange(20) >= 7)[None].repeat(2, 0)
    actual = module(jnp.asarray(x), Context(Tokens(mask=mask)))[:, 7:]
    assert_close("lightning", actual, expected(module, x[:, 7:], 0), "float32")


def test_rejects_sizes_below_one():
    with rejects(InputError, "heads"):
        LightningConfig(heads=0, head_width=4)
