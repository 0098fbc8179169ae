"""The search of the layers of a trained model that keep their attention."""

import csv
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from sparsejax import cli
from sparsejax import config as configs
from sparsejax.account import account_model
from sparsejax.analysis.subject import choose_windows
from sparsejax.config import ModelSource
from sparsejax.errors import InputError
from sparsejax.loading import load
from sparsejax.model import Functional, restack
from sparsejax.placement.choices import name_layers, plan_choices, split_labels
from sparsejax.placement.run import PlacementSearch, run_search
from sparsejax.placement.scores import Scorer
from tests.messages import rejects
from tests.train import runs

LENGTH, DEPTH = 96, 6
SCHEDULE = {"model.schedule": f"{DEPTH}x(full)", "data.length": LENGTH, "train.steps": 4, "eval.every": 4}
LABELS = ["window:4", "full"]


@pytest.fixture(scope="module")
def workdir(text, tmp_path_factory):
    """The workdir of a model of six full layers."""
    folder = tmp_path_factory.mktemp("full") / "run"
    runs.train_here(runs.load(text, SCHEDULE | {"checkpoint.every": 4, "eval.sample": 0}), folder)
    return folder


def search(workdir, folder, **changes):
    options = {"layers": ",".join(LABELS), "budget": "kv:0.5", "windows": 2, "questions": 2} | changes
    return run_search(PlacementSearch(ModelSource.parse(f"run:{workdir}"), **options), folder)


def read(folder, name="placements.csv"):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def searched(workdir, tmp_path_factory):
    """A search over all placements."""
    folder = tmp_path_factory.mktemp("all")
    return folder, *search(workdir, folder, method="all")


def test_all_placements_within_the_budget_are_measured(searched):
    folder, lines, files = searched
    rows = read(folder)
    kv = {float(row["kv"]) for row in rows}
    full, window = (account_of(f"{DEPTH}x({name})") for name in ("full", "local"))
    layer = (full - window) / DEPTH
    within = [k for k in range(DEPTH + 1) if window + k * layer <= 0.5 * full + 1e-6]
    assert kv == {window + k * layer for k in within}
    count = sum(len(list(itertools.combinations(range(DEPTH), k))) for k in within)
    assert len(rows) == len({row["full_layers"] for row in rows}) == count
    assert {file.name for file in files} == {"placements.csv", "pareto.csv", "pareto.png", "pareto.svg", "best.py"}
    assert lines[0].startswith("schedule: ")


def account_of(schedule):
    """Bytes of the cache of the recipe with windows of four tokens."""
    settings = configs.load(str(runs.RECIPE), {"data.files": "unused", "model.schedule": schedule})
    settings.model.layers.local.mixer = settings.model.layers.full.mixer.copy_and_resolve_references()
    settings.model.layers.local.mixer.pattern = "causal & window(3)"
    layers, ends = account_model(configs.check(settings).model, LENGTH)
    return float(sum(account.cache_bytes for account in [*layers, ends]))


@pytest.mark.parametrize("method", ["beam", "greedy"])
def test_a_beam_equals_brute_force(searched, workdir, tmp_path, method):
    search(workdir, tmp_path, method=method)
    assert (tmp_path / "best.py").read_text() == (searched[0] / "best.py").read_text()
    assert len(read(tmp_path)) < len(read(searched[0]))


def test_the_best_placement_is_that_of_the_least_loss(searched):
    rows = read(searched[0])
    best = min(rows, key=lambda row: float(row["loss"]) + float(row["retrieval_loss"]))
    assert f"schedule: {best['schedule']}" == searched[1][0]


def test_scores_are_those_of_the_model(workdir):
    model = load(workdir)
    choices = plan_choices(model, LABELS, "kv:1", LENGTH, {})
    dataset = model.load_data({})
    scorer = Scorer(choices, dataset, windows=3, questions=0)
    batch = dataset.held_out.take(choose_windows(dataset, 3))
    for placement in [(0,) * DEPTH, (0, 1, 0, 0, 1, 0), (1,) * DEPTH, (0, 1, 0, 0, 1, 1)]:
        changed = load(workdir)
        schedule, layers = choices.write(placement)
        config = dataclasses.replace(model.config, schedule=schedule, layers=layers)
        changed.config, changed.parameters = config, restack(model.parameters, model.config, config)
        logits = np.asarray(changed.logits(batch["inputs"]), np.float64)
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        np.testing.assert_allclose(scorer.measure(placement).loss, losses.mean(), rtol=1e-5)


def test_the_config_starts_from_the_weights(searched, workdir):
    settings = configs.load(str(searched[0] / "best.py"))
    run = configs.check(settings)
    assert settings.init.source == f"run:{workdir}"
    named = name_layers(load(workdir))
    shapes = [sum(leaf.size for leaf in jax.tree.leaves(Functional(c).shapes)) for c in (run.model, named.config)]
    assert shapes[0] == shapes[1]
    assert set(run.model.names) <= {"full", "full_window_4"}


def test_a_search_resumes_without_measuring_again(searched, workdir, monkeypatch):
    folder = searched[0]
    before = [(folder / name).read_bytes() for name in ("placements.csv", "best.py", "pareto.png", "placements.jsonl")]
    monkeypatch.setattr(Scorer, "measure", lambda *arguments: pytest.fail("measured again"))
    search(workdir, folder, method="all")
    after = [(folder / name).read_bytes() for name in ("placements.csv", "best.py", "pareto.png", "placements.jsonl")]
    assert after == before
    with rejects(InputError, "workdir"):
        search(workdir, folder, windows=1)


def test_heads_choose_their_patterns(workdir):
    model = load(workdir)
    choices = plan_choices(model, ["window:4", "heads:0.5", "full"], "pairs:1", LENGTH, {})
    assert {choice.label for options in choices.layers.values() for choice in options} == {
        "window:4",
        "heads:0.5",
        "full",
    }
    for options in choices.layers.values():
        labels = [choice.label for choice in options]
        assert [choice.cost for choice in options] == sorted(choice.cost for choice in options)
        assert next(c.pattern for c in options if c.label == "heads:0.5").startswith("per_head(")
        assert labels[-1] == "full" or options[-1].cost == options[labels.index("full")].cost


@pytest.mark.parametrize("quantity", ["kv", "pairs", "flops"])
def test_costs_are_those_of_the_account(workdir, quantity):
    choices = plan_choices(load(workdir), LABELS, f"{quantity}:1", LENGTH, {})
    for placement in [(0,) * DEPTH, (0, 1, 1, 0, 1, 0), (1,) * DEPTH]:
        np.testing.assert_allclose(choices.costs.total(placement) + choices.fixed, choices.account(placement))


def test_the_source_is_known_beside_a_choice_of_equal_cost(workdir):
    labels = ["window:4", "full", "causal & strided(2)"]  # strides cache as many tokens as causal attention
    choices = plan_choices(load(workdir), labels, "kv:1", LENGTH, {})
    assert len({choice.cost for choice in choices.layers[0]}) == 2
    assert set(choices.label(choices.source).values()) == {"full"}
    assert choices.cost(choices.source) == account_of(f"{DEPTH}x(full)")


def test_labels_are_split_outside_of_parentheses():
    assert split_labels("window:8, causal & (window(3, 0) | sink(2)),full") == [
        "window:8", "causal & (window(3, 0) | sink(2))", "full",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("layers", {"layers": "full"}),
        ("layers", {"layers": "window:x,full"}),
        ("layers", {"layers": "window:0,full"}),
        ("layers", {"layers": "windo(3),full"}),
        ("layers", {"layers": "heads:0.9,full"}),
        ("budget", {"budget": "kw:0.3"}),
        ("budget", {"budget": "kv:-1"}),
        ("budget", {"budget": "kv:0.001"}),
        ("method", {"method": "best"}),
        ("width", {"width": 0}),
        ("questions", {"questions": 2, "data": {"task": "selective_copying"}}),
        ("layers", {"layers": "window:4,window:8"}),
    ],
)
def test_bad_input_is_one_line(workdir, tmp_path, argument, changes):
    with rejects(InputError, argument):
        search(workdir, tmp_path / "search", **changes)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--from=run:X"], "--layers"),
        (["--from=run:X", "--layers=window:4,full"], "--budget"),
        (["--from=run:X", "--layers=window:4,full", "--budget=kv:1", "--trials=3"], "--trials"),
        (["--config=preset:quickstart", "--trials=3"], "--space"),
        (["--config=preset:quickstart", "--space=s.py", "--trials=3", "--width=3"], "--width"),
        (["--config=preset:quickstart", "--space=s.py", "--trials=3", "--data.length=8"], "--data.length"),
    ],
)
def test_the_verb_names_what_is_missing(capsys, options, named):
    assert cli.main(["search", "--workdir=unused", *options]) == 2
    assert capsys.readouterr().err.startswith(f"sparsejax: {named}: ")


def test_the_verb_searches(workdir, tmp_path, capsys):
    command = [f"--from=run:{workdir}", "--layers=window:4,full", "--budget=kv:0.3", "--windows=1", "--questions=0"]
    cli.main(["search", *command, f"--workdir={tmp_path / 'search'}", "--method=greedy"])
    printed = capsys.readouterr().out
    assert "of the source's" in printed
    assert "best.py" in printed
    assert json.loads((tmp_path / "search" / "placements.jsonl").read_text().splitlines()[0])["budget"] == "kv:0.3"
