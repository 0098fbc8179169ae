"""The effective receptive field equals norms of the full Jacobian, and is zero outside of the exact one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import analysis
from sparsejax.analysis import erf
from sparsejax.analysis.subject import Subject
from sparsejax.errors import InputError
from tests.analysis import models
from tests.messages import rejects

pytestmark = pytest.mark.quick

WINDOWS_ONLY = {"schedule": "3x(local)", "layers.local.mixer.pattern": "causal & window(3)"}


def test_norms_are_those_of_the_full_jacobian(text):
    with jax.enable_x64(True):
        model = models.build(text, length=10)
        object.__setattr__(model.config, "dtype", "float64")  # logits stay float32
        model.parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.parameters)
        subject, depths = Subject(model, 10), (1, 3, len(model.config.names))
        tokens, positions = jax.random.randint(jax.random.key(0), (2, 10), 0, 256), np.array([9, 6])
        norms = erf.gradient_norms(subject, depths, model.parameters, {"inputs": tokens}, positions)
        bound = subject.functional.bind(model.parameters)
        start, context = bound.embed(tokens, subject.context({"inputs": tokens}))

        def logits_after(depth):
            def run(x):
                for index, layer in enumerate(list(bound.unroll())[:depth]):
                    x, _ = layer(x, context.with_extras(layer=jnp.asarray(index), embeddings=x))
                return bound.read_out(x, context)

            return run

        for index, depth in enumerate(depths):
            run = logits_after(depth)
            logits, jacobian = run(start), jax.jacrev(run)(start)  # [b, t, v], [b, t, v, b, t, m]
            for row, position in enumerate(positions):
                best = int(logits[row, position].argmax())
                gradient = jacobian[row, position, best] - jacobian[row, position].mean(axis=0)
                expected = np.linalg.norm(gradient[row], axis=-1)
                np.testing.assert_allclose(norms[index, row], expected, rtol=1e-5, atol=1e-7 * expected.max())


def test_windows_reach_exactly_their_receptive_field(text, tmp_path):
    model = models.build(text, WINDOWS_ONLY)
    findings = analysis.analyze(model, "erf", tmp_path, windows=3)
    for row in findings.tables["radius"]:
        assert row["exact"] == 3 * row["depth"]
        assert row["inputs"] == 3 * row["depth"] + 1
        assert row["outside"] == 0
        assert 0 < row["radius"] <= row["exact"]
    for row in findings.tables["profile"]:
        assert (row["norm"] > 0) == bool(row["inside"]) == (row["distance"] <= 3 * row["depth"])


def test_the_radius_holds_the_share():
    norms, offsets = np.array([1.0, 2.0, 10.0, 4.0, 3.0]), np.array([-2, -1, 0, 1, 2])
    assert [erf.find_radius(norms, offsets, share) for share in (0.5, 0.6, 0.8, 0.81, 1.0)] == [0, 1, 1, 2, 2]
    assert erf.find_radius(np.zeros(3), np.arange(3)) == 0


def test_profiles_average_over_outputs(text, tmp_path):
    """The rows of the table are sums of norms over the outputs that have an input at the distance."""
    model = models.build(text)
    findings = analysis.analyze(model, "erf", tmp_path, windows=2)
    last = [row for row in findings.tables["profile"] if row["depth"] == len(model.config.names)]
    assert [row["distance"] for row in last] == list(range(models.LENGTH))
    assert sum(row["share"] for row in last) == pytest.approx(1)


def test_a_pooled_model_is_refused(text, tmp_path):
    model = models.build(text)
    object.__setattr__(model.config.head, "pool", "mean")
    with rejects(InputError, "kind"):
        analysis.analyze(model, "erf", tmp_path)
