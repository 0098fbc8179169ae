"""Matched budgets, held against what is worked out by hand for the small model of `recipe.py`."""

import bisect
import io
import random

import pytest
from rich.console import Console

from sparsejax.config import ConfigError
from sparsejax.sweep import SweepError, match, match_runs, plan_runs, read_match
from sparsejax.sweep.launch import sweep
from tests.train.runs import RECIPE

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
    found = match_runs(CONFIG, runs, read_match("flops:1e9"))
    for layers, one, own in zip((1, 3, 5), found, runs, strict=True):
        each = BATCH * LENGTH * training_flops(layers)
        assert one.overrides == own | {"train.steps": round(1e9 / each), "label": f"schedule={own['model.schedule']}"}
        assert one.reached == pytest.approx(each * round(1e9 / each), rel=1e-12)
        assert abs(one.off) <= 0.01
    assert "flops" in str(found[0])
    assert "train.steps=" in str(found[0])
    # The runs stay apart, and seeds of one schedule keep one label.
    assert [run.label for run in plan_runs(CONFIG, [one.overrides for one in found])] == [
        "schedule=full",
        "schedule=3x(full)",
        "schedule=5x(full)",
    ]


def test_as_much_as_the_first_run():
    runs = [{"model.schedule": "4x(full)"}, {"model.schedule": "2x(full)", "label": "shallow"}]
    first, second = match_runs(CONFIG, runs, read_match("flops:first"), {"train.steps": "100"})
    assert (first.off, first.turned) == (0, {"train.steps": 100})
    assert second.turned == {"train.steps": round(100 * training_flops(4) / training_flops(2))}
    assert second.overrides["label"] == "shallow"


def test_widths_of_equal_parameters():
    found = match_runs(CONFIG, [{"model.schedule": f"{n}x(full)"} for n in (2, 4)], read_match("parameters:20000"))
    for layers, one in zip((2, 4), found, strict=True):
        width = min(range(8, 999, 8), key=lambda width: abs(parameters(layers, width) - 20_000))
        assert one.turned == {"model.layers.full.mlp.width": width}
        assert one.reached == parameters(layers, width)


def test_widths_keep_their_proportions():
    given = {"model.layers.local.mlp.width": 64, "model.layers.full.mlp.width": 32}
    (one,) = match_runs(CONFIG, [{"model.schedule": "local full"}], read_match("parameters:60000"), given)
    widths = [one.turned[f"model.layers.{name}.mlp.width"] for name in ("local", "full")]
    assert set(one.turned) == set(given)  # the layers of the schedule, and no others
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.02)
    assert one.reached == parameters(1, widths[0]) + parameters(1, widths[1]) - VOCAB * WIDTH - WIDTH


def test_a_key_of_ones_own():
    (one,) = match_runs(CONFIG, [{"model.schedule": "full"}], read_match("parameters:9000:model.layers.full.mlp.width"))
    assert one.turned == {"model.layers.full.mlp.width": round((9000 - parameters(1, 0)) / (2 * WIDTH))}


def test_windows_of_equal_caches():
    runs = [{"model.schedule": schedule, LOCAL: "causal & window({})"} for schedule in ("local", "2x(local)")]
    found = match_runs(CONFIG, runs, read_match(f"kv:1280:{LOCAL}"))
    key = 2 * 4 * KV_HEADS * HEAD_WIDTH  # bytes of a key and a value, float32
    for layers, one in zip((1, 2), found, strict=True):
        slots = 1280 // key // layers
        assert one.turned == {LOCAL: f"causal & window({slots - 1})"}  # a window counts the keys before the query
        assert one.reached == 1280


def test_depth_is_text_too():
    (one,) = match_runs(CONFIG, [{"model.schedule": "{}x(full)"}], read_match("parameters:50000:model.schedule"))
    layer = parameters(1, 16) - parameters(0, 16)
    assert one.turned == {"model.schedule": f"{round((50_000 - parameters(0, 16)) / layer)}x(full)"}


REFUSED = {
    "flop:1e9": "QUANTITY:TARGET",
    "flops": "target is a number",
    "flops:-1": "target is a number",
    "flops:nan": "target is a number",
    "kv:100": "needs a key",
    "flops:1": "nearest is",
    "parameters:100": "nearest is",
    f"kv:1e9:{LOCAL}": "nearest is",
    "flops:1e9:train.stepz": "did you mean 'steps'",
    "flops:1e9:model.tied": "can be turned",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_matched_is_one_line(text):
    window = {LOCAL: "causal & window({})"} if LOCAL in text else {}
    overrides = {"model.schedule": "local" if window else "full"} | window
    with pytest.raises((SweepError, ConfigError)) as error:
        match_runs(CONFIG, [overrides], read_match(text))
    assert REFUSED[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_value_names_run_and_key():
    with pytest.raises(SweepError, match=r"schedule=full: with \S*kv_heads=\d+: .*heads"):
        match_runs(CONFIG, [{"model.schedule": "full"}], read_match("parameters:1e5:model.layers.full.mixer.kv_heads"))


def test_a_falling_quantity_is_refused():
    with pytest.raises(SweepError, match="falls"):
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
        asked = []

        def value(number, values=values, asked=asked):
            asked.append(number)
            return values[number - 1]

        target = draw.random() * 110
        number = match.find_nearest(value, draw.randrange(1, 60), target)
        nearest = min(abs(one - target) for one in values)
        # Where the walk upwards meets two equal values it stops, so only values that rise all the way are certain.
        if len(set(values)) == len(values) - 200:
            assert abs(values[number - 1] - target) == nearest
        assert len(set(asked)) <= 24


def test_few_accounts_are_taken_of_a_straight_line():
    asked = set()

    def value(number):
        asked.add(number)
        return 7.0 * number + 1000

    assert match.find_nearest(value, 100, 7_000_000) == bisect.bisect(range(10**7), 6_999_000, key=lambda n: 7 * n) - 1
    assert len(asked) < 24


def test_the_verb_prints_what_it_matched(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    axes = 'model.schedule=["full", "2x(full)"];seed=range(2)'
    sweep(axes, CONFIG, {}, tmp_path, console, dry=True, match=read_match("flops:1e9"))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["schedule=full", "schedule=2x(full)"]
    assert sum("--config.train.steps=" in line for line in lines) == 4
