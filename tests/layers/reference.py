"""Oracles of the layers in float64 NumPy.

Weights are those of the modules, as nested dicts; see `weights`.
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
from tests.patterns import definition


def weights(module: nnx.Module) -> dict:
    """Parameters of a module as float64 arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))


def fill(build: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """A module with random parameters; initial values of 0 and 1 would hide errors."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        centre, spread = (0.0, 0.4) if len(leaf.shape) > 1 else (0.6, 0.2)
        return jnp.asarray(centre + spread * random.normal(size=leaf.shape), leaf.dtype)

    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(draw, state))


def parameters(module: nnx.Module) -> list:
    """Parameters of a module."""
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(config, w, x):
    if config is None:
        return x
    if config.kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * (w["scale"] if config.scale else 1)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + config.eps) * w["scale"] + w["bias"]


def mlp(config, w, x):
    activate, up = ACTIVATIONS[config.activation], x @ w["up"]["weight"]
    hidden = activate(x @ w["gate"]["weight"]) * up if config.kind == "gated" else activate(up)
    return hidden @ w["down"]["weight"]


def frequencies(rope, width):
    """Radians per position of each pair, and the factor on queries and keys, pair by pair."""
    how, plain = rope.scaling, [rope.base ** (-2 * i / width) for i in range(width // 2)]
    if how is None:
        return np.array(plain), 1.0
    if how.kind == "linear":
        return np.array(plain) / how.factor, 1.0
    if how.kind == "ntk":  # divides the last pair by the factor and keeps the first
        return np.array([f * how.factor ** (-2 * i / (width - 2)) for i, f in enumerate(plain)]), 1.0
    waves = [2 * math.pi / f for f in plain]
    if how.kind == "llama3":
        rotated = []
        for f, wave in zip(plain, waves, strict=True):
            if wave < how.original_length / how.fast:
                rotated.append(f)
            elif wave > how.original_length / how.slow:
                rotated.append(f / how.factor)
            else:
                smooth = (how.original_length / wave - how.slow) / (how.fast - how.slow)
                rotated.append((1 - smooth) * f / how.factor + smooth * f)
        return np.array(rotated), 1.0
    # YaRN: the fractional index of the pair with this many rotations over the original length.
    low, high = (
        width / 2 * math.log(how.original_length / (rotations * 2 * math.pi), rope.base)
        for rotations in (how.fast, how.slow)
    )
    low, high = (math.floor(low), math.ceil(high)) if how.truncate else (low, high)
    low, high = max(low, 0), min(high, width - 1)
    stretch = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    rotated = [f * (1 - s) + f / how.factor * s for f, s in zip(plain, stretch, strict=True)]
    grow = how.attention_factor if how.attention_factor is not None else 1 + math.log(how.factor) / 10
    return np.array(rotated), grow


def rotate(x, rope):
    """Rotates the first features of x [b, t, h, d] as complex numbers."""
    width = int(x.shape[-1] * rope.fraction)
    turning, rest = x[..., :width], x[..., width:]
    radians, grow = frequencies(rope, width)
    rotations = grow * np.exp(1j * np.arange(x.shape[1])[:, None] * radians)[:, None]
    if rope.interleaved:
        rotated = (turning[..., ::2] + 1j * turning[..., 1::2]) * rotations
        rotated = np.stack([rotated.real, rotated.imag], axis=-1).reshape(turning.shape)
    else:
        rotated = (turning[..., : width // 2] + 1j * turning[..., width // 2 :]) * rotations
        rotated = np.concatenate([rotated.real, rotated.imag], axis=-1)
    return np.concatenate([rotated, rest], axis=-1)


def linear(w, x):
    return x @ w["weight"] + w.get("bias", 0.0)


def attention(config, w, x, mask=None, segments=None, tokens=None):
    """Attention; `tokens` lists the positions of the global tokens of each sequence."""
    b, t, _ = x.shape
    real = np.ones((b, t), bool) if mask is None else mask
    ids = np.zeros((b, t)) if segments is None else segments
    meet = ids[:, :, None] == ids[:, None, :]
    meet = np.broadcast_to((meet & real[:, :, None] & real[:, None, :])[:, None], (b, config.heads, t, t))
    allowed = np.array(np.broadcast_to(definition.mask(parse(config.pattern), t, t), meet.shape))
    for row, positions in enumerate(tokens or ()):
        allowed[row][:, :, positions] = True
    y = heads(config, w, x, allowed & meet, "")
    if tokens is not None:
        whole = heads(config, w, x, meet, "_global" if config.global_projections else "")
        for row, positions in enumerate(tokens):
            y[row, positions] = whole[row, positions]
    if config.gate:
        y = y * sigmoid(linear(w["gate"], x)).reshape(y.shape)
    return linear(w["out"], y.reshape(b, t, -1))


def heads(config, w, x, allowed, projections):
    """Outputs of the heads [b, t, h, d] under a mask [b, h, t, t]."""
    b, t, _ = x.shape
    q, k, v = (
        linear(w[name + projections], x).reshape(b, t, -1, config.head_width) for name in ("query", "key", "value")
    )
    joint = (b, t, -1) if config.qk_norm_joint else (b, t, -1, config.head_width)
    q, k = (
        norm(config.qk_norm, w.get(name), x.reshape(joint)).reshape(x.shape)
        for name, x in (("query_norm", q), ("key_norm", k))
    )
    if config.rope is not None:
        q, k = rotate(q, config.rope), rotate(k, config.rope)
    growth = 1 + config.growth * np.log(1 + (np.arange(t) + 1) // config.growth_period)
    y, distance = np.zeros_like(q), np.arange(t)[:, None] - np.arange(t)
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        queries = q[:, :, head] * growth[:, None]
        scores = np.einsum(
            "btd,bsd->bts", queries + (w["relative"]["content"][head] if config.relative else 0), k[:, :, shared]
        )
        if config.relative:
            angles = distance[..., None] / 10_000 ** (2 * np.arange(config.relative // 2) / config.relative)
            positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1) @ w["relative"]["weight"][head]
            scores = scores + np.einsum("btd,tsd->bts", queries + w["relative"]["position"][head], positions)
        scores = scores * (config.head_width**-0.5 if config.scale is None else config.scale)
        scores = scores if config.softcap is None else config.softcap * np.tanh(scores / config.softcap)
        if config.alibi:
            assert config.heads == 4
            scores = scores - 4.0 ** -(head + 1) * abs(distance)
        terms = np.where(allowed[:, head], np.exp(scores), 0.0)
        total = terms.sum(-1, keepdims=True) + (np.exp(w["sinks"][head]) if config.sinks else 0.0)
        y[:, :, head] = np.divide(terms, total, out=np.zeros_like(terms), where=total > 0) @ v[:, :, shared]
    return y


def conv(w, x):
    taps, y = w["weight"], np.zeros_like(x) + w.get("bias", 0)
    for now in range(x.shape[1]):
        for back in range(min(len(taps), now + 1)):
            y[:, now] += taps[len(taps) - 1 - back] * x[:, now - back]  # the last tap is that of the current token
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
        first = config.norm if config.mixer_norm else None
        parts.append((lambda x: mixer(config.mixer, w["mixer"], x), "mixer_residual", config.mixer_residual, first))
    if config.mlp is not None:
        parts.append((lambda x: mlp(config.mlp, w["mlp"], x), "mlp_residual", config.mlp_residual, config.norm))
    start = x
    for part, name, how, first in parts:
        scales = w.get(name, {})
        read = norm(first, scales.get("before"), x) if "before" in scales else x
        read = norm(first, w["mixer_residual"]["before"], start) if config.parallel else read
        y = part(read)
        y = norm(config.norm, scales.get("within"), y) if config.norm_position in ("both", "output") else y
        x = how.keep * (read if how.base == "norm" else x) + how.scale * y
        x = norm(config.norm, scales.get("after"), x) if config.norm_position == "post" else x
    return x


def model(config, w, tokens):
    x = w["embedding"]["tokens"][tokens]
    for name, layer_w in zip(config.names, layer_weights(config, w), strict=True):
        x = layer(config.layers[name], layer_w, x)
    x = norm(config.norm, w.get("norm"), x)
    return x @ (w["embedding"]["tokens"].T if config.tied else w["head"]["weight"])


def layer_weights(config, w) -> list[dict]:
    """Parameters of each layer in order, from the scanned period or outside it."""
    fold = schedule.fold(config.names) if config.scan else schedule.Fold(config.names, (), 0, ())
    rotations = [jax.tree.map(lambda leaf, i=i: leaf[i], w["period"]) for i in range(fold.repeats)]
    parts = [w.get("before", {}), *rotations, w.get("after", {})]
    return [part[i] for part in parts for i in sorted(part)]
