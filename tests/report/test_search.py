"""Pareto fronts, compared with a plain loop over all pairs, and the files of a search."""

import csv
import random

import pytest

from sparsejax import config as configs
from sparsejax.config.write import write_config
from sparsejax.report.search import Objective, find_best, write_results
from sparsejax.sweep import plan_runs
from tests.train.runs import RECIPE

pytest.importorskip("optuna", reason="needs the extra search")
from optuna.trial import TrialState, create_trial

pytestmark = pytest.mark.quick

LOSS, BYTES = Objective("eval/loss", "min"), Objective("kv", "min")
ACCURACY = Objective("eval/accuracy", "max")


def trial(number, *values, state=TrialState.COMPLETE, reports=None, **overrides):
    attributes = {"run": f"run{number}", "overrides": overrides}
    values = values if state is TrialState.COMPLETE else None
    created = create_trial(state=state, values=values, user_attrs=attributes, intermediate_values=reports or {})
    created.number = number
    return created


def dominated(point, others, signs):
    """Whether any of the others is nowhere worse and somewhere better."""
    for other in others:
        gains = [sign * (a - b) for sign, a, b in zip(signs, other, point, strict=True)]
        if min(gains) >= 0 and max(gains) > 0:
            return True
    return False


@pytest.mark.parametrize("objectives", [(LOSS, BYTES), (ACCURACY, BYTES), (LOSS, ACCURACY)])
def test_fronts(objectives):
    draw = random.Random(0)
    signs = [1 if objective.direction == "max" else -1 for objective in objectives]
    for _ in range(100):
        points = [(draw.randrange(8), draw.randrange(8)) for _ in range(draw.randrange(1, 20))]
        front = find_best([trial(i, *point) for i, point in enumerate(points)], objectives)
        assert {tuple(trial.values) for trial in front} == {
            point for point in points if not dominated(point, points, signs)
        }
        assert len({tuple(trial.values) for trial in front}) == len(front)
        assert all(points.index(tuple(trial.values)) == trial.number for trial in front)  # of equal trials the first
        losses = [-signs[1] * trial.values[1] for trial in front]
        assert losses == sorted(losses)


def test_one_objective_has_one_best():
    trials = [
        trial(0, 2.0),
        trial(1, 1.0),
        trial(2, state=TrialState.PRUNED),
        trial(3, 1.0),
        trial(4, state=TrialState.FAIL),
    ]
    assert [trial.number for trial in find_best(trials, [LOSS])] == [1]
    assert [trial.number for trial in find_best(trials, [ACCURACY])] == [0]
    assert find_best(trials[2:3], [LOSS]) == []


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


def write(tmp_path, objectives, trials):
    front = find_best(trials, objectives)
    overrides = {trial.number: trial.user_attrs["overrides"] for trial in front}
    settings = {number: configs.load(str(RECIPE), drawn).to_dict() for number, drawn in overrides.items()}
    write_results(tmp_path, trials, objectives, settings, ["my.parts"])
    return front


def test_files_of_two_objectives(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra search")
    key = "model.layers.local.mixer.pattern"
    trials = [
        trial(0, 2.0, 100.0, **{"model.schedule": "full"}),
        trial(1, 3.0, 10.0, **{"model.schedule": "local", key: "causal & (window(3) | sink(1))"}),
        trial(2, 3.5, 20.0, **{"model.schedule": "2x(local)"}),
        trial(3, state=TrialState.FAIL, **{"model.schedule": "ssm"}),
    ]
    (tmp_path / "pareto-3.py").touch()  # of a longer front
    assert [trial.number for trial in write(tmp_path, [LOSS, BYTES], trials)] == [1, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"trials.csv", *(f"pareto.{e}" for e in ("csv", "md", "png", "svg")), "pareto-1.py", "pareto-2.py"}
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete", "complete", "complete", "failed"]
    assert (rows[1]["eval/loss"], rows[1]["kv"], rows[1]["model.schedule"]) == ("3.0", "10.0", "local")
    assert [row["trial"] for row in csv.DictReader((tmp_path / "pareto.csv").open())] == ["1", "0"]
    lines = (tmp_path / "pareto.md").read_text().splitlines()
    assert lines[0] == f"|  | trial | eval/loss | kv | {key} | model.schedule |"
    assert lines[2] == "| 1 | 1 | 3 | 10 | causal & (window(3) \\| sink(1)) | local |"
    assert configs.load(str(tmp_path / "pareto-1.py")).model.schedule == "local"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, [LOSS, BYTES], trials)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # equal searches leave equal files


def test_files_of_one_objective(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra search")
    trials = [
        trial(0, 2.0, reports={5: 3.0, 10: 2.0}, **{"train.steps": "10"}),
        trial(1, state=TrialState.PRUNED, reports={5: 4.0}, **{"train.steps": "11"}),
        trial(2, state=TrialState.PRUNED),  # skipped by the search itself
    ]
    write(tmp_path, [LOSS], trials)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trials.csv",
        *(f"best.{ending}" for ending in ("csv", "md", "png", "svg", "py")),
    }
    assert [row["step"] for row in csv.DictReader((tmp_path / "trials.csv").open())] == ["10", "5", ""]
    assert configs.load(str(tmp_path / "best.py")).train.steps == 10
    command = "sparsejax train --config=best.py --import=my.parts --workdir=runs/best"
    assert f"\n    {command}\n" in (tmp_path / "best.py").read_text()
