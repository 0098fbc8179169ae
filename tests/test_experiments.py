"""Every run of every recorded sweep is valid, and the sizes of the papers match."""

import csv
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.account import account_model
from sparsejax.config import ShardingConfig
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, build_schedule, plan_phases, state_shapes
from sparsejax.sweep import plan_runs, read_sweep
from sparsejax.train import build_step

ROOT = Path(__file__).parent.parent

# Experiment, which is also its config's name; the config's argument; the sweep's name; number of runs.
SWEEPS = [
    ("longformer_lm", "mini", "mini", 12),
    ("longformer_lm", "mini", "long", 6),
    ("longformer_lm", "paper", "paper", 12),
    ("bigbird_mlm", "mini", "mini", 15),
    ("bigbird_mlm", "paper", "paper", 15),
    ("layer_schedules", "mini", "text", 66),
    ("layer_schedules", "mini", "long", 15),
    ("layer_schedules", "mini", "recall", 42),
    ("layer_schedules", "mini", "needle", 60),
    ("layer_schedules", "paper", "paper", 66),
    ("mqar", "", "sweep", 24),
    ("mqar", "", "other_rates", 4),
    ("mqar", "", "longer", 12),
    ("needle", "", "sweep", 18),
    ("lost_in_the_middle", "", "sweep", 9),
    ("duplication", "", "sweep", 30),
    ("attention_to_delta", "delta", "sweep", 12),
    ("longformer_from_dense", "long", "sweep", 12),
    ("reformer_duplication", "mini", "sweep", 12),
    ("reformer_duplication", "strict", "sweep", 12),
    ("reformer_duplication", "paper", "sweep", 12),
    ("selection", "text", "sweep", 60),
    ("selection", "recall", "sweep", 60),
    ("selection", "needle", "sweep", 60),
    ("selection", "paper", "paper", 60),
]
PAPER = {  # parameters
    "longformer_lm": 41.0e6,
    "bigbird_mlm": 109.5e6,
    "layer_schedules": 1.37e9,
    "reformer_duplication": 0.657e6,
    "selection": 1.27e9,
}


def plan(name, argument, sweep):
    config = f"{ROOT}/configs/{name}.py{':' if argument else ''}{argument}"
    return plan_runs(config, read_sweep(f"{ROOT}/experiments/{name}/sweep.py:{sweep}"))


@pytest.mark.parametrize(("name", "argument", "sweep", "count"), SWEEPS)
def test_every_run_of_a_sweep_is_valid(name, argument, sweep, count):
    runs = plan(name, argument, sweep)
    assert len(runs) == count
    assert len({run.name for run in runs}) == count
    seeds = {run.seed for run in runs}
    assert len({run.label for run in runs}) * len(seeds) == count


def test_longformer_rows_have_equal_mean_windows():
    runs = plan("longformer_lm", "paper", "paper")
    pairs = {run.label: sum(pattern.pairs(16_384) for _, pattern in run.checked.model.connectivity) for run in runs}
    assert max(pairs["decreasing"], pairs["fixed"]) / pairs["increasing"] == pytest.approx(1, rel=0.01)
    assert pairs["decreasing"] == pairs["increasing"]


def test_longformer_in_stages():
    settings = configs.load(f"{ROOT}/configs/longformer_lm.py:staged")
    phases = plan_phases(settings)
    assert [phase.stop - phase.start for phase in phases] == [430_000, 50_000, 50_000, 35_000, 5_000]
    assert [phase.config.data.length for phase in phases] == [2048, 4096, 8192, 16_384, 23_040]
    first, *_, last = phases
    assert last.config.optimizer.learning_rate == first.config.optimizer.learning_rate / 16 == 1.5625e-5
    widths = [phase.config.model.layers["w1"].mixer.pattern for phase in (first, last)]
    assert widths == ["causal & window(511)", "causal & window(8191)"]
    assert "dilated(8191, stride=4)" in last.config.model.layers["w1_stride4"].mixer.pattern
    assert first.config.model.dropout == 0.2


def test_compared_layers_have_equal_parameters():
    for argument in ("mini", "paper"):
        settings = {"model.schedule": "full nope local ssm lightning sinks8"}
        config = configs.check(configs.load(f"{ROOT}/configs/layer_schedules.py:{argument}", settings))
        layers, _ = account_model(config.model, config.data.length)
        assert [layer.parameters for layer in layers] == pytest.approx([layers[0].parameters] * 6, rel=0.03)


@pytest.mark.parametrize("argument", ["text", "recall", "needle", "paper"])
def test_compared_choices_have_equal_parameters_and_pairs(argument):
    config = configs.load(f"{ROOT}/configs/selection.py:{argument}")
    names = [name for name in config.model.layers if name != "conv"]
    config.model.schedule = " ".join(names)
    config = configs.check(config)
    layers = dict(zip(names, account_model(config.model, config.data.length)[0], strict=True))
    parameters = [layer.parameters for layer in layers.values()]
    assert parameters == pytest.approx([layers["window"].parameters] * len(names), rel=0.007)
    pairs = {name: layer.pairs for name, layer in layers.items() if name != "full"}
    assert (pairs.pop("mamba2"), pairs.pop("delta")) == (0, 0)
    pairs["csa hca"] = (pairs.pop("csa") + pairs.pop("hca")) // 2  # they alternate
    assert list(pairs.values()) == pytest.approx([pairs["window"]] * len(pairs), rel=0.15)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_step_of_the_papers_size_has_consistent_shapes(name):
    config = configs.check(configs.load(f"{ROOT}/configs/{name}.py:paper"))
    model, mesh = Functional(config.model), sharding.make_mesh(ShardingConfig(-1, 1, 1))
    assert model.size == pytest.approx(PAPER[name], rel=0.01)
    optimizer, steps = build_optimizer(config.optimizer, config.train.steps, decay=model.decay), config.train.steps
    step = build_step(model, optimizer, build_schedule(config.optimizer, steps), config.train, mesh)
    shape = (config.train.batch, config.data.length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state, metrics = jax.eval_shape(step, state_shapes(model, optimizer, mesh), batch)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(jnp.shape, state.parameters) == jax.tree.map(jnp.shape, model.shapes)


@pytest.mark.parametrize("name", ["needle", "lost_in_the_middle"])
def test_recorded_accuracies_agree_with_the_page(name):
    """The page has the recorded means, and nothing outside of a receptive field is retrieved."""
    folder = ROOT / "experiments" / name
    with open(folder / "means.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (folder / "README.md").read_text()
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        cells = [row for row in rows if row["schedule"] == schedule and row.get("length", "128") == "128"]
        line = next(line for line in page.splitlines() if line.startswith(f"| {schedule} |"))
        shown = re.findall(r"\d\.\d\d", line)
        assert shown == [f"{float(row[name]):.2f}" for row in cells for name in ("mean", "standard_error")]
    outside = [float(row["mean"]) for row in rows if float(row["reachable"]) == 0]
    assert outside
    assert max(outside) < 0.25
