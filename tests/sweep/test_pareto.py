"""Fronts, held against a plain loop over all pairs; what is written of them."""

import csv
import random

import pytest
from sparsejax.sweep.front import COMPLETE, FAILED, PRUNED, Objective, Outcome, find_best, write_config, write_outcomes

from sparsejax import config as configs
from sparsejax.sweep import plan_runs
from tests.train.runs import RECIPE

LOSS, BYTES = Objective("eval/loss", most=False), Objective("kv", most=False)
ACCURACY = Objective("eval/accuracy", most=True)


def outcome(number, *values, state=COMPLETE, reports=None, **overrides):
    return Outcome(number, state, values, reports or {}, overrides, f"run{number}")


def beaten(one, others, signs):
    """Whether any of the others is nowhere worse and somewhere better."""
    for other in others:
        gains = [sign * (a - b) for sign, a, b in zip(signs, other, one, strict=True)]
        if min(gains) >= 0 and max(gains) > 0:
            return True
    return False


@pytest.mark.parametrize("objectives", [(LOSS, BYTES), (ACCURACY, BYTES), (LOSS, ACCURACY)])
def test_fronts(objectives):
    draw = random.Random(0)
    signs = [1 if objective.most else -1 for objective in objectives]
    for _ in range(100):
        points = [(draw.randrange(8), draw.randrange(8)) for _ in range(draw.randrange(1, 20))]
        found = find_best([outcome(i, *point) for i, point in enumerate(points)], objectives)
        assert {one.values for one in found} == {point for point in points if not beaten(point, points, signs)}
        assert len({one.values for one in found}) == len(found)
        assert all(points.index(one.values) == one.number for one in found)  # of equal ones the first
        losses = [-signs[1] * one.values[1] for one in found]
        assert losses == sorted(losses)


def test_one_objective_has_one_best():
    outcomes = [outcome(0, 2.0), outcome(1, 1.0), outcome(2, state=PRUNED), outcome(3, 1.0), outcome(4, state=FAILED)]
    assert [one.number for one in find_best(outcomes, [LOSS])] == [1]
    assert [one.number for one in find_best(outcomes, [ACCURACY])] == [0]
    assert find_best(outcomes[2:3], [LOSS]) == []


def test_a_config_file_gives_the_settings_back(tmp_path):
    (run,) = plan_runs(str(RECIPE), [{"model.schedule": "2x(ssm) full", "optimizer.learning_rate": 3e-4}])
    text = write_config(run.settings.to_dict(), "A title.")
    path = tmp_path / "best.py"
    path.write_text(text)
    assert configs.digest(configs.load(str(path))) == configs.digest(run.settings)
    assert text.startswith('"""A title."""\n')
    assert max(map(len, text.splitlines())) <= 120
    assert str(tmp_path) not in text
    assert '            "train": {' in text


def write(tmp_path, objectives, outcomes):
    front = find_best(outcomes, objectives)
    runs = [plan_runs(str(RECIPE), [one.overrides])[0] for one in front]
    write_outcomes(tmp_path, outcomes, objectives, list(zip(front, runs, strict=True)))
    return front


def test_what_is_written_of_two_objectives(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra search")
    key = "model.layers.local.mixer.pattern"
    outcomes = [
        outcome(0, 2.0, 100.0, **{"model.schedule": "full"}),
        outcome(1, 3.0, 10.0, **{"model.schedule": "local", key: "causal & (window(3) | sink(1))"}),
        outcome(2, 3.5, 20.0, **{"model.schedule": "2x(local)"}),
        outcome(3, state=FAILED, **{"model.schedule": "ssm"}),
    ]
    (tmp_path / "front-3.py").touch()  # of a front that was longer
    assert [one.number for one in write(tmp_path, [LOSS, BYTES], outcomes)] == [1, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"trials.csv", *(f"pareto.{e}" for e in ("csv", "md", "png", "svg")), "front-1.py", "front-2.py"}
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["state"] for row in rows] == [COMPLETE, COMPLETE, COMPLETE, FAILED]
    assert (rows[1]["eval/loss"], rows[1]["kv"], rows[1]["model.schedule"]) == ("3.0", "10.0", "local")
    assert [row["trial"] for row in csv.DictReader((tmp_path / "pareto.csv").open())] == ["1", "0"]
    lines = (tmp_path / "pareto.md").read_text().splitlines()
    assert lines[0] == f"|  | trial | eval/loss | kv | {key} | model.schedule |"
    assert lines[2] == "| 1 | 1 | 3 | 10 | causal & (window(3) \\| sink(1)) | local |"
    assert configs.load(str(tmp_path / "front-1.py")).model.schedule == "local"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, [LOSS, BYTES], outcomes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # equal searches leave equal files


def test_what_is_written_of_one_objective(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra search")
    outcomes = [
        outcome(0, 2.0, reports={5: 3.0, 10: 2.0}, **{"train.steps": "10"}),
        outcome(1, state=PRUNED, reports={5: 4.0}, **{"train.steps": "11"}),
        outcome(2, state=PRUNED),  # left out by the search itself
    ]
    write(tmp_path, [LOSS], outcomes)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trials.csv",
        *(f"best.{ending}" for ending in ("csv", "md", "png", "svg", "py")),
    }
    assert [row["step"] for row in csv.DictReader((tmp_path / "trials.csv").open())] == ["10", "5", ""]
    assert configs.load(str(tmp_path / "best.py")).train.steps == 10
