"""From workdirs to a table and back."""

import json
import shutil
import sys

import pandas as pd
import pytest
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.account import account_model
from sparsejax.overrides import describe_overrides, shorten_keys
from sparsejax.report import ReportError, read, write
from sparsejax.workdir import Workdir
from tests.messages import rejects
from tests.report.workdirs import TOKENS, dump, settings_of, write_sweep, write_workdir

pytestmark = pytest.mark.quick

FULL, LOCAL = "2x(full)", "2x(local)"
VALUES = {
    ("full", FULL, 0): 2.0,
    ("full", FULL, 1): 2.1,
    ("local", LOCAL, 0): 0.1 + 0.2,  # no short decimal number
    ("local", LOCAL, 1): None,
    ("local", LOCAL, 2): "planned",
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep") / "sweep", VALUES)


def assert_same(results, expected):
    pd.testing.assert_frame_equal(results.runs, expected.runs, check_exact=True)
    pd.testing.assert_frame_equal(results.curves, expected.curves, check_exact=True)
    assert results.settings == expected.settings


def test_a_row_says_what_a_run_is_and_what_it_costs(sweep):
    results = read([sweep])
    row = results.runs.iloc[2]
    config = configs.check(settings_of({"model.schedule": LOCAL}))
    layers, rest = account_model(config.model, config.data.length)
    account = sum(layers, rest)
    assert row["label":"model.schedule"].tolist() == ["local", 0, "finished", 20, LOCAL]
    assert row["eval/bits_per_byte"] == 0.1 + 0.2
    assert row["train/loss"] == 5.0 - 0.1 * 20
    assert row["parameters"] == account.parameters
    assert row["training_flops_per_token"] == 3 * account.flops
    assert row["training_flops"] == 3 * account.flops * 20 * TOKENS
    assert row["cache_bytes"] == account.cache_bytes
    assert (row["seconds"], row["tokens_per_second"]) == (20 / 4.0, 4.0 * TOKENS)
    assert row["device":"git"].tolist() == ["1 x cpu", "3.11.7", "0.10.2", "abc123"]
    assert row["config"] == "configs/recipe.py"
    assert json.loads(row["overrides"]) == {"model.schedule": LOCAL, "train.seed": 0}
    assert row["digest"] == configs.digest(settings_of({"model.schedule": LOCAL}))
    assert row["corpus"] == "c0ffee"
    assert (sweep / "runs" / row["name"]).is_dir()


def test_what_has_not_ended_is_listed_with_its_last_step(sweep):
    runs = read([sweep]).runs
    assert runs["status"].tolist() == ["finished"] * 3 + ["unfinished", "not started"]
    assert runs["step"].tolist() == [20, 20, 20, 10, 0]
    assert runs["seed"].tolist() == [0, 1, 0, 1, 2]
    assert runs["eval/bits_per_byte"].isna().tolist() == [False] * 3 + [True] * 2
    assert runs["training_flops"][3] == runs["training_flops"][2] / 2
    assert pd.isna(runs["parameters"][4])


def test_curves_have_a_row_for_each_value(sweep):
    results = read([sweep])
    run = results.runs["run"][3]
    curves = results.curves[results.curves["run"] == run]
    assert set(curves["metric"]) == {"train/loss", "train/loss_mean", "eval/bits_per_byte", "eval/loss"}
    loss = curves[curves["metric"] == "train/loss"]
    assert loss["step"].tolist() == [5, 10]
    assert loss["value"].tolist() == [5.0 - 0.1 * 5, 5.0 - 0.1 * 10]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_recorded_table_is_the_table(sweep, tmp_path, ending):
    results = read([sweep])
    write(results, tmp_path / "out")
    for other in {".csv", ".parquet"} - {ending}:
        (tmp_path / "out" / f"results{other}").unlink()
        (tmp_path / "out" / f"curves{other}").unlink()
    assert_same(read([tmp_path / "out" / f"results{ending}"]), results)
    assert_same(read([tmp_path / "out"]), results)
    assert not list((tmp_path / "out").glob("*.part"))


def test_texts_that_look_like_something_else_stay_texts(tmp_path):
    labels = ["NA", "None", "007", "1e5", 'quoted, "so"', "null"]
    values = {(label, f"{n}x(full)", 0): 2.0 for n, label in enumerate(labels, 1)}
    results = read([write_sweep(tmp_path / "sweep", values)])
    assert results.runs["label"].tolist() == labels
    write(results, tmp_path / "out")
    for ending in (".csv", ".parquet"):
        assert_same(read([tmp_path / "out" / f"results{ending}"]), results)


def test_the_same_run_from_two_places_counts_once(sweep, tmp_path):
    once = read([sweep])
    write(once, tmp_path / "out")
    shutil.copytree(sweep / "runs", tmp_path / "copies")
    results = read([tmp_path / "copies", tmp_path / "out", sweep])
    assert sorted(results.runs["run"]) == sorted(once.runs["run"])
    assert set(results.runs["label"]) == {"full", "local"}  # the sweep's names win
    assert len(results.curves) == len(once.curves)
    assert any("duplicates" in note for note in results.notes)


def test_sittings_are_put_together(tmp_path):
    """Of the first sitting one run is recorded unfinished and one had not begun; the second has ended both."""
    first = write_sweep(tmp_path / "first", {("a", FULL, 0): 2.0, ("a", FULL, 1): None, ("a", FULL, 2): "planned"})
    second = write_sweep(tmp_path / "second", {("a", FULL, 1): 2.1, ("a", FULL, 2): 2.2})
    write(read([first]), tmp_path / "out")
    results = read([tmp_path / "out", second])
    assert results.runs["status"].tolist() == ["finished"] * 3
    assert sorted(results.runs["eval/bits_per_byte"]) == [2.0, 2.1, 2.2]
    assert not any("unequal" in note for note in results.notes)


def test_unequal_results_of_one_run_are_told(tmp_path):
    sweeps = [write_sweep(tmp_path / str(value), {("a", FULL, 0): value}) for value in (2.0, 2.5)]
    results = read(sweeps)
    assert results.runs["eval/bits_per_byte"].tolist() == [2.0]
    assert any("unequal results" in note for note in results.notes)


def test_runs_on_other_data_are_other_runs(tmp_path):
    for name in ("first", "other"):
        write_workdir(tmp_path / name, settings_of(), 2.0)
    dump(tmp_path / "other" / "data.json", {"digest": "beef"})
    assert len(read([tmp_path]).runs) == 2


def test_workdirs_without_a_sweep_are_named_by_what_differs(tmp_path):
    for seed in (0, 1):
        write_workdir(tmp_path / f"a{seed}", settings_of({"train.seed": seed, "model.width": 16}), 2.0)
        write_workdir(tmp_path / f"b{seed}", settings_of({"train.seed": seed, "model.width": 32}), 2.0)
    results = read([tmp_path])
    assert results.keys == ["model.width"]
    assert results.runs["model.width"].tolist() == [16, 16, 32, 32]
    assert results.runs["label"].tolist() == ["width=16", "width=16", "width=32", "width=32"]
    assert results.runs["seed"].tolist() == [0, 1, 0, 1]


def test_a_single_workdir_is_named_by_its_folder(tmp_path):
    runs = read([write_workdir(tmp_path / "mine", settings_of(), 2.0)]).runs
    assert runs["label"].tolist() == ["mine"]


def test_phases_are_counted_one_by_one(tmp_path):
    """Five steps of the recipe's rows, then up to step ten of half of them that are twice as long."""
    settings = settings_of({"train.steps": 20})
    long = {"data": {"length": 64}, "train": {"batch": 2}}
    settings.train.phases = ConfigDict({"long": {"start": 5, "set": long}})
    row = read([write_workdir(tmp_path / "mine", settings, step=10)]).runs.iloc[0]
    short, longer = (
        sum(layers, rest)
        for layers, rest in (account_model(configs.check(settings).model, length) for length in (32, 64))
    )
    assert row["training_flops"] == 5 * TOKENS * short.training_flops + 5 * TOKENS * longer.training_flops
    assert row["cache_bytes"] == longer.cache_bytes > short.cache_bytes
    assert row["training_flops_per_token"] == longer.training_flops


def test_an_encoder_has_no_cache(tmp_path):
    overrides = {"model.causal": False, "data.objective": "masked", "model.vocab": 257, "model.schedule": "full"}
    overrides |= {"model.layers.full.mixer.pattern": "full"}
    runs = read([write_workdir(tmp_path / "mine", settings_of(overrides), 2.0)]).runs
    assert pd.isna(runs["cache_bytes"][0])
    assert runs["parameters"][0] > 0


def test_a_workdir_that_has_only_begun_is_unfinished(tmp_path):
    write_workdir(tmp_path / "mine", settings_of(), 2.0)
    workdir = Workdir(tmp_path / "mine")
    for file in (workdir.result, workdir.metrics, workdir.timing, workdir.versions, workdir.data):
        file.unlink()
    row = read([tmp_path / "mine"]).runs.iloc[0]
    assert (row["status"], row["step"], row["device"]) == ("unfinished", 0, "")
    assert pd.isna(row["seconds"])


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    workdir = write_workdir(tmp_path / "mine", settings_of(), step=10)
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 15, "train/lo')
    assert read([workdir]).runs["step"].tolist() == [10]


@pytest.mark.parametrize("name", ["pandas", "pyarrow"])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with rejects(ReportError, "report"):
        read([tmp_path])


def test_where_a_run_was_resumed_elsewhere_both_places_are_told(tmp_path):
    workdir = write_workdir(tmp_path / "mine", settings_of(), 2.0)
    (first,) = json.loads((workdir / "versions.json").read_text())
    dump(workdir / "versions.json", [first, first, first | {"devices": "8 x tpu"}])
    row = read([workdir]).runs.iloc[0]
    assert (row["device"], row["jax"]) == ("1 x cpu; 8 x tpu", "0.10.2")


def test_keys_are_as_short_as_they_can_be_told():
    assert shorten_keys(["model.width", "train.seed"]) == {"model.width": "width", "train.seed": "seed"}
    assert shorten_keys(["a.mlp.width", "b.mlp.width"]) == {"a.mlp.width": "a.mlp.width", "b.mlp.width": "b.mlp.width"}
    assert shorten_keys(["model.width", "model.layers.a.mlp.width"]) == {
        "model.width": "model.width",
        "model.layers.a.mlp.width": "mlp.width",
    }
    assert describe_overrides({"model.width": 8, "model.schedule": "full"}) == "width=8, schedule=full"
