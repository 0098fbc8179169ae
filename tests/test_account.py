"""Accounts, compared with numbers by hand and with the FLOPs that XLA counts in the compiled program."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax.account import Account, account_model, account_pattern
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import (
    Attention,
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    Mamba,
    MambaConfig,
    Mlp,
    MlpConfig,
    NormConfig,
    Stream,
)
from sparsejax.model import Functional
from sparsejax.patterns import parse
from tests.messages import rejects

pytestmark = pytest.mark.quick

LENGTH, WIDTH = 256, 256
NORM = NormConfig(kind="rms", eps=1e-6)
MLP = MlpConfig(kind="gated", width=512, activation="silu")


def attention(pattern):
    return AttentionConfig(pattern=pattern, heads=2, kv_heads=1, head_width=128, rope=None, qk_norm=None, impl="dense")


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def build(kind, config):
    return kind(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0))


def test_a_window_of_4096_over_131072_tokens():
    n = 131_072
    window, dense = account_pattern(parse("causal & window(4095)"), n), account_pattern(parse("causal"), n)
    assert window.pairs == 4096 * n - 4096 * 4095 // 2 == 528_484_352
    assert dense.pairs == n * (n + 1) // 2 == 8_590_000_128
    assert dense.pairs / window.pairs == pytest.approx(16.25, abs=0.005)
    # The factor of 32 that is often quoted counts all keys, including later ones, per key of the window.
    assert n * n / window.pairs == pytest.approx(32.5, abs=0.05)


def test_the_account_of_a_pattern():
    account = account_pattern(parse("causal & window(127)"), 1024, heads=8, kv_heads=2, head_width=32)
    pairs = 8 * (128 * 1024 - 128 * 127 // 2)
    assert (account.pairs, account.score_bytes) == (pairs, 4 * pairs)
    assert account.sequence_flops == 4 * 32 * pairs
    assert account.training_flops * 1024 == 3 * 4 * 32 * pairs
    assert account.cache_bytes == 2 * 4 * 128 * 2 * 32  # keys and values of 128 positions
    assert (account.live_tiles, account.tiles) == (8 * 15, 8 * 64)
    each = account_pattern(parse("per_head(causal, causal & window(0))"), 1024, heads=2)
    assert (each.pairs, each.live_tiles, each.tiles) == (1024 * 1025 // 2 + 1024, 36 + 8, 2 * 64)


def test_accounts_of_one_length_add_up():
    small, large = Account(8, 1, 2, 3, 4.0, 5, 6, 7), Account(8, 10, 20, 30, 40.0, 50, 60, 70)
    assert small + large == Account(8, 11, 22, 33, 44.0, 55, 66, 77)
    with rejects(InputError, "length"):
        Account(8) + Account(9)


def test_xla_counts_the_flops_of_dense_attention():
    module = build(Attention, attention("full"))
    actual = xla_flops(module, jnp.zeros((1, LENGTH, WIDTH)))
    assert actual == pytest.approx(LENGTH * module.cost(LENGTH).flops, rel=0.05)


def test_xla_counts_the_flops_of_an_mlp():
    module = build(Mlp, MLP)
    assert xla_flops(module, jnp.zeros((1, LENGTH, WIDTH))) == pytest.approx(LENGTH * module.flops, rel=0.05)


@pytest.fixture
def model():
    layers = {
        name: LayerConfig(mixer=attention(text), mlp=MLP, norm=NORM, norm_position="pre", remat="none")
        for name, text in PATTERNS.items()
    }
    return ModelConfig(512, WIDTH, "2x(local) full", layers, NORM, tied=True, dtype="float32", scan=False)


PATTERNS = {"local": "causal & window(31)", "full": "causal"}


def test_xla_counts_the_flops_of_a_model_forward_and_in_training(model):
    functions, tokens = Functional(model), jnp.zeros((1, LENGTH), jnp.int32)
    layers, outside = account_model(model, LENGTH)
    total = sum(layers, outside)
    # The dense implementation also computes masked pairs: 4 FLOPs per feature of a head.
    hidden = 4 * 128 * (3 * 2 * LENGTH**2 - total.pairs)
    expected = total.sequence_flops + hidden
    assert xla_flops(lambda p: functions.bind(p)(tokens), functions.shapes) == pytest.approx(expected, rel=0.05)
    loss = jax.grad(lambda p: functions.bind(p)(tokens).mean())
    assert xla_flops(loss, functions.shapes) == pytest.approx(3 * expected, rel=0.05)


def test_xla_counts_the_body_of_a_scan_once():
    module = build(Mamba, MambaConfig(inner=256, state=16, conv=4, dt_rank=16, dt_min=1e-3, dt_max=0.1))
    chunk, many = (xla_flops(module, jnp.zeros((1, n, WIDTH))) for n in (512, 1024))
    # XLA therefore misses the recurrence, a loop over chunks and their tokens, for all tokens but the first. The rest
    # of the account is the projections, which XLA counts at every length.
    linear = sum(part.flops for part in (module.input, module.gate, module.select, module.dt, module.out))
    assert many - chunk == pytest.approx(512 * linear, rel=0.1)
    assert many < 1024 * module.cost(1024).flops


def test_the_parameters_are_those_that_the_model_has():
    experts = ExpertsConfig(experts=4, top_k=1, width=64, activation="silu", shared_width=32)
    layers = {
        "local": LayerConfig(
            mixer=attention("causal & window(31)"), mlp=MLP, norm=NORM, norm_position="pre", remat="none"
        ),
        "routed": LayerConfig(mixer=attention("causal"), mlp=experts, norm=NORM, norm_position="pre", remat="none"),
    }
    config = ModelConfig(512, WIDTH, "3x(local routed) local", layers, NORM, tied=False, dtype="float32", scan=True)
    rows, outside = account_model(config, LENGTH)
    total = sum(rows, outside)
    assert total.parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(Functional(config).shapes))
    assert total.parameters - total.active_parameters == 3 * 3 * 3 * WIDTH * 64  # layers, experts, gate and up and down
    assert [row.parameters == row.active_parameters for row in rows] == [True, False] * 3 + [True]
    assert outside.active_parameters == outside.parameters == 2 * 512 * WIDTH + WIDTH


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_caches_are_in_the_dtype_of_the_model_and_states_in_float32(dtype, size):
    mamba = MambaConfig(inner=64, state=16, conv=4, dt_rank=4, dt_min=1e-3, dt_max=0.1)
    mixers = {"local": attention("causal & window(31)"), "full": attention("causal"), "ssm": mamba}
    layers = {
        name: LayerConfig(mixer=mixer, mlp=None, norm=NORM, norm_position="pre", remat="none")
        for name, mixer in mixers.items()
    }
    config = ModelConfig(512, WIDTH, "local full ssm", layers, NORM, tied=True, dtype=dtype, scan=True)
    actual = [row.cache_bytes for row in account_model(config, LENGTH)[0]]
    assert actual == [2 * 32 * 128 * size, 2 * LENGTH * 128 * size, 64 * (3 * size + 16 * 4)]
