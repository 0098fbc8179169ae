"""Statistics of attention equal those of dense probabilities in NumPy, and the choice an exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import analysis, layers, patterns
from sparsejax.analysis.attention import TOP_P, choose_pattern, measure_attention, probabilities
from sparsejax.errors import InputError
from sparsejax.layers import EMPTY
from sparsejax.model import Functional
from sparsejax.ops import AttentionCall
from tests.analysis import models
from tests.messages import rejects

pytestmark = pytest.mark.quick

CANDIDATES = tuple(map(patterns.parse, ("window(2)", "causal & (window(4) | sink(2))", "full")))
CALLS = {
    "plain": ("causal", {}),
    "per head": ("per_head(causal, causal & window(3), causal, causal & (window(2) | sink(1)))", {}),
    "encoder": ("window(3, 3) | global_keys([0])", {}),
    "multiset": ("multiset(causal, causal & window(2))", {}),
    "softcap and learned sinks": ("causal", {"softcap": 2.0, "sink_logits": np.array([0.0, 1.0, -1.0, 2.0])}),
    "alibi": ("causal", {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0])}),
    "documents and padding": ("causal", {"segments": np.array([[1] * 5 + [2] * 6 + [-1, -1]])}),
}


def dense_probabilities(call):
    """Probabilities [h, t, s] and the mask, in float64."""
    q, k = (np.asarray(x[0], np.float64) for x in (call.q, call.k))
    t, h = q.shape[:2]
    k = np.repeat(k, h // k.shape[1], axis=1)
    scores = np.einsum("thd,shd->hts", q, k) * call.scale
    if call.softcap:
        scores = call.softcap * np.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        distance = abs(np.arange(t)[:, None] - np.arange(t))
        scores -= np.asarray(call.alibi_slopes, np.float64)[:, None, None] * distance
    counts = np.broadcast_to(call.pattern.counts(np.arange(t)[:, None], np.arange(t)[None], t, t), scores.shape)
    mask = counts > 0
    if call.segments is not None:
        q_ids, k_ids = (np.asarray(ids[0]) for ids in call.segments)
        mask = mask & (q_ids[:, None] == k_ids)
    weights = np.where(mask, counts * np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    if call.sink_logits is not None:
        total = total + np.exp(np.asarray(call.sink_logits, np.float64))[:, None, None]
    return weights / np.where(total == 0, 1, total), mask


@pytest.mark.parametrize("scores", [1 << 20, 4 * 13 * 4, 1], ids=["one tile", "ragged tiles", "single queries"])
@pytest.mark.parametrize("name", CALLS)
def test_statistics_equal_dense_ones(name, scores):
    with jax.enable_x64(True):
        text, options = CALLS[name]
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(1, 13, heads, 8))) for heads in (4, 2, 2))
        options = {key: jnp.asarray(value) for key, value in options.items() if key != "softcap"}
        limit = CALLS[name][1].get("softcap")
        segments = options.pop("segments", None)
        segments = None if segments is None else (segments, jnp.where(segments < 0, -2, segments))
        sinks, slopes = options.get("sink_logits"), options.get("alibi_slopes")
        call = AttentionCall(q, k, v, patterns.parse(text, 13), 0.7, limit, sinks, segments, None, slopes)
        sums = measure_attention(call, CANDIDATES, 2, scores)
        p, mask = dense_probabilities(call)
    real = np.ones(13, bool) if segments is None else np.asarray(segments[0][0]) >= 0
    p, mask = p[:, real], mask[:, real]
    distance = abs(np.arange(13)[real][:, None] - np.arange(13))
    expected = {
        "inside": [(p * c.dense(13)[real]).sum((1, 2)) for c in CANDIDATES],
        "sinks": p[..., :2].sum((1, 2)),
        "mass": p.sum((1, 2)),
        "distance": (p * distance).sum((1, 2)),
        "entropy": -(p * np.log(np.where(p > 0, p, 1))).sum((1, 2)),
        "keys": [[_count_keys(p[head], top) for head in range(4)] for top in TOP_P],
        "uniform_distance": ((mask * distance).sum(-1) / mask.sum(-1)).sum(-1),
        "uniform_entropy": np.log(mask.sum(-1)).sum(-1),
        "uniform_keys": mask.sum((1, 2)),
        "queries": real.sum(),
    }
    assert sums.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(sums[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


def _count_keys(p, top):
    """Sum over queries of the least number of keys that hold a share of the mass, tried one by one."""
    total = 0
    for row in p:
        ordered = sorted(row, reverse=True)
        total += next(n for n in range(1, len(ordered) + 1) if sum(ordered[:n]) >= top * row.sum() * (1 - 1e-6))
    return total


def test_calls_reproduce_the_output_of_every_mixer(text):
    """Attention from the arguments of `attention_calls` gives the layer's output before the last projection."""
    model = models.build(text, {"schedule": "2x(local full)"})
    bound = Functional(model.config).bind(model.parameters)
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 256)
    x, context = bound.embed(tokens, EMPTY)
    for layer in bound.unroll():
        (call,) = layer.attention_calls(x, context).values()
        p, _ = dense_probabilities(call)
        v = np.repeat(np.asarray(call.v[0], np.float64), p.shape[0] // call.v.shape[2], axis=1)
        mixed = np.einsum("hts,shd->thd", p, v).reshape(1, 12, -1)
        expected = layer.mixer(layer.mixer_residual.pre(x), context)
        np.testing.assert_allclose(layer.mixer.out(jnp.asarray(mixed, jnp.float32)), expected, rtol=1e-4, atol=1e-5)
        x, _ = layer(x, context)


LSH = {"heads": 2, "head_width": 8, "chunk": 4, "buckets": (4,), "hashes": 3, "seed": 0}
LATENT = {"pattern": "causal", "heads": 2, "query_rank": 6, "kv_rank": 6, "nope_width": 4, "rope_width": 4}
LATENT |= {"value_width": 5, "rope": layers.RopeConfig(base=100.0), "norm_eps": 1e-6, "impl": "auto"}
INDEXER = layers.IndexerConfig(heads=2, width=6, top_k=3)
SELECTING = {
    "lsh": (layers.Lsh, layers.LshConfig(**LSH, causal=True)),
    "lsh of few chunks": (layers.Lsh, layers.LshConfig(**LSH | {"chunk": 9, "hashes": 1}, causal=False, after=1)),
    "indexer": (layers.Latent, layers.LatentConfig(**LATENT, indexer=INDEXER)),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents and padding"])
@pytest.mark.parametrize("name", SELECTING)
def test_selections_reproduce_the_output(name, masked):
    """The keys that LSH and an indexer select, with their multiplicity, give the output of the mixer."""
    kind, config = SELECTING[name]
    mixer = kind(config, layers.Stream(12, 1, jnp.float32), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 14, 12))
    segments = jnp.array([[1] * 6 + [2] * 6 + [0] * 2])
    context = layers.Context(layers.Tokens(segments=segments, mask=segments > 0)) if masked else EMPTY
    (call,) = mixer.attention_calls(x, context).values()
    p, mask = probabilities(call, jnp.arange(14))
    mixed = jnp.einsum("hts,bshd->bthd", p, call.call.v).reshape(1, 14, -1)
    count = 12 if masked else 14
    expected = mixer(x, context)[:, :count]
    np.testing.assert_allclose(mixer.out(mixed)[:, :count], expected, rtol=1e-4, atol=1e-5)
    assert (p[~np.broadcast_to(mask, p.shape)] == 0).all()
    if name == "indexer":
        assert (mask.sum(axis=-1) <= 3).all()
    sums = measure_attention(call, CANDIDATES, 2, 64)
    np.testing.assert_allclose(sums["mass"], [count] * 2, rtol=1e-5)


def test_layers_without_scores_are_named(text, tmp_path):
    lsh = {f"layers.local.mixer.{key}": value for key, value in {"kind": "lsh", **LSH, "causal": True}.items()}
    config = models.build(text, {"schedule": "ssm local"})
    findings = analysis.analyze(config, "attention", tmp_path / "ssm", windows=1)
    assert "Without scores of softmax attention: layers 0 ssm." in findings.lines
    hashed = {"schedule": "local", "allow_leaks": True} | lsh
    findings = analysis.analyze(models.build(text, hashed), "attention", tmp_path / "lsh", windows=1)
    assert findings.lines == ["layers.local.mixer selects its keys; the selected keys count as its pattern."]
    assert set(findings.tables) == {"heads", "coverage"}


def test_the_choice_is_that_of_an_exhaustive_search():
    rng, n = np.random.default_rng(0), 32
    options = [patterns.parse(f"causal & window({w})") for w in (1, 3, 7, 15, 31)] + [patterns.Causal()]
    for _ in range(50):
        shares, tau = [*rng.uniform(size=5), 1.0], rng.uniform(0.2, 1)
        chosen, share = choose_pattern(list(zip(options, shares, strict=True)), tau, n)
        costs = [int(p.dense(n).sum()) if s >= tau - 1e-5 else np.inf for p, s in zip(options, shares, strict=True)]
        assert chosen.pairs(n) == min(costs)
        assert share >= tau - 1e-5


def test_the_line_builds_a_model_that_keeps_the_share(text, tmp_path):
    model = models.build(text, {"schedule": "2x(local full)"})
    job = analysis.kind.open_analysis(
        analysis.KINDS, model, "attention", None, patterns="window(1); window(7); sink(1) | window(3)", tau=0.6
    )
    findings = analysis.kind.run(job, tmp_path)
    lines = job.lines(findings.tables["choice"])
    assert set(lines) == {"layers.local.mixer.pattern", "layers.full.mixer.pattern"}
    for line in lines.values():
        assert str(patterns.parse(line, models.LENGTH)) == line
    assert any("window(7)" in line or "window(3)" in line for line in lines.values())
    overrides = {"schedule": "2x(local full)"} | lines
    changed = models.build(text, overrides)
    assert changed.config.layers["full"].mixer.pattern == lines["layers.full.mixer.pattern"]
    # The share of a head is its least over both layers of the section.
    coverage = findings.tables["coverage"]
    for row in findings.tables["choice"]:
        shares = [
            entry["share"]
            for entry in coverage
            if (entry["section"], entry["head"], entry["pattern"]) == (row["section"], row["head"], row["pattern"])
        ]
        assert row["share"] >= 0.6
        assert not shares or row["share"] == pytest.approx(min(shares))


def test_invalid_options_are_refused(text, tmp_path):
    model = models.build(text)
    for options, argument in (
        ({"patterns": "windw(3)"}, "patterns"),
        ({"patterns": "per_head(causal, causal)"}, "patterns"),
        ({"patterns": "causal;"}, "patterns"),
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.5}, "tau"),
        ({"sinks": 0}, "sinks"),
        ({"windows": 0}, "windows"),
        ({"lenghts": 3}, "lenghts"),
    ):
        with rejects(InputError, argument):
            analysis.analyze(model, "attention", tmp_path, **options)
    with rejects(InputError, "kind"):
        analysis.analyze(model, "atention", tmp_path)
    with rejects(InputError, "kind"):
        analysis.analyze(models.build(text, {"schedule": "2x(ssm)"}), "attention", tmp_path)
    with rejects(InputError, "data.length"):
        analysis.analyze(model, "attention", tmp_path, {"length": 100_000, "files": str(text / "0.txt")})


def test_patterns_of_a_causal_model_are_causal(text):
    config = models.build(text).config
    candidates = analysis.attention.parse_candidates("window(3, 3); window(2); full; window(3, 3)", config, 24)
    assert list(map(str, candidates)) == ["causal & window(3, 3)", "window(2)", "causal & full"]
    for pair in itertools.combinations(analysis.attention.parse_candidates("", config, 300), 2):
        assert pair[0] != pair[1]
