"""Training of indexers: a warm-up over all keys, then the selected keys, with metrics per layer."""

import numpy as np
import pytest

from sparsejax.runs import plan_phases
from sparsejax.workdir import Workdir, read_rows
from tests.train import runs

INDEXER = {"heads": 2, "width": 8, "top_k": 4, "loss_weight": 1.0}
ONLY_THE_INDEXER = [{"match": "*.indexer.*"}, {"match": "*", "freeze": True}]
SECTION = {f"model.layers.full.mixer.indexer.{key}": value for key, value in INDEXER.items()}
OVERRIDES = {
    "model.layers.full.mixer.indexer": INDEXER,
    "model.schedule": "local 2x(full)",
    "train.steps": 10,
    "train.phases.warmup.start": 0,
    "train.phases.warmup.set.optimizer.groups": ONLY_THE_INDEXER,
    "train.phases.warmup.set.model.layers.full.mixer.indexer.dense": True,
    "train.phases.sparse.start": 5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    text = runs.write_text(tmp_path_factory.mktemp("indexer") / "text")
    settings, workdir = runs.load(text, OVERRIDES), tmp_path_factory.mktemp("indexer") / "run"
    return settings, runs.train_here(settings, workdir), read_rows(Workdir(workdir).metrics)


def test_phases_are_dense_and_then_sparse(trained):
    dense = [phase.config.model.layers["full"].mixer.indexer.dense for phase in plan_phases(trained[0])]
    assert dense == [True, False]


def test_rows_have_the_loss_and_the_metrics_of_each_layer(trained):
    _, _, rows = trained
    losses = [row["train/aux/indexer"] for row in rows]
    assert all(np.isfinite(losses))
    assert losses[4] < losses[0]  # the warm-up fits the indexer to an attention that does not change
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [5, 10]
    for row in evaluations:
        names = {name for name in row if name.endswith(("/layer_0", "/layer_1", "/layer_2"))}
        expected = ("mass", "recall", "kl", "forced", "entropy")
        assert names == {f"eval/{metric}/layer_{layer}" for metric in expected for layer in (1, 2)}
        assert all(0 < row[f"eval/mass/layer_{layer}"] < row[f"eval/recall/layer_{layer}"] <= 1 for layer in (1, 2))
        assert row["eval/forced/layer_1"] == 0


def test_the_warm_up_trains_the_indexer_only(trained):
    """The loss of a frozen model does not depend on the step."""
    rows = trained[2]
    text = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert text[1] < text[0]
