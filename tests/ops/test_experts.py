"""Mixtures of experts against a loop over tokens and experts in float64; and the losses by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import experts as ops
from tests.tolerances import assert_close

EXPERTS, WIDTH, OUT = 6, 5, 7


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def choose(scores, top_k, groups, top_groups):
    """The experts of a token: the best groups, then the best experts in them, by sorting."""
    per_group = len(scores) // groups
    sums = [sum(sorted(scores[g * per_group : (g + 1) * per_group])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -sums[g])[:top_groups]
    allowed = [e for e in range(len(scores)) if e // per_group in kept]
    return sorted(allowed, key=lambda e: -scores[e])[:top_k]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True, "scale": 2.5},
        {"groups": 3, "top_groups": 2},
        {"groups": 6, "top_groups": 3, "renormalize": True},
        {"selection_bias": jnp.array([3.0, 0, -2, 0.5, 0, 0.1])},
    ],
    ids=["plain", "renormalized", "groups", "renormalized-groups", "bias"],
)
def test_route(kind, options):
    logits = np.random.default_rng(0).normal(size=(40, EXPERTS))
    weights, experts, scores = ops.route(jnp.asarray(logits, jnp.float32), 3, kind=kind, **options)
    expected = softmax(logits) if kind == "softmax" else 1 / (1 + np.exp(-logits))
    assert_close("scores", scores, expected, "float32")
    choice = expected + options.get("selection_bias", 0)
    for token in range(40):
        chosen = choose(choice[token], 3, options.get("groups", 1), options.get("top_groups", 1))
        np.testing.assert_array_equal(experts[token], chosen)
        wanted = expected[token, chosen]
        wanted = wanted / wanted.sum() if options.get("renormalize") else wanted
        assert_close("weights", weights[token], wanted * options.get("scale", 1), "float32")


def test_softmax_of_the_chosen_logits_is_the_renormalised_softmax_and_ties_go_to_the_first():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(9, EXPERTS)), jnp.float32)
    top, _ = jax.lax.top_k(logits, 2)
    assert_close("weights", ops.route(logits, 2, renormalize=True)[0], jax.nn.softmax(top), "float32")
    assert ops.route(jnp.zeros((1, EXPERTS)), 3)[1].tolist() == [[0, 1, 2]]


def test_the_selection_bias_gets_no_gradient_and_the_chosen_scores_do():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, EXPERTS)), jnp.float32)

    def total(logits, bias):
        return ops.route(logits, 2, kind="sigmoid", selection_bias=bias)[0].sum()

    d_logits, d_bias = jax.grad(total, argnums=(0, 1))(logits, jnp.ones(EXPERTS))
    assert not np.any(d_bias)
    assert (np.asarray(d_logits) != 0).sum(axis=1).tolist() == [2] * 4


def mix(impl, tile, x, weights, bias, gates, experts):
    layout = ops.sort_by_expert(experts, len(weights), tile)
    y = ops.add_bias(ops.multiply(ops.dispatch(x, layout), weights, layout, impl), bias, layout)
    return ops.combine(jnp.tanh(y), gates, layout)


def mix_densely(x, weights, bias, gates, experts):
    """Applies every expert to every token and weighs the chosen ones."""
    y = jnp.zeros((len(x), weights.shape[2]), x.dtype)
    for expert in range(len(weights)):
        gate = jnp.where(experts == expert, gates, 0).sum(axis=1, keepdims=True)
        y = y + gate * jnp.tanh(x @ weights[expert] + bias[expert])
    return y


def make_choices(tokens: int, top_k: int, how: str) -> np.ndarray:
    random = np.random.default_rng(tokens)
    if how == "one":  # all tokens choose the same experts
        return np.tile(np.arange(top_k) + EXPERTS - top_k, (tokens, 1))
    return np.stack([random.permutation(EXPERTS)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize("impl", ["loop", "ragged"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "tile", "how"),
    [(1, 1, 1, "random"), (1, 3, 4, "random"), (33, 2, 8, "random"), (33, 2, 1, "random"), (20, 2, 4, "one")],
)
def test_equals_the_dense_mixture_with_its_gradients(impl, tokens, top_k, tile, how):
    random = np.random.default_rng(0)
    experts = make_choices(tokens, top_k, how)
    shapes = (tokens, WIDTH), (EXPERTS, WIDTH, OUT), (EXPERTS, OUT), (tokens, top_k), (tokens, OUT)
    with jax.enable_x64(True):
        *inputs, d_y = (jnp.asarray(random.normal(size=shape)) for shape in shapes)

        def differentiate(function):
            y, vjp = jax.vjp(lambda *inputs: function(*inputs, jnp.asarray(experts)), *inputs)
            return y, *vjp(d_y)

        actual = jax.jit(lambda: differentiate(functools.partial(mix, impl, tile)))()
        expected = jax.jit(lambda: differentiate(mix_densely))()
    for name, a, b in zip(("y", "x", "weights", "bias", "gates"), actual, expected, strict=True):
        assert a.dtype == jnp.float64
        assert_close(name, a, b, "float64")


@pytest.mark.parametrize(("tokens", "top_k", "tile"), [(1, 1, 1), (1, 6, 8), (7, 3, 2), (40, 2, 16), (39, 5, 4)])
def test_every_choice_has_a_row_in_a_tile_of_its_expert(tokens, top_k, tile):
    sort = jax.jit(functools.partial(ops.sort_by_expert, count=EXPERTS, tile=tile))
    for how in ("random", "one"):
        experts = make_choices(tokens, top_k, how)
        layout = jax.tree.map(np.asarray, sort(jnp.asarray(experts)))
        assert layout.tile == tile
        assert len(np.unique(layout.rows)) == tokens * top_k
        np.testing.assert_array_equal(layout.choices[layout.rows].reshape(-1), np.arange(tokens * top_k))
        np.testing.assert_array_equal(layout.tile_experts[layout.rows // tile], experts)
        assert (layout.choices == tokens * top_k).sum() == len(layout.choices) - tokens * top_k
        assert layout.sizes.sum() <= len(layout.choices)


def test_gradients_of_weights_are_summed_in_float32():
    tokens, experts = 512, np.zeros((512, 1), int)
    x, weights = jnp.ones((tokens, 2), jnp.bfloat16), jnp.ones((1, 2, 3), jnp.bfloat16)
    layout = ops.sort_by_expert(jnp.asarray(experts), 1, 1)

    def total(weights):
        return ops.multiply(ops.dispatch(x, layout), weights, layout, "loop").astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(weights)  # 512 tiles of one row: bfloat16 sums of ones would stop at 256
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), 512)


def balance(scores, experts, mask=None):
    return ops.balance_loss(scores, ops.count_choices(experts, EXPERTS, mask), mask)


def test_the_balance_loss_is_1_in_balance_and_e_over_k_if_all_choose_alike():
    even = jnp.asarray([[0, 1], [2, 3], [4, 5]])
    flat = jnp.full((3, EXPERTS), 0.3)  # sigmoid scores need not sum to 1
    assert float(balance(flat, even)) == pytest.approx(1)
    sharp = jnp.asarray([[0.5, 0.5, 0, 0, 0, 0]] * 3)
    assert float(balance(sharp, jnp.asarray([[0, 1]] * 3))) == pytest.approx(EXPERTS / 2)


def test_losses_leave_out_padding():
    random = np.random.default_rng(0)
    logits, experts = random.normal(size=(5, EXPERTS)), make_choices(5, 2, "random")
    mask = np.array([True, False, True, True, False])
    scores = softmax(logits)[mask]
    fractions = np.array([(experts[mask] == e).mean() for e in range(EXPERTS)])
    z = jax.jit(ops.router_z_loss)
    loss = jax.jit(balance)(jnp.asarray(softmax(logits), jnp.float32), jnp.asarray(experts), jnp.asarray(mask))
    assert float(loss) == pytest.approx(EXPERTS * (fractions * scores.mean(0)).sum(), rel=1e-5)
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    wide = jnp.asarray(logits, jnp.float32)
    assert float(z(wide)) == pytest.approx(squares.mean(), rel=1e-5)
    assert float(z(wide, jnp.asarray(mask))) == pytest.approx(squares[mask].mean(), rel=1e-5)
    empty = jnp.zeros(5, bool)
    assert float(z(wide, empty)) == 0
    assert float(balance(jnp.ones((5, EXPERTS)), jnp.asarray(experts), empty)) == 0


def test_the_parts_of_a_balance_loss_add_up_with_the_choices_of_the_whole():
    random = np.random.default_rng(1)
    scores, experts = jnp.asarray(random.random((6, EXPERTS)), jnp.float32), jnp.asarray(make_choices(6, 2, "random"))
    choices = ops.count_choices(experts, EXPERTS)
    parts = [ops.balance_loss(scores[i], choices) for i in (slice(0, 2), slice(2, 6))]
    assert 2 / 6 * parts[0] + 4 / 6 * parts[1] == pytest.approx(float(ops.balance_loss(scores, choices)), rel=1e-6)
    alone = [ops.balance_loss(scores[i], ops.count_choices(experts[i], EXPERTS)) for i in (slice(0, 2), slice(2, 6))]
    assert not np.allclose(alone, parts, rtol=1e-3)


def test_the_selection_bias_moves_against_the_load_error():
    choices = jnp.asarray([[4, 2, 0, 2, 2, 2], [3, 3, 3, 3, 3, 3]])
    moved = ops.update_selection_bias(jnp.ones((2, EXPERTS)), choices, 0.25)
    np.testing.assert_array_equal(moved, [[0.75, 1, 1.25, 1, 1, 1], [1] * 6])


def test_the_selection_bias_balances_the_loads():
    random = np.random.default_rng(2)
    logits = jnp.asarray(random.normal(size=(500, EXPERTS)) + np.linspace(0, 2, EXPERTS), jnp.float32)

    def step(bias, _):
        _, experts, _ = ops.route(logits, 2, kind="sigmoid", selection_bias=bias)
        choices = ops.count_choices(experts, EXPERTS)
        return ops.update_selection_bias(bias, choices, 0.01), choices.max() / choices.mean()

    _, loads = jax.lax.scan(step, jnp.zeros(EXPERTS), length=100)
    assert loads[0] > 1.8
    assert loads[-20:].max() < 1.1
