"""Attention to the keys of an indexer, and the loss of the indexer, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.check import check_model
from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.layers import Attention, AttentionConfig, Context, IndexerConfig, NormConfig, RopeConfig, Stream, Tokens
from sparsejax.layers.mixers import make_mixer
from sparsejax.model import Functional
from tests.check.models import ATTENTION, MIXERS, NORM, build
from tests.layers import reference
from tests.layers.properties import (
    assert_chunks_equal_whole,
    assert_later_tokens_change_nothing,
    assert_only_the_indexer_learns,
)
from tests.messages import rejects
from tests.tolerances import assert_close

WIDTH, LENGTH = 10, 37
RMS = NormConfig(kind="rms", eps=1e-6)
INDEXERS = {
    "DeepSeek": IndexerConfig(heads=3, width=6, top_k=5),
    "MiniMax": IndexerConfig(
        heads=2, width=6, top_k=3, block=4, scope="kv_head", local=1, weights=False, relu=False, norm=RMS
    ),
    "Qwen": IndexerConfig(heads=3, width=6, top_k=2, block=5, pool="keys", weights=False, norm=RMS),
    "blocks": IndexerConfig(heads=2, width=4, top_k=4, block=3, interleaved=True),
}
EVERY = pytest.mark.parametrize("name", INDEXERS)
PACKED = np.array([[0] * 8 + [1] * 29, [0] * 20 + [1] * 1 + [2] * 16])


def configure(name, **changes):
    indexer = dataclasses.replace(INDEXERS[name], **changes)
    return AttentionConfig(
        pattern="causal",
        heads=4,
        kv_heads=2,
        head_width=8,
        rope=RopeConfig(base=100.0, fraction=0.5),
        qk_norm=None,
        impl="dense",
        indexer=indexer,
    )


def make(config):
    return reference.fill(lambda: Attention(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


def rotate_heads(x, rope, interleaved=False):
    """Rotates the first 4 features of x [t, h, d]."""
    rope = dataclasses.replace(rope, fraction=4 / x.shape[-1], interleaved=interleaved)
    return reference.rotate(x[None], rope)[0]


def index_of(config, w, x):
    """Scores of keys [heads or 1, t, t], or of blocks [1, t, n], of one document x [t, m]."""
    indexer, t = config.indexer, len(x)
    norm = indexer.norm or NormConfig(kind="layer", eps=indexer.norm_eps)
    q = reference.linear(w["queries"], x).reshape(t, indexer.heads, -1)
    q = q if indexer.norm is None else reference.norm(norm, w["query_norm"], q)
    q, k = rotate_heads(q, config.rope, indexer.interleaved), reference.linear(w["keys"], x)
    if indexer.pool == "keys":
        blocks = [k[at : at + indexer.block] for at in range(0, t, indexer.block)]
        k = np.repeat([block.mean(axis=0) for block in blocks], [len(block) for block in blocks], axis=0)
    k = rotate_heads(reference.norm(norm, w["key_norm"], k)[:, None], config.rope, indexer.interleaved)[:, 0]
    k = k[:: indexer.block] if indexer.pool == "keys" else k  # rotated by the first position of the block
    products = np.einsum("thd,sd->hts", q, k) / np.sqrt(indexer.width)
    products = np.maximum(products, 0) if indexer.relu else products
    if indexer.weights:
        products = products * reference.linear(w["weights"], x).T[..., None] / np.sqrt(indexer.heads)
    return products if indexer.scope == "kv_head" else products.sum(axis=0, keepdims=True)


def select_of(indexer, scores):
    """Mask of the selected keys [scopes, t, t] by loops."""
    t, size = scores.shape[1], indexer.block
    chosen = np.zeros((len(scores), t, t), bool)
    for scope, query in np.ndindex(len(scores), t):
        current, rank = query // size, {}
        for block in range(current + 1):
            keys = range(block * size, min((block + 1) * size, query + 1))
            if indexer.pool == "keys":
                whole = (block + 1) * size <= query + 1
                rank[block] = scores[scope, query, block] if whole else None
            else:
                rank[block] = np.inf if block > current - indexer.local else max(scores[scope, query, keys])
        tail = [block for block, score in rank.items() if score is None]
        best = sorted(set(rank) - set(tail), key=lambda block: (-rank[block], block))[: indexer.top_k]
        for block in best + tail:
            chosen[scope, query, block * size : query + 1] |= np.arange(block * size, query + 1) < (block + 1) * size
    return chosen


def run_reference(config, w, x, dense=False):
    """Output, and divergence per query, of one document x [t, m]."""
    t, h, g = len(x), config.heads, config.kv_heads
    q, k, v = (reference.linear(w[name], x).reshape(t, -1, config.head_width) for name in ("query", "key", "value"))
    q, k = (reference.rotate(heads[None], config.rope)[0] for heads in (q, k))
    scores = index_of(config, w["indexer"], x)
    causal = np.tri(t, dtype=bool)
    chosen = causal[None] if dense else select_of(config.indexer, scores) & causal
    y, mass = np.zeros((t, h, config.head_width)), np.zeros((h, t, t))
    for head in range(h):
        mask = chosen[head // (h // len(chosen))]
        logits = np.where(mask, q[:, head] @ k[:, head // (h // g)].T * config.head_width**-0.5, -np.inf)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mass[head] = p / p.sum(axis=-1, keepdims=True)
        y[:, head] = mass[head] @ v[:, head // (h // g)]
    return reference.linear(w["out"], y.reshape(t, -1)), diverge(config.indexer, scores, chosen, mass)


def diverge(indexer, scores, chosen, mass):
    """Divergence per query, from attention probabilities [h, t, t] over the chosen keys."""
    t = len(mass[0])
    teacher, compared = mass.reshape(len(scores), -1, t, t).mean(axis=1), chosen
    if indexer.pool == "keys":
        blocks = [range(at, at + indexer.block) for at in range(0, t, indexer.block)]
        at = np.arange(t)
        whole = np.stack([at >= block[-1] for block in blocks], axis=1)
        compared = np.stack([chosen[:, :, block[0]] for block in blocks], axis=2) & whole
        teacher = np.stack([teacher[:, :, list(block)[: t - block[0]]].sum(axis=2) for block in blocks], axis=2)
        teacher = np.where(compared, teacher, 0)
        teacher /= np.maximum(teacher.sum(axis=-1, keepdims=True), 1e-300)
    student = np.where(compared, scores, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = student.max(axis=-1, keepdims=True)
        student = student - top - np.log(np.exp(student - top).sum(-1, keepdims=True))
        return np.where(teacher > 0, teacher * (np.log(teacher) - student), 0).sum(-1).mean(0)


def by_document(config, w, x, segments, dense=False):
    """As `run_reference` for rows of packed documents."""
    rows = []
    for row, ids in zip(x, segments, strict=True):
        parts = [run_reference(config, w, row[ids == name].astype(np.float64), dense) for name in np.unique(ids)]
        rows.append([np.concatenate(part) for part in zip(*parts, strict=True)])
    return [np.stack(part) for part in zip(*rows, strict=True)]


@EVERY
@pytest.mark.parametrize("segments", [np.zeros((2, LENGTH), int), PACKED], ids=["whole", "packed"])
def test_the_output_and_the_loss(name, segments, x):
    config = configure(name, loss_weight=0.5)
    mixer = make(config)
    expected, kl = by_document(config, reference.weights(mixer), x, segments)
    y, auxiliary = jax.jit(lambda x: mixer.mix(x, Context(Tokens(segments=jnp.asarray(segments)))))(x)
    assert_close("out", y, expected, "float32")
    assert_close("loss", auxiliary.losses["indexer"], 0.5 * kl.mean(), "float32")
    metrics = jax.jit(lambda x: mixer.measure(x, Context(Tokens(segments=jnp.asarray(segments)))))(x)
    assert_close("kl", metrics["kl"], kl.mean(), "float32")
    assert 0 < float(metrics["mass"]) < 1


@EVERY
@pytest.mark.parametrize("segments", [np.zeros((2, LENGTH), int), PACKED], ids=["whole", "packed"])
def test_the_loss_of_the_warm_up(name, segments, x):
    config = configure(name, loss_weight=2.0, dense=True)
    mixer = make(config)
    expected, kl = by_document(config, reference.weights(mixer), x, segments, dense=True)
    y, auxiliary = jax.jit(lambda x: mixer.mix(x, Context(Tokens(segments=jnp.asarray(segments)))))(x)
    assert_close("out", y, expected, "float32")
    assert_close("loss", auxiliary.losses["indexer"], 2 * kl.mean(), "float32")


@EVERY
@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_trains_the_indexer_and_nothing_else(name, dense, x):
    config = configure(name, loss_weight=1.0, dense=dense)
    assert_only_the_indexer_learns(make(config), x)


@EVERY
def test_the_gradient_of_the_loss_by_differences(name, x):
    """Along a random direction; the selection does not change."""
    config = configure(name, loss_weight=1.0)
    mixer = make(config)
    graph, parameters = nnx.split(mixer)
    random = np.random.default_rng(3)
    gradient = jax.jit(jax.grad(lambda p: nnx.merge(graph, p).mix(jnp.asarray(x))[1].losses["indexer"]))(parameters)
    gradient, w = nnx.to_pure_dict(gradient)["indexer"], reference.weights(mixer)
    direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), w["indexer"])

    def loss(step):
        moved = w | {"indexer": jax.tree.map(lambda a, b: a + step * b, w["indexer"], direction)}
        return by_document(config, moved, x, np.zeros((2, LENGTH), int))[1].mean()

    step = 1e-7
    expected = (loss(step) - loss(-step)) / (2 * step)
    products = jax.tree.map(lambda a, b: float((np.asarray(a) * b).sum()), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-3)


@EVERY
def test_chunks_of_ragged_rows_equal_the_whole(name, x):
    chunks = (17, (17, 9)), (4, (4, 4)), (1, (1, 1)), (7, (7, 3)), (1, (1, 1))
    assert_chunks_equal_whole(make(configure(name)), x, chunks)


@EVERY
def test_later_tokens_change_nothing(name, x):
    assert_later_tokens_change_nothing(make(configure(name)), x, (1, 16, 30, LENGTH - 1))


@EVERY
def test_enough_blocks_give_dense_attention(name, x):
    mixer = make(configure(name, top_k=LENGTH))
    dense = make(configure(name, top_k=LENGTH))
    dense.config, dense.indexer = dataclasses.replace(dense.config, indexer=None), None
    np.testing.assert_array_equal(jax.jit(lambda x: mixer(x))(x), jax.jit(lambda x: dense(x))(x))


@EVERY
def test_the_account(name):
    config, t = configure(name), np.arange(LENGTH)
    indexer, mixer = config.indexer, make(config)
    kept = select_of(indexer, np.random.default_rng(0).normal(size=(1, LENGTH, LENGTH))) & np.tri(LENGTH, dtype=bool)
    scored = int(((t + 1) // indexer.block if indexer.pool == "keys" else t + 1).sum())
    pairs, index_pairs = mixer.cost(LENGTH).pairs, mixer.cost(LENGTH).index_pairs
    assert index_pairs == indexer.heads * scored
    # Without forced blocks that of the query may be left out, and the bound is a whole block instead.
    assert pairs == 4 * kept[0].sum() if indexer.block == 1 or indexer.local or indexer.pool == "keys" else True
    assert pairs >= 4 * kept[0].sum()
    cache = mixer.init_cache(1, LENGTH)["index"]
    slots = -(-LENGTH // indexer.block) if indexer.pool == "keys" else LENGTH
    assert cache.shape == (1, slots, indexer.width)


@EVERY
def test_the_account_of_the_loss(name):
    sparse = make(configure(name, loss_weight=1.0)).cost(LENGTH)
    dense = make(configure(name, loss_weight=1.0, dense=True)).cost(LENGTH)
    plain, indexer, t = make(configure(name)).cost(LENGTH), INDEXERS[name], np.arange(LENGTH)
    pooled = indexer.pool == "keys"
    scored = (t + 1) // indexer.block if pooled else t + 1
    keys = sparse.pairs // 4
    compared = int(np.minimum(scored, indexer.top_k).sum()) if pooled else keys
    assert sparse.flops == plain.flops
    scores = 2 * (4 * 8 * keys + 3 * indexer.heads * indexer.width * compared)
    assert sparse.loss_flops * LENGTH == pytest.approx(scores)
    assert dense.pairs == 4 * LENGTH * (LENGTH + 1) // 2
    linear = 2 * WIDTH * (indexer.heads * indexer.width + indexer.width + indexer.heads * indexer.weights)
    scores = 4 * 8 * LENGTH * (LENGTH + 1) + 2 * 3 * indexer.heads * indexer.width * int(scored.sum())
    assert dense.loss_flops * LENGTH == pytest.approx(scores + 3 * LENGTH * linear)


# Shared selections

SHARED = MIXERS["selected"] | {"indexer": MIXERS["selected"]["indexer"] | {"shared": True}}


def with_shared(schedule, **changes):
    """A model whose layer `mix` selects, and whose layer `again` reuses the selection."""
    section = {"mixer": SHARED | changes, "mlp": None, "norm": NORM, "norm_position": "pre", "remat": "full"}
    selecting = section | {"mixer": MIXERS["selected"]}
    return build("selected", schedule=schedule, layers={"mix": selecting, "again": section})


@pytest.mark.parametrize("schedule", ["2x(mix again again)", "mix 3x(again mix)", "mix 4x(again)"])
def test_layers_reuse_the_last_selection(schedule):
    model = Functional(with_shared(schedule))
    parameters = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape) * 0.4, leaf.dtype),
        model.shapes,
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 40)))
    logits = jax.jit(lambda p: model.bind(p)(tokens))(parameters)

    @jax.jit
    def run(parameters):
        bound = model.bind(parameters)
        x, context = bound.embed(tokens, Context())
        for layer in bound.unroll():
            x, added = layer(x, context)
            if added.selection is not None:
                context = context.with_extras(selection=added.selection)
        return bound.read_out(x, context)

    assert_close("layers one by one", logits, run(parameters), "float32")
    cache, at = model.bind(parameters).init_cache(2, 40), jnp.zeros(2, jnp.int32)
    extend = jax.jit(lambda p, *chunk: model.bind(p).extend(*chunk, 40))
    for start, stop in ((0, 17), (17, 18), (18, 40)):
        y, cache = extend(parameters, tokens[:, start:stop], cache, at + start)
        assert_close(f"decoded from {start}", y, logits[:, start:stop], "float32")


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("top_k", {"top_k": 0}),
        ("local", {"local": 6}),
        ("pool", {"pool": "keys"}),
        ("pool", {"pool": "sum"}),
        ("scope", {"scope": "head"}),
        ("weights", {"scope": "kv_head"}),
        ("local", {"pool": "keys", "block": 2, "local": 1}),
        ("loss_weight", {"shared": True, "loss_weight": 1.0}),
        ("loss_weight", {"loss_weight": -1.0}),
    ],
)
def test_invalid_indexers(argument, changes):
    with rejects(InputError, argument):
        dataclasses.replace(INDEXERS["DeepSeek"], **changes)


@pytest.mark.parametrize(
    ("argument", "name", "changes"),
    [
        ("indexer.loss_weight", "DeepSeek", {"loss_weight": 1.0, "top_k": LENGTH}),
        ("indexer.loss_weight", "MiniMax", {"loss_weight": 1.0, "top_k": 10}),
        ("indexer.block", "Qwen", {"block": LENGTH + 1}),
        ("indexer.heads", "MiniMax", {"heads": 4}),
    ],
)
def test_indexers_that_do_not_fit(argument, name, changes):
    with rejects(InputError, argument):
        configure(name, **changes).check(LENGTH)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("pattern", {"pattern": "causal & window(4)"}),
        ("indexer", {"alibi": True, "rope": None}),
        ("indexer", {"select": {"kind": "moba", "count": 1, "block": 4}}),
        ("indexer.width", {"rope": {"base": 100.0}}),
    ],
)
def test_attention_that_an_indexer_does_not_support(argument, changes):
    mixer = ATTENTION | {"pattern": "causal", "indexer": {"heads": 2, "width": 4, "top_k": 3}} | changes
    with rejects(ConfigError, f"layers.mix.mixer.{argument}"):
        build(mixer)


def test_a_model_that_shares_selections_passes_its_check():
    assert list(check_model(with_shared("mix again"), 40).failures) == []


def test_a_layer_alone_has_no_selection_to_share():
    config = with_shared("mix again").layers["again"].mixer
    mixer = make_mixer(config, Stream(16, 1, jnp.float32), nnx.Rngs(0))
    x = jnp.zeros((1, 5, 16))
    with rejects(InputError, "indexer.shared"):
        mixer(x)
    with rejects(InputError, "indexer.shared"):
        mixer.extend(x, mixer.init_cache(1, 8), jnp.zeros(1, jnp.int32), 8)


def test_a_shared_selection_needs_an_indexer_before_it():
    with rejects(ConfigError, "layers.again.mixer.indexer.shared"):
        with_shared("again mix")
    with rejects(ConfigError, "layers.again.mixer.indexer.shared"):
        with_shared("mix again", indexer=SHARED["indexer"] | {"top_k": 3})
