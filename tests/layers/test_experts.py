"""The mixture of experts against a float64 loop over tokens and experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import ModelConfig
from sparsejax.config import build as build_config
from sparsejax.errors import InputError
from sparsejax.layers import (
    Context,
    Experts,
    ExpertsConfig,
    Extras,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
    Stream,
    Tokens,
)
from sparsejax.model import Functional
from sparsejax.ops.experts import SCORES as SCORES_OF_OPS
from tests.layers import reference
from tests.messages import rejects
from tests.ops.test_experts import choose, softmax
from tests.tolerances import assert_close

WIDTH = 6
X = np.random.default_rng(0).normal(size=(2, 9, WIDTH)).astype(np.float32)
CONFIG = ExpertsConfig(experts=8, top_k=2, width=10, activation="silu")
CHANGES = {
    "jamba": {},
    "minimax": {"renormalize": True},
    "gpt-oss": {"renormalize": True, "bias": True, "limit": 0.4, "alpha": 1.702},
    "qwen3-next": {"renormalize": True, "shared_width": 5, "shared_gate": True},
    "deepseek": {
        "router": "sigmoid",
        "renormalize": True,
        "scale": 1.5,
        "selection_bias": True,
        "groups": 4,
        "top_groups": 2,
        "shared_width": 7,
    },
    "nemotron-h": {"router": "sigmoid", "gated": False, "activation": "relu2", "latent": 4, "shared_width": 7},
    "llama 4": {"router": "sigmoid", "weigh_input": True, "shared_width": 7},
    "deepseek-v4": {
        "router": "sqrtsoftplus",
        "renormalize": True,
        "scale": 1.5,
        "selection_bias": True,
        "shared_width": 7,
        "limit": 0.4,
        "limit_offset": 0.0,
    },
    "all": {"top_k": 8},
}


def build(dtype=jnp.float32, **change) -> Experts:
    config = dataclasses.replace(CONFIG, **change)
    return reference.fill(lambda: Experts(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def expert(config, w, number, x):
    """Output of an expert for a token."""
    if number is None:
        part = {name: w["shared"][name]["weight"] for name in w["shared"]}
    else:
        part = {name: w[name][number] for name in ("gate", "up", "down") if name in w}

    def linear(name, x):
        y = x @ part[name]
        return y + w[f"{name}_bias"][number] if config.bias and number is not None else y

    act = reference.ACTIVATIONS | {"relu2": lambda x: np.maximum(x, 0) ** 2}
    up = linear("up", x)
    if not config.gated:
        return linear("down", act[config.activation](up))
    gate, limit = linear("gate", x), config.limit
    if limit is None:
        return linear("down", act[config.activation](gate) * up)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return linear("down", (up + config.limit_offset) * gate * reference.sigmoid(config.alpha * gate))


SCORES = {
    "softmax": softmax,
    "sigmoid": reference.sigmoid,
    "sqrtsoftplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def mixture(config, w, x, ids=None):
    """The mixture, token by token."""
    y = np.zeros(x.shape)
    for slot in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[slot], np.float64)
        logits = token @ w["router"]["weight"] + w["router"].get("bias", 0)
        scores = SCORES[config.router](logits)
        chosen = choose(scores + w.get("selection_bias", 0), config.top_k, config.groups, config.top_groups)
        chosen = chosen if ids is None else w["table"][ids[slot]].astype(int)
        shares = scores[chosen] / scores[chosen].sum() if config.renormalize else scores[chosen]
        inner = token @ w["enter"]["weight"] if config.latent else token
        pairs = list(zip(config.scale * shares, chosen, strict=True))
        out = sum(
            expert(config, w, e, s * inner) if config.weigh_input else s * expert(config, w, e, inner) for s, e in pairs
        )
        y[slot] = out @ w["leave"]["weight"] if config.latent else out
        if config.shared_width:
            gate = reference.sigmoid(token @ w["shared_gate"]["weight"]) if config.shared_gate else 1
            y[slot] += gate * expert(config, w, None, token)
    return y


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_equals_the_reference_whole_and_in_steps(change):
    module = build(**change)
    expected = mixture(module.config, reference.weights(module), X)
    (y, auxiliary), (single, _) = jax.jit(lambda x: (module(x), module(x[:, 3:4])))(X)
    assert auxiliary.losses == {}
    assert auxiliary.choices.sum() == X[..., 0].size * module.config.top_k
    assert_close("call", y, expected, "float32")
    assert_close("one token", single, expected[:, 3:4], "float32")


def test_a_table_of_token_ids_chooses_experts_and_scores_are_weights():
    config = dataclasses.replace(CONFIG, router="sqrtsoftplus", renormalize=True, by_token=True)
    module = Experts(config, Stream(WIDTH, 1, jnp.float32, vocab=20), nnx.Rngs(0))
    table = np.asarray(module.table[...]).astype(int)
    assert table.shape == (20, 2)
    assert all(0 <= a < 8 and 0 <= b < 8 and a != b for a, b in table)
    ids = np.random.default_rng(1).integers(0, 20, X.shape[:2])
    context = Context(extras=Extras(ids=jnp.asarray(ids)))
    y, auxiliary = jax.jit(lambda x: module(x, context))(X)
    assert_close("call", y, mixture(config, reference.weights(module), X, ids), "float32")
    np.testing.assert_array_equal(auxiliary.choices, np.bincount(table[ids].ravel(), minlength=8))
    graph, parameters = nnx.split(module)
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(jnp.asarray(X), context)[0] ** 2).sum()))(parameters)
    gradient = nnx.to_pure_dict(gradient)
    assert not np.any(gradient.pop("table"))
    assert np.any(gradient["router"]["weight"])
    with rejects(InputError, "ids"):
        module(jnp.asarray(X))


def test_the_gradient_of_a_score_is_finite_at_any_logit():
    logits = jnp.array([[-1e4, -200.0, 0.0, 1e4]])
    gradient = jax.grad(lambda x: SCORES_OF_OPS["sqrtsoftplus"](x).sum())(logits)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("balance", ["batch", "sequence"])
def test_losses_are_weighted_and_do_not_count_padding(balance):
    module, bare = build(balance_weight=0.5, router_z_weight=0.25, balance=balance), build()
    mask = np.array([[True] * 9, [True] * 4 + [False] * 5])
    (y, auxiliary), (same, _) = jax.jit(
        lambda: (module(jnp.asarray(X), Context(Tokens(mask=jnp.asarray(mask)))), bare(jnp.asarray(X)))
    )()
    np.testing.assert_array_equal(y, same)
    losses, choices = auxiliary.losses, auxiliary.choices
    logits = X[mask].astype(np.float64) @ reference.weights(module)["router"]["weight"]
    scores = softmax(logits)
    chosen = np.array([np.isin(np.arange(8), choose(row, 2, 1, 1)) for row in scores])
    np.testing.assert_array_equal(choices, chosen.sum(0))
    # The mean over the tokens of the loss of their batch, or of their row.
    groups = [slice(0, 13)] if balance == "batch" else [slice(0, 9), slice(9, 13)]
    parts = [(chosen[i].mean(0) / 2 * scores[i].mean(0)).sum() * 8 for i in groups]
    expected = np.average(parts, weights=[len(scores[i]) for i in groups])
    assert float(losses["balance"]) == pytest.approx(0.5 * expected, rel=1e-5)
    assert float(losses["router_z"]) == pytest.approx(0.25 * (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rel=1e-5)
    assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, jnp.float32)


def test_bfloat16_routes_in_float32():
    module = build(jnp.bfloat16, renormalize=True)
    x = jnp.asarray(X, jnp.bfloat16)
    y, _ = jax.jit(lambda x: module(x))(x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    expected = mixture(module.config, reference.weights(module), np.asarray(x, np.float64))
    assert_close("experts", y.astype(jnp.float32), expected, "bfloat16")


def test_a_model_of_experts_adds_up_their_losses_and_has_gradients_scanned_or_not():
    layer = LayerConfig(
        mixer=None,
        mlp=dataclasses.replace(CONFIG, balance_weight=0.1),
        norm=NormConfig(kind="rms", eps=1e-6),
        norm_position="pre",
        remat="full",
    )
    tokens = np.random.default_rng(1).integers(0, 11, size=(2, 7))
    results = []
    for scan in (True, False):
        config = ModelConfig(11, WIDTH, "3x(moe)", {"moe": layer}, layer.norm, tied=True, dtype="float32", scan=scan)
        model = Functional(config)
        parameters = model.init(jax.random.key(0))
        if not scan:  # the same parameters, layer by layer
            stacked = results[0][2]["period"][0]
            parameters |= {"before": {i: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)}}
            parameters |= {name: results[0][2][name] for name in ("embedding", "norm")}

        def total(parameters, model=model):
            bound = model.bind(parameters)
            features, losses, *_ = bound.forward(jnp.asarray(tokens))
            return bound.logits(features).sum() + losses["balance"], losses["balance"]

        (value, balance), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(parameters)
        results.append((value, balance, parameters, gradient["embedding"]["tokens"]))
    (scanned, first, _, gradient), (unrolled, second, _, other) = results
    assert 0.3 <= float(first) < 0.3 * 4  # 3 layers; 8 experts, of which a token uses 2
    assert_close("loss", scanned, unrolled, "float32")
    assert_close("balance", first, second, "float32")
    assert_close("gradient", gradient, other, "float32")


def test_counts_what_serves_a_token():
    module = build(bias=True, shared_width=5, shared_gate=True)
    expert, shared, router = 3 * WIDTH * 10, 3 * WIDTH * 5, WIDTH * 8
    assert module.flops == 2 * (2 * expert + shared + router + WIDTH)
    outside = shared + router + 8 + WIDTH
    assert module.parameters == 8 * (expert + 10 + 10 + WIDTH) + outside
    assert module.active_parameters == 2 * (expert + 10 + 10 + WIDTH) + outside
    latent = build(latent=4, gated=False)
    assert latent.flops == 2 * (2 * 2 * 4 * 10 + 2 * WIDTH * 4 + WIDTH * 8)


def test_the_selection_bias_is_not_trained():
    module = build(router="sigmoid", selection_bias=True, balance_weight=1.0)
    graph, parameters = nnx.split(module)

    def total(parameters):
        y, auxiliary = nnx.merge(graph, parameters)(jnp.asarray(X))
        return (y**2).sum() + auxiliary.losses["balance"]

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(total))(parameters))
    assert not np.any(gradient.pop("selection_bias"))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_is_a_kind_of_feed_forward_part():
    section = {"kind": "experts", "experts": 4, "top_k": 2, "width": 8, "activation": "silu", "limit": 7.0}
    assert build_config(FeedForwardConfig, section) == ExpertsConfig(
        experts=4, top_k=2, width=8, activation="silu", limit=7.0
    )


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"groups": 4, "top_k": 3}, "top_k"),
        ({"groups": 3}, "experts"),
        ({"top_groups": 2}, "top_groups"),
        ({"router": "hash"}, "router"),
        ({"activation": "tanh"}, "activation"),
        ({"limit": 0.0}, "limit"),
        ({"limit": 7.0, "gated": False}, "limit"),
        ({"alpha": 1.7, "activation": "relu"}, "alpha"),
        ({"shared_gate": True}, "shared_gate"),
        ({"latent": 0}, "latent"),
        ({"balance_weight": -1.0}, "balance_weight"),
        ({"balance": "token"}, "balance"),
        ({"bias_rate": 0.1}, "bias_rate"),
        ({"by_token": True, "selection_bias": True}, "by_token"),
        ({"bias_rate": -0.1, "selection_bias": True}, "bias_rate"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)
