"""Matched budgets, compared with hand calculations for the small model of `recipe.py`."""

import bisect
import io
import random

import pytest
from rich.console import Console

from sparsejax import budget
from sparsejax.budget import BudgetError, match_runs, read_match
from sparsejax.config import ConfigError
from sparsejax.sweep import plan_runs, sweep
from tests.messages import rejects
from tests.train.runs import RECIPE

pytestmark = pytest.mark.quick

CONFIG = str(RECIPE)
WIDTH, VOCAB, HEADS, KV_HEADS, HEAD_WIDTH, LENGTH, BATCH = 16, 256, 2, 1, 8, 32, 4
PROJECTIONS = 2 * WIDTH * (HEADS + KV_HEADS) * HEAD_WIDTH  # queries and output, keys and values
LOCAL = "model.layers.local.mixer.pattern"


def parameters(layers, width):
    """Of layers of attention and a plain feed-forward part of this width."""
    return VOCAB * WIDTH + WIDTH + layers * (PROJECTIONS + 2 * WIDTH * width + 2 * WIDTH)


def training_flops(layers, width=16):
    """For each token, with causal attention."""
    scores = 4 * HEADS * HEAD_WIDTH * (LENGTH + 1) / 2
    return 3 * (layers * (2 * PROJECTIONS + 4 * WIDTH * width + scores) + 2 * WIDTH * VOCAB)


def test_steps_of_equal_flops():
    runs = [{"model.schedule": "full"}, {"model.schedule": "3x(full)", "train.seed": 1}, {"model.schedule": "5x(full)"}]
    matched = match_runs(CONFIG, runs, read_match("flops:1e9"))
    for layers, run, overrides in zip((1, 3, 5), matched, runs, strict=True):
        each = BATCH * LENGTH * training_flops(layers)
        label = f"schedule={overrides['model.schedule']}"
        assert run.overrides == overrides | {"train.steps": round(1e9 / each), "label": label}
        assert run.cost == pytest.approx(each * round(1e9 / each), rel=1e-12)
        assert abs(run.deviation) <= 0.01
    assert "flops" in str(matched[0])
    assert "train.steps=" in str(matched[0])
    # The runs stay apart, and seeds of one schedule keep one label.
    assert [run.label for run in plan_runs(CONFIG, [run.overrides for run in matched])] == [
        "schedule=full",
        "schedule=3x(full)",
        "schedule=5x(full)",
    ]


def test_the_cost_of_the_first_run():
    runs = [{"model.schedule": "4x(full)"}, {"model.schedule": "2x(full)", "label": "shallow"}]
    first, second = match_runs(CONFIG, runs, read_match("flops:first"), {"train.steps": "100"})
    assert (first.deviation, first.adjusted) == (0, {"train.steps": 100})
    assert second.adjusted == {"train.steps": round(100 * training_flops(4) / training_flops(2))}
    assert second.overrides["label"] == "shallow"


def test_widths_of_equal_parameters():
    matched = match_runs(CONFIG, [{"model.schedule": f"{n}x(full)"} for n in (2, 4)], read_match("parameters:20000"))
    for layers, run in zip((2, 4), matched, strict=True):
        width = min(range(8, 999, 8), key=lambda width: abs(parameters(layers, width) - 20_000))
        assert run.adjusted == {"model.layers.full.mlp.width": width}
        assert run.cost == parameters(layers, width)


def test_widths_keep_their_proportions():
    widest = {"model.layers.local.mlp.width": 64, "model.layers.full.mlp.width": 32}
    (run,) = match_runs(CONFIG, [{"model.schedule": "local full"}], read_match("parameters:60000"), widest)
    widths = [run.adjusted[f"model.layers.{name}.mlp.width"] for name in ("local", "full")]
    assert set(run.adjusted) == set(widest)  # the layers of the schedule, and no others
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.02)
    assert run.cost == parameters(1, widths[0]) + parameters(1, widths[1]) - VOCAB * WIDTH - WIDTH


def test_an_explicit_key():
    (run,) = match_runs(CONFIG, [{"model.schedule": "full"}], read_match("parameters:9000:model.layers.full.mlp.width"))
    assert run.adjusted == {"model.layers.full.mlp.width": round((9000 - parameters(1, 0)) / (2 * WIDTH))}


def test_windows_of_equal_caches():
    runs = [{"model.schedule": schedule, LOCAL: "causal & window({})"} for schedule in ("local", "2x(local)")]
    matched = match_runs(CONFIG, runs, read_match(f"kv:1280:{LOCAL}"))
    key = 2 * 4 * KV_HEADS * HEAD_WIDTH  # bytes of a key and a value, float32
    for layers, run in zip((1, 2), matched, strict=True):
        slots = 1280 // key // layers
        assert run.adjusted == {LOCAL: f"causal & window({slots - 1})"}  # a window counts the keys before the query
        assert run.cost == 1280


def test_depth_is_text_too():
    (run,) = match_runs(CONFIG, [{"model.schedule": "{}x(full)"}], read_match("parameters:50000:model.schedule"))
    layer = parameters(1, 16) - parameters(0, 16)
    assert run.adjusted == {"model.schedule": f"{round((50_000 - parameters(0, 16)) / layer)}x(full)"}


INVALID = {
    "quantity": "flop:1e9",
    "no_target": "flops",
    "negative": "flops:-1",
    "nan": "flops:nan",
    "no_key": "kv:100",
    "steps_too_coarse": "flops:1",
    "widths_too_large": "parameters:100",
    "window_too_small": f"kv:1e9:{LOCAL}",
    "unknown_key": "flops:1e9:train.stepz",
    "boolean": "flops:1e9:model.tied",
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_budgets(case):
    window = {LOCAL: "causal & window({})"} if LOCAL in INVALID[case] else {}
    overrides = {"model.schedule": "local" if window else "full"} | window
    with rejects((BudgetError, ConfigError), "train.stepz" if case == "unknown_key" else "match"):
        match_runs(CONFIG, [overrides], read_match(INVALID[case]))


def test_an_invalid_value_names_run_and_key():
    with rejects(BudgetError, "kv_heads="):
        match_runs(CONFIG, [{"model.schedule": "full"}], read_match("parameters:1e5:model.layers.full.mixer.kv_heads"))


def test_a_falling_quantity_is_rejected():
    with rejects(BudgetError, "match"):
        match_runs(
            CONFIG,
            [{"model.schedule": "local", LOCAL: "causal & strided({})"}],
            read_match(f"flops_per_token:20000:{LOCAL}"),
        )


def test_nearest_of_rising_values():
    draw = random.Random(0)
    for _ in range(200):
        values = sorted(draw.choice([draw.random() * 100, draw.randrange(20)]) for _ in range(draw.randrange(1, 60)))
        values += [values[-1]] * 200
        calls = []

        def value(number, values=values, calls=calls):
            calls.append(number)
            return values[number - 1]

        target = draw.random() * 110
        number = budget.find_nearest(value, draw.randrange(1, 60), target)
        nearest = min(abs(other - target) for other in values)
        # Where the walk upwards meets two equal values it stops, so only values that rise all the way are certain.
        if len(set(values)) == len(values) - 200:
            assert abs(values[number - 1] - target) == nearest
        assert len(set(calls)) <= 24


def test_a_linear_quantity_needs_few_accounts():
    calls = set()

    def value(number):
        calls.add(number)
        return 7.0 * number + 1000

    assert budget.find_nearest(value, 100, 7_000_000) == bisect.bisect(range(10**7), 6_999_000, key=lambda n: 7 * n) - 1
    assert len(calls) < 24


def test_the_verb_prints_what_it_matched(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    axes = 'model.schedule=["full", "2x(full)"];seed=range(2)'
    sweep(axes, CONFIG, {}, tmp_path, console, print_only=True, match=read_match("flops:1e9"))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["schedule=full", "schedule=2x(full)"]
    assert sum("--config.train.steps=" in line for line in lines) == 4
