"""The contract of mixers: causality, steps that equal the call, caches, costs.

A mixer that is missing in `MIXED`, or a pattern of the library that is missing in `PATTERNS`, fails here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.layers import (
    MIXERS,
    AttentionConfig,
    BranchConfig,
    CompressedConfig,
    CompressionConfig,
    Context,
    ConvConfig,
    DeltaConfig,
    EntryIndexerConfig,
    IndexerConfig,
    LatentConfig,
    LightningConfig,
    LshConfig,
    Mamba2Config,
    MambaConfig,
    NormConfig,
    NsaConfig,
    ParallelConfig,
    RgLruConfig,
    RopeConfig,
    RopeScaling,
    RoutingConfig,
    Stream,
    Tokens,
)
from sparsejax.layers.mixers import make_mixer
from sparsejax.patterns import parse
from sparsejax.patterns.library import NAMES
from tests.layers import reference
from tests.patterns import definition
from tests.tolerances import assert_close

LENGTH, WIDTH, BATCH = 13, 6, 2

# Causal patterns of four heads, and the number of cache slots to decode LENGTH tokens, where it is easy to state.
PATTERNS = {
    "causal & window(3, 5)": 4,
    "causal & full & chunk(4)": 4,
    "causal & (window(4) | sink(3))": 3 + 4 + 1,
    "causal & (window(11) | globals([0, 5]))": None,  # the window is longer than the remaining slots
    "causal & (window(1) | globals([3, -1]))": None,
    "causal & (window(1) | dilated(2, stride=3))": 2 * 3 + 1,
    "causal & (window(3) | strided(4))": LENGTH,
    "causal & (chunk(4) | fixed(4, 1))": None,
    "causal & (window(1) | prefix(3))": None,
    "causal & (global_keys([2]) | global_queries([-1]) | window(2))": None,
    "causal & (window(1) | random(2, tile=3, seed=0, reach=3))": None,
    "causal & (window(1) | bigbird_random(2, tile=1, seed=0))": None,
    "causal & tiles([[0], [0, 1], [1, 2], [2, 3]], tile=4)": None,
    "causal & (window(0) | shift(window(3), 2))": 3 + 2 + 1,
    "causal & multiset(window(4), window(1), sink(2))": 2 + 4 + 1,
    "per_head(causal, window(2), causal & chunk(5), causal & (window(1) | sink(2)))": LENGTH,
}


def attention(pattern: str, impl: str = "auto") -> AttentionConfig:
    return AttentionConfig(
        pattern=pattern, heads=4, kv_heads=2, head_width=4, rope=RopeConfig(base=100.0), qk_norm=None, impl=impl
    )


# Options of attention, combined with each other and with ring caches.
OPTIONS = {
    "sinks, softcap, gate, biases": dataclasses.replace(
        attention("causal & (window(4) | sink(1))"),
        scale=0.4,
        softcap=1.5,
        sinks=True,
        gate=True,
        bias=True,
        out_bias=True,
        qk_norm=NormConfig(kind="rms", eps=1e-6),
    ),
    "alibi": dataclasses.replace(
        attention("per_head(causal, window(2), causal, causal)"), alibi=True, rope=None, sinks=True
    ),
    "relative": dataclasses.replace(attention("causal & window(5)"), relative=6, bias=True, rope=None),
    "rope": dataclasses.replace(
        attention("causal & window(7)"),
        head_width=8,
        rope=RopeConfig(
            base=50.0,
            fraction=0.75,
            interleaved=True,
            scaling=RopeScaling(kind="yarn", factor=4.0, original_length=6, fast=2.0, slow=0.5),
        ),
    ),
}
# A window as long as those of entries, so that no token lies between.
COMPRESSED = CompressedConfig(
    heads=4,
    head_width=4,
    query_rank=5,
    window=5,
    rope_width=2,
    rope=RopeConfig(base=50.0),
    groups=2,
    out_rank=3,
    norm_eps=1e-6,
    impl="auto",
    compression=CompressionConfig(ratio=5),
)
SELECTED = dataclasses.replace(
    COMPRESSED,
    compression=CompressionConfig(ratio=3, overlap=True, indexer=EntryIndexerConfig(heads=2, width=3, top_k=40)),
)
MIXED = {
    "parallel": {
        "parallel": ParallelConfig(
            branches={
                "attention": BranchConfig(mixer=attention("causal & window(4)"), scale_in=1.2, scale_out=0.9),
                "ssm": BranchConfig(mixer=MambaConfig(inner=8, state=3, conv=4, dt_rank=2, dt_min=1e-2, dt_max=0.5)),
            }
        )
    },
    "latent": {
        "latent": LatentConfig(
            pattern="causal & (window(5) | sink(2))",
            heads=2,
            query_rank=5,
            kv_rank=4,
            nope_width=3,
            rope_width=2,
            value_width=5,
            rope=RopeConfig(base=50.0),
            norm_eps=1e-6,
            impl="auto",
        ),
    },
    # A single chunk holds all tokens; test_lsh covers several chunks.
    "lsh": {"lsh": LshConfig(heads=2, head_width=3, chunk=40, buckets=(4,), hashes=2, causal=True, seed=0)},
    "lightning": {"lightning": LightningConfig(heads=3, head_width=4, chunk=16)},
    "compressed": {"compressed": COMPRESSED, "compressed and selected": SELECTED},
    "conv": {"conv": ConvConfig(conv=3, bias=True)},
    "mamba": {
        "mamba": MambaConfig(inner=8, state=3, conv=4, dt_rank=2, dt_min=1e-2, dt_max=0.5),
        "mamba with norms and biases": MambaConfig(
            inner=8, state=3, conv=4, dt_rank=2, dt_min=1e-2, dt_max=0.5, norm_eps=1e-6, bias=True, conv_bias=False
        ),
    },
    "mamba2": {
        "mamba2": Mamba2Config(
            heads=4,
            head_width=3,
            state=5,
            groups=2,
            conv=4,
            dt_min=1e-2,
            dt_max=0.5,
            norm_eps=1e-5,
            norm_groups=2,
            chunk=16,
        ),
        "mamba2 with everything": Mamba2Config(
            heads=4,
            head_width=2,
            state=3,
            groups=1,
            conv=3,
            dt_min=1e-2,
            dt_max=0.5,
            norm_eps=None,
            bias=True,
            out_bias=True,
            dt_floor=0.1,
            dt_ceiling=0.7,
            multipliers=(0.8, 1.1, 0.6, 1.3, 0.9),
        ),
        "mamba2 normed before the gate": Mamba2Config(
            heads=2,
            head_width=4,
            state=3,
            groups=2,
            conv=2,
            dt_min=1e-2,
            dt_max=0.5,
            norm_eps=1e-5,
            norm_before_gate=True,
            dt_ceiling=0.3,
        ),
    },
    "delta": {
        "delta": DeltaConfig(heads=4, key_heads=2, key_width=3, value_width=2, conv=4, norm_eps=1e-5, chunk=16),
        "delta by channel": DeltaConfig(
            heads=2,
            key_heads=2,
            key_width=4,
            value_width=3,
            conv=3,
            norm_eps=1e-5,
            channel_decay=True,
            rank=2,
            gate="sigmoid",
            dt_min=1e-2,
            dt_max=0.5,
            chunk=16,
        ),
    },
    # Every block is selected; test_nsa covers choices.
    "nsa": {
        "nsa": NsaConfig(
            heads=4,
            kv_heads=2,
            head_width=4,
            value_width=3,
            rope=RopeConfig(base=50.0),
            qk_norm=None,
            impl="auto",
            compress_length=6,
            compress_stride=3,
            select_block=6,
            count=40,
            window=5,
        )
    },
    "rglru": {"rglru": RgLruConfig(inner=8, heads=2, conv=4, power=0.2)},
    "routing": {
        "routing": RoutingConfig(heads=4, kv_heads=2, head_width=4, clusters=1, members=40, rope=RopeConfig(base=100.0))
    },
    "attention": {pattern: attention(pattern) for pattern in PATTERNS} | OPTIONS,
}
MIXED["latent"]["latent with an indexer"] = dataclasses.replace(
    MIXED["latent"]["latent"], pattern="causal", indexer=IndexerConfig(heads=2, width=4, top_k=40)
)
EVERY = pytest.mark.parametrize("config", [pytest.param(c, id=i) for kind in MIXED.values() for i, c in kind.items()])


def build(config) -> nnx.Module:
    return reference.fill(lambda: make_mixer(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)))


def make_x(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, length, WIDTH)).astype(np.float32)


def allowed(config, length: int) -> np.ndarray:
    """Whether output t may depend on input t', by the connectivity of the config; bool [t, t']."""
    mask = definition.mask(config.connectivity, length, length)
    seen = mask.any(axis=0) if mask.ndim == 3 else mask
    assert not (seen & ~np.tri(length, dtype=bool)).any()
    return seen


def decode(module: nnx.Module, x: np.ndarray, length: int) -> jax.Array:
    """Outputs of the steps over all positions."""

    def step(cache, token):
        y, cache, *_ = module.extend(token[0][:, None], cache, jnp.full(len(x), token[1]), length)
        return cache, y[:, 0]

    tokens = jnp.swapaxes(x, 0, 1), jnp.arange(x.shape[1])
    return jnp.swapaxes(jax.lax.scan(step, module.init_cache(len(x), length), tokens)[1], 0, 1)


def influence(module: nnx.Module, x: np.ndarray) -> jax.Array:
    """Whether the gradient of output t with respect to input t' is not exactly 0; bool [t, t']."""
    mix = np.random.default_rng(1).normal(size=x.shape[1:]).astype(np.float32)
    jacobian = jax.jacrev(lambda x: (module(x[None])[0] * mix).sum(-1))(x[0])
    return (jacobian != 0).any(-1) | jnp.isnan(jacobian).any()


def test_every_mixer_and_every_pattern_is_here():
    assert set(MIXED) == set(MIXERS)
    assert {name for name in NAMES if any(name in pattern for pattern in PATTERNS)} == set(NAMES)


@EVERY
def test_steps_equal_the_call_and_only_the_past_that_is_allowed_has_any_influence(config):
    length = LENGTH if isinstance(config, AttentionConfig) else 40  # more than a chunk of a scan
    module, x = build(config), make_x(length)
    y, steps, influences = jax.jit(lambda x: (module(x), decode(module, x, length), influence(module, x)))(x)
    assert_close("steps", steps, y, "float32")
    influences, expected = np.array(influences), allowed(config, length)
    if isinstance(config, LshConfig):  # the second token attends only to the first, with a weight of 1 up to rounding
        influences[1, 1] = expected[1, 1]
    np.testing.assert_array_equal(influences, expected)


def test_tiles_let_only_the_past_that_is_allowed_have_any_influence():
    config = attention("causal & (window(4) | globals([70, 3]) | chunk(16))", "gather")
    module, x = build(config), make_x(150)  # three tiles, the last of them partial
    np.testing.assert_array_equal(jax.jit(lambda x: influence(module, x))(x), allowed(config, 150))


def test_a_sequence_may_be_shorter_than_its_cache():
    config = attention("causal & (window(4) | sink(3))")
    module, x = build(config), make_x()[:, :9]
    steps = jax.jit(lambda x: decode(module, x, LENGTH))(x)
    assert_close("steps", steps, reference.attention(config, reference.weights(module), x), "float32")


@EVERY
def test_steps_keep_the_shapes_and_dtypes_of_the_cache(config):
    module = build(config)
    start = module.init_cache(BATCH, LENGTH)
    for size in (1, 5):
        chunk, positions = jnp.asarray(make_x()[:, :size]), jnp.zeros(BATCH, jnp.int32)
        _, end = jax.eval_shape(lambda *chunk: module.extend(chunk[0], start, chunk[1], LENGTH), chunk, positions)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), end) == jax.tree.map(lambda a: (a.shape, a.dtype), start)


def cache_bytes(config, length: int) -> int:
    cache = jax.eval_shape(lambda: build(config).init_cache(BATCH, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("pattern", "slots"),
    [
        *((pattern, slots) for pattern, slots in PATTERNS.items() if slots),
        ("causal", LENGTH),
        ("per_head(window(2), window(5), causal & chunk(5), window(0))", 6),
    ],
)
def test_an_attention_cache_has_as_many_slots_as_the_pattern_keeps_keys(pattern, slots):
    key_heads, head_width = 2, 4
    expected = 2 * 4 * BATCH * slots * key_heads * head_width  # keys and values
    assert cache_bytes(attention(pattern), LENGTH) == expected


def test_only_what_looks_back_forever_grows_with_the_length():
    assert cache_bytes(attention("causal"), 4000) == 1000 * cache_bytes(attention("causal"), 4)
    for config in (attention("causal & (window(4) | sink(3))"), MIXED["mamba"]["mamba"]):
        assert cache_bytes(config, 4000) == cache_bytes(config, LENGTH)
    conv, state = (4 - 1) * 8, 8 * 3
    assert cache_bytes(MIXED["mamba"]["mamba"], 4000) == 4 * BATCH * (conv + state)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cost_of_attention_is_counted_from_its_pairs(pattern):
    allowed = definition.mask(parse(pattern), LENGTH, LENGTH)
    pairs = int(np.broadcast_to(allowed, (4, LENGTH, LENGTH)).sum())
    cost = build(attention(pattern)).cost(LENGTH)
    assert cost.pairs == pairs
    # A pair is a dot product and a sum of 4 elements; the projections have 16, 8, 8 and 16 columns or rows.
    assert cost.flops == pytest.approx(2 * 2 * 4 * pairs / LENGTH + 2 * WIDTH * (16 + 8 + 8 + 16))


def test_the_cost_of_mamba_does_not_depend_on_the_length():
    module = build(MIXED["mamba"]["mamba"])
    linear = 2 * (WIDTH * 8 + WIDTH * 8 + 8 * (2 + 3 + 3) + 2 * 8 + 8 * WIDTH)
    assert [module.cost(length).pairs for length in (1, 1000)] == [0, 0]
    assert [module.cost(length).flops for length in (1, 1000)] == [linear + 8 * (2 * 4 + 7 * 3)] * 2


@pytest.mark.parametrize("config", [next(iter(configs.values())) for configs in MIXED.values()], ids=list(MIXED))
def test_padding_may_be_nan(config):
    module, x = build(config), make_x(20)
    mask = jnp.broadcast_to(jnp.arange(20) < 14, x.shape[:2])

    @jax.jit
    def differentiate(x):
        run = lambda x: jnp.where(mask[..., None], module(x, Context(Tokens(mask=mask))), 0)  # noqa: E731
        y, backward = jax.vjp(run, x)
        return y, backward(jnp.ones_like(y))[0]

    (y, gradient), expected = differentiate(jnp.where(mask[..., None], x, jnp.nan)), differentiate(jnp.asarray(x))
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(np.asarray(gradient)[mask], np.asarray(expected[1])[mask])
