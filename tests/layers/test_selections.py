"""What mixers say they select, against what they read by their Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.layers import Context, Stream, Tokens
from sparsejax.layers.mixers import make_mixer
from sparsejax.model import Functional
from tests.check.models import ATTENTION, BLOCK, MIXERS, NORM, SIDE, VARIANTS, build
from tests.layers import reference

LENGTH, WIDTH = 29, 16
PACKED = np.array([[0] * LENGTH, [0] * 3 + [1] * 7 + [2] * 19])
ROUTING = MIXERS["routing"]
SELECTING = {
    "tokens": ATTENTION | {"pattern": "causal & window(11)", "select": {"kind": "tokens", "count": 3}},
    "moba": ATTENTION | {"pattern": "causal", "select": {"kind": "moba", "count": 2, "block": 5}},
    "infllm": ATTENTION
    | {"pattern": "causal", "kv_heads": 2}
    | {"select": {"kind": "infllm", "count": 2, "block": 4, "window": 4, "stride": 2, "dense_below": 9}},
    "tiles": MIXERS["tiles"],
    "indexed": MIXERS["indexed"] | {"indexer": MIXERS["indexed"]["indexer"] | {"top_k": 2, "block": 5}},
    "pooled": MIXERS["pooled"],
    "selected": MIXERS["selected"],
    "routing": ROUTING,
    "balanced": ROUTING | {"balanced": True, "members": 5, "kv_heads": 2},
    "bidirectional": ROUTING | {"balanced": True, "causal": False, "members": 5},
    "shared": ROUTING | {"shared": True, "kv_heads": 2},
    "shared, balanced": ROUTING | {"shared": True, "kv_heads": 2, "balanced": True, "members": 5},
    "nsa": MIXERS["nsa"]
    | {"count": 3, "select_block": 4, "compress_length": 4, "compress_stride": 2, "compress": "mean"},
    "lsh": VARIANTS["lsh"] | {"chunk": 4},
    "strict lsh": MIXERS["strict lsh"] | {"chunk": 2},
    "compressed": MIXERS["compressed"]
    | {"compression": {"ratio": 4, "overlap": True, "indexer": {"heads": 2, "width": 8, "top_k": 2}}, "window": 3},
    "disjoint": MIXERS["compressed"]
    | {"compression": {"ratio": 3, "indexer": {"heads": 2, "width": 8, "top_k": 2}}, "window": 2},
}


def make(section):
    """The mixer with random parameters; of NSA only the branch that selects has values."""
    config = build(section, allow_leaks=True, causal=section.get("causal", True)).layers["mix"].mixer
    mixer = reference.fill(lambda: make_mixer(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)))
    if section["kind"] == "nsa":
        for branch in ("compress", "window"):
            mixer.values[branch].weight[...] = jnp.zeros_like(mixer.values[branch].weight[...])
    return mixer


def read_inputs(mixer, x, context):
    """Whether each output depends on each input, booleans [b, t, t], without gradients through the selection."""
    direction = np.random.default_rng(1).normal(size=x.shape[-1]).astype(np.float32)

    @jax.jit
    @jax.vmap
    def differentiate(t):
        return jax.grad(lambda x: (mixer(x, context) @ direction)[:, t].sum())(x)

    return np.abs(np.asarray(differentiate(jnp.arange(x.shape[1])))).max(axis=-1).swapaxes(0, 1) > 0


@pytest.mark.parametrize("name", SELECTING)
def test_the_selection_is_what_a_query_reads(name):
    """Of a token itself the Jacobian says nothing: a query reads its own input whatever it attends to."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    mixer = make(SELECTING[name])
    context = Context(Tokens(segments=jnp.asarray(PACKED)))

    (selection,) = jax.jit(mixer.selections)(x, context).values()
    mask, forced = np.asarray(selection.mask), np.asarray(selection.forced_mask)
    at = np.arange(LENGTH)
    allowed = mixer.config.connectivity.dense(LENGTH) & (PACKED[:, :, None] == PACKED[:, None])
    expected = read_inputs(mixer, x, context)
    chosen = (mask & allowed[:, None]).any(axis=1)
    if SELECTING[name]["kind"] == "compressed":
        window = (at[:, None] - at < mixer.config.window) & allowed
        chosen, expected = chosen | window, expected | window
    others = ~np.eye(LENGTH, dtype=bool)
    np.testing.assert_array_equal(chosen & others, expected & others)
    assert not (forced & ~mask).any()
    assert (chosen.sum() < allowed.sum()) or name == "bidirectional"


@pytest.mark.parametrize("name", ["moba", "infllm", "indexed", "pooled", "nsa"])
def test_forced_blocks(name):
    """The block of a query, and the first one; of pooled keys the block that is not whole yet."""
    mixer, x = make(SELECTING[name]), np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
    (selection,) = jax.jit(mixer.selections)(x).values()
    size, forced = selection.blocks.size, np.asarray(selection.forced_mask)[0]
    t, block = np.arange(LENGTH), np.arange(LENGTH) // size
    expected = block == block[:, None]
    if name == "pooled":
        expected &= ((t + 1) % size > 0)[:, None]
    elif name in ("infllm", "nsa"):
        local = 2 if name == "nsa" else 1
        expected = (block == 0) | ((block > block[:, None] - local) & (block <= block[:, None]))
        if name == "infllm":
            expected |= (t < 9)[:, None]
    causal = np.tri(LENGTH, dtype=bool)
    for scope in forced:
        np.testing.assert_array_equal(scope & causal, expected & causal)


def test_layers_return_selections_by_section():
    """Branches, shared blocks, shared selections, and layers without a selection."""
    select = {"kind": "moba", "count": 2, "block": 4}
    indexer = MIXERS["selected"]["indexer"]
    section = {"mlp": None, "norm": NORM, "norm_position": "pre", "remat": "none"}
    parallel = {
        "kind": "parallel",
        "branches": {"far": {"mixer": SELECTING["moba"]}, "ssm": {"mixer": MIXERS["mamba"]}},
    }
    config = build(
        "causal",
        "mix selected again parallel shared",
        layers={
            "mix": section | {"mixer": MIXERS["window"]},
            "selected": section | {"mixer": MIXERS["selected"]},
            "again": section | {"mixer": MIXERS["selected"] | {"indexer": indexer | {"shared": True}}},
            "parallel": section | {"mixer": parallel},
            "shared": section | {"mixer": MIXERS["mamba"], "side": SIDE},
        },
        shared={"block": BLOCK | {"mixer": BLOCK["mixer"] | {"select": select}}},
    )
    model = Functional(config)
    bound = model.bind(jax.jit(model.init)(jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (1, LENGTH)))
    layers = jax.jit(lambda tokens: bound.selections(tokens))(tokens)
    assert [list(layer) for layer in layers] == [[], ["mixer"], ["mixer"], ["mixer.branches.far.mixer"], ["side"]]
    np.testing.assert_array_equal(layers[1]["mixer"].groups, layers[2]["mixer"].groups)
