"""Rematerialization: every policy computes the same, keeps what it says, and does not run attention twice."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import remat
from sparsejax.layers.remat import POLICIES, rematerialize
from sparsejax.model import Functional
from sparsejax.ops import attend, delta_rule, linear_scan, selective_scan, ssd
from tests.check import models
from tests.messages import rejects
from tests.tolerances import assert_close

LENGTH = 45
MLP = {"kind": "gated", "width": 24, "activation": "silu"}
LAYERS = {
    "attention": ("pinned", MLP),
    "experts": ("causal", models.EXPERTS),
    "latent": ("latent", None),
    "mamba2": ("mamba2", MLP),
    "indexed": ("indexed", None),
    "compressed": ("compressed", None),
    "delta": ("delta", MLP),
    "rglru": ("rglru", MLP),
    "edges": ("edges", MLP),
    "lsh": ("lsh", None),
    "parallel": ("parallel", MLP),
}


def build(kind: str, policy: str, scan: bool, repeats: int | None = None) -> ModelConfig:
    mixer, mlp = LAYERS[kind]
    repeats = repeats or 1 + scan
    return models.build(mixer, f"{repeats}x(mix)", {"mlp": mlp, "remat": policy}, scan=scan, allow_leaks=True)


def differentiate(config: ModelConfig, length: int = LENGTH):
    """The loss of random tokens and its gradient, as a function, and its argument."""
    model, tokens = Functional(config), np.random.default_rng(0).integers(0, config.vocab, (2, length))

    def loss(parameters):
        output = model.bind(parameters).forward(jnp.asarray(tokens, jnp.int32))
        logits = model.bind(parameters).logits(output.features)
        return -jax.nn.log_softmax(logits)[..., 3].mean() + sum(output.losses.values())

    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(jax.value_and_grad(loss), compiler_options=quickly), jax.jit(model.init)(jax.random.key(0))


def assert_policies_agree(kind: str, scan: bool) -> None:
    function, parameters = differentiate(build(kind, "none", scan))
    expected = function(parameters)
    for policy in POLICIES.keys() - {"none"}:
        actual = differentiate(build(kind, policy, scan))[0](parameters)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            scale = np.abs(b).max() or 1.0
            assert_close(policy, a / scale, b / scale, "float32")


@pytest.mark.parametrize(("kind", "scan"), [("attention", True), ("experts", False)])
def test_every_policy_has_the_same_loss_and_gradients(kind, scan):
    assert_policies_agree(kind, scan)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "scan"), [*itertools.product(LAYERS, (True, False))])
def test_every_policy_of_every_kind_of_layer_has_the_same_loss_and_gradients(kind, scan):
    assert_policies_agree(kind, scan)


def test_memory_decreases_with_what_is_kept():
    temporary = {}
    for policy in ("none", "dots", "attention", "full"):
        function, parameters = differentiate(build("attention", policy, scan=True, repeats=4), 256)
        temporary[policy] = function.lower(parameters).compile().memory_analysis().temp_size_in_bytes
    assert temporary["none"] > temporary["dots"] > temporary["attention"] > temporary["full"]


def count(function, arrays, primitive: str) -> dict[str, int]:
    """Number of equations of a primitive in the gradient of a function, by policy."""

    def count_in(jaxpr) -> int:
        inner = (x for equation in jaxpr.eqns for x in jax.tree.leaves(equation.params, is_leaf=is_jaxpr))
        here = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
        return here + sum(count_in(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))

    def is_jaxpr(x) -> bool:
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    def gradient(policy):
        # A product precedes and follows, so that the inputs are recomputed, and the output is read.
        run = rematerialize(lambda scale, *arrays: function(*(scale * x for x in arrays)) * scale, policy)
        return jax.grad(lambda scale: run(scale, *arrays).sum())

    return {policy: count_in(jax.make_jaxpr(gradient(policy))(1.0).jaxpr) for policy in POLICIES}


def draw(*shapes):
    generator = np.random.default_rng(1)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


QKV = (1, 300, 4, 8), (1, 300, 2, 8), (1, 300, 2, 8)


@pytest.mark.parametrize(
    ("impl", "primitive"), [("dense", "exp"), ("gather", "scan"), ("segment", "scan"), ("tpu", "pallas_call")]
)
def test_policies_that_keep_attention_do_not_run_it_twice(impl, primitive):
    run = functools.partial(attend, pattern="causal & window(40)", impl=impl, interpret=impl == "tpu")
    counts = count(run, draw(*QKV), primitive)
    assert counts["attention"] == counts["offload"] == counts["dots"]
    # The derivative of the plain softmax reads the probabilities; only their product with the values is not repeated.
    assert (counts["attention"] == counts["none"]) == (impl != "dense")
    assert counts["none"] < counts["full"]


ROWS, HEADS, WIDE, STATES = (1, 200), (1, 200, 2), (1, 200, 2, 4), (1, 200, 1, 3)
RECURRENCES = {
    "ssd": (lambda x, dt, A, B, C: ssd(x, dt**2, -(A**2), B, C)[0], (WIDE, HEADS, (2,), STATES, STATES)),
    "delta_rule": (lambda q, k, v, d, b: delta_rule(q, k, v, -(d**2), b)[0], (STATES, STATES, WIDE, HEADS, HEADS)),
    "linear_scan": (lambda x, d: linear_scan(x, -(d**2))[0], ((*ROWS, 4),) * 2),
    "selective_scan": (
        lambda x, dt, A, B, C: selective_scan(x, dt**2, -(A**2), B, C)[0],
        ((*ROWS, 4), (*ROWS, 4), (4, 3), (*ROWS, 3), (*ROWS, 3)),
    ),
}


@pytest.mark.parametrize(("run", "shapes"), RECURRENCES.values(), ids=RECURRENCES)
def test_policies_that_keep_states_do_not_run_a_recurrence_twice(run, shapes):
    counts = count(run, draw(*shapes), "scan")
    assert counts["attention"] == counts["offload"] == counts["dots"] == counts["none"] < counts["full"]


def test_an_unknown_policy_is_named():
    with rejects(InputError, "remat"):
        build("attention", "atention", scan=True)


def test_a_platform_without_host_memory_cannot_offload(monkeypatch):
    monkeypatch.setattr(remat, "has_host_memory", lambda: False)
    function, parameters = differentiate(build("attention", "offload", scan=True))
    with rejects(InputError, "remat"):
        function(parameters)
