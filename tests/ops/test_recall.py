"""Metrics of selections against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import measure_selection, moba, top_tokens
from sparsejax.patterns import parse

CAUSAL = parse("causal")


@pytest.mark.parametrize(("kind", "length"), [("tokens", 23), ("moba", 70)])
@pytest.mark.parametrize("packed", [False, True])
def test_metrics(kind, length, packed):
    random = np.random.default_rng(length)
    q, k = (random.normal(size=(2, length, heads, 6)).astype(np.float32) for heads in (4, 2))
    ids = np.sort(random.integers(0, 2 if packed else 1, (2, length)))
    segments = jnp.asarray(ids), jnp.asarray(ids)

    @jax.jit
    def run(q, k):
        selection = (top_tokens(q, k, 3, CAUSAL, segments=segments) if kind == "tokens" else
                     moba(q, k, 8, 2, CAUSAL, segments=segments))  # fmt: skip
        return selection, measure_selection(selection, q, k, CAUSAL, scale=0.4, segments=segments)

    selection, metrics = run(q, k)
    mask, groups = np.asarray(selection.mask), np.asarray(selection.groups)
    masses, best, chosen, forced, entropies = [], [], 0, 0, []
    of_key = np.broadcast_to(np.asarray(selection.blocks.of_key), (2, length))
    for row, head in np.ndindex(2, 4):
        for query in range(length):
            visible = np.flatnonzero((np.arange(length) <= query) & (ids[row] == ids[row, query]))
            p = np.exp(0.4 * k[row, visible, head // 2].astype(np.float64) @ q[row, query, head])
            kept = mask[row, head, query][visible]
            if not kept.all():
                masses.append(p[kept].sum() / p.sum())
                by_group = np.bincount(of_key[row, visible], p / p.sum())
                best.append(np.sort(by_group)[-groups.shape[-1] :].sum())
            chosen += (groups[row, head, query] >= 0).sum()
            forced += kind == "moba"
        counts = np.bincount(groups[row, head][groups[row, head] >= 0])
        shares = counts[counts > 0] / counts.sum()
        entropies.append(-(shares * np.log(shares)).sum())
    starts = np.asarray(selection.blocks.starts)
    count = (starts < length).sum(axis=-1).mean()
    assert float(metrics.mass) == pytest.approx(np.mean(masses), rel=1e-5)
    assert float(metrics.recall) == pytest.approx(np.mean(masses) / np.mean(best), rel=1e-5)
    assert float(metrics.forced) == pytest.approx(forced / chosen, rel=1e-6)
    assert float(metrics.entropy) == pytest.approx(np.mean(entropies) / np.log(count), rel=1e-5)


def test_nothing_is_left_out():
    q = jnp.ones((1, 5, 2, 4))
    metrics = measure_selection(top_tokens(q, q, 5, CAUSAL), q, q, CAUSAL, scale=1.0)
    assert float(metrics.mass) == float(metrics.recall) == 1


def test_the_best_choice_recalls_all():
    """And heads that choose together are one choice."""
    random = np.random.default_rng(5)
    q, k = (jnp.asarray(random.normal(size=(1, 19, heads, 6)), jnp.float32) for heads in (4, 2))
    selection = top_tokens(q, k, 3, CAUSAL, scope="kv_head", pooling="probabilities")
    metrics = jax.jit(lambda: measure_selection(selection, q, k, CAUSAL, scale=6**-0.5))()
    assert float(metrics.recall) == pytest.approx(1, abs=1e-6)
    assert float(metrics.mass) < 0.9
