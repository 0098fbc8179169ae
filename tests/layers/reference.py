"""The layers a second time, in plain float64 NumPy: what the modules are held against.

Weights are the modules' own, as nested dicts: see `weights`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import schedule
from sparsejax.layers import AttentionConfig
from sparsejax.patterns import parse
from tests.patterns.definition import mask


def weights(module: nnx.Module) -> dict:
    """A module's parameters as float64 arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))


def fill(build: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """A module with random parameters, none of them 0 or 1, so that no mistake hides behind its start."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        centre, spread = (0.0, 0.4) if len(leaf.shape) > 1 else (0.6, 0.2)
        return jnp.asarray(centre + spread * random.normal(size=leaf.shape), leaf.dtype)

    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(draw, state))


def parameters(module: nnx.Module) -> list:
    """A module's parameters as they are."""
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(config, w, x):
    if config.kind == "none":
        return x
    if config.kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * w["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + config.eps) * w["scale"] + w["bias"]


def mlp(config, w, x):
    activate, up = ACTIVATIONS[config.activation], x @ w["up"]["weight"]
    hidden = activate(x @ w["gate"]["weight"]) * up if config.kind == "gated" else activate(up)
    return hidden @ w["down"]["weight"]


def rotate(x, base):
    """Turns x[b, t, h, d] as the complex numbers x[i] + i x[i + d/2]."""
    t, half = x.shape[1], x.shape[-1] // 2
    turns = np.exp(1j * np.arange(t)[:, None] * float(base) ** (-2 * np.arange(half) / x.shape[-1]))
    turned = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(config, w, x):
    b, t, _ = x.shape
    q, k, v = ((x @ w[name]["weight"]).reshape(b, t, -1, config.head_width) for name in ("query", "key", "value"))
    q, k = norm(config.qk_norm, w.get("query_norm"), q), norm(config.qk_norm, w.get("key_norm"), k)
    if config.rope is not None:
        q, k = rotate(q, config.rope.base), rotate(k, config.rope.base)
    allowed = np.broadcast_to(mask(parse(config.pattern), t, t), (config.heads, t, t))
    y = np.zeros_like(q)
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        scores = np.einsum("btd,bsd->bts", q[:, :, head], k[:, :, shared]) / math.sqrt(config.head_width)
        scores = np.where(allowed[head], scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, :, head] = shares / shares.sum(-1, keepdims=True) @ v[:, :, shared]
    return y.reshape(b, t, -1) @ w["out"]["weight"]


def conv(w, x):
    taps, y = w["weight"], np.zeros_like(x) + w.get("bias", 0)
    for now in range(x.shape[1]):
        for back in range(min(len(taps), now + 1)):
            y[:, now] += taps[len(taps) - 1 - back] * x[:, now - back]  # the last tap is the token's own
    return y


def mamba(config, w, x):
    b, t, _ = x.shape
    inputs, gate = x @ w["input"]["weight"], x @ w["gate"]["weight"]
    u = ACTIVATIONS["silu"](conv(w["conv"], inputs))
    low, B, C = np.split(u @ w["select"]["weight"], [config.dt_rank, config.dt_rank + config.state], axis=-1)
    dt = np.log1p(np.exp(low @ w["dt"]["weight"] + w["dt_bias"]))
    A, state, y = -np.exp(w["log_decay"]), np.zeros((b, config.inner, config.state)), np.zeros_like(u)
    for now in range(t):
        state = np.exp(dt[:, now, :, None] * A) * state + (dt[:, now] * u[:, now])[..., None] * B[:, now, None]
        y[:, now] = (state * C[:, now, None]).sum(-1) + w["skip"] * u[:, now]
    return y * ACTIVATIONS["silu"](gate) @ w["out"]["weight"]


def layer(config, w, x):
    mixer = attention if isinstance(config.mixer, AttentionConfig) else mamba
    parts = []
    if config.mixer is not None:
        first = config.mixer_norm or config.norm
        parts.append((lambda x: mixer(config.mixer, w["mixer"], x), "mixer_residual", config.mixer_residual, first))
    if config.mlp is not None:
        parts.append((lambda x: mlp(config.mlp, w["mlp"], x), "mlp_residual", config.mlp_residual, config.norm))
    for part, name, how, first in parts:
        scales = w.get(name, {})
        read = x if config.norm_position == "post" else norm(first, scales.get("before"), x)
        y = norm(config.norm, scales.get("within"), part(read)) if config.norm_position == "both" else part(read)
        x = how.keep * (read if how.base == "norm" else x) + how.scale * y
        x = norm(config.norm, scales.get("after"), x) if config.norm_position == "post" else x
    return x


def model(config, w, tokens):
    x = w["embedding"]["tokens"][tokens]
    for name, own in zip(config.names, layer_weights(config, w), strict=True):
        x = layer(config.layers[name], own, x)
    x = norm(config.norm, w.get("norm"), x)
    return x @ (w["embedding"]["tokens"].T if config.tied else w["head"]["weight"])


def layer_weights(config, w) -> list[dict]:
    """The parameters of each layer in order, whether they lie in a scanned period or not."""
    fold = schedule.fold(config.names) if config.scan else schedule.Fold(config.names, (), 0, ())
    turns = [jax.tree.map(lambda leaf, i=i: leaf[i], w["period"]) for i in range(fold.repeats)]
    parts = [w.get("before", {}), *turns, w.get("after", {})]
    return [part[i] for part in parts for i in sorted(part)]
