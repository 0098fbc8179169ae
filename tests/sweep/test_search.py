"""Searches whose answer is known: most of them over simulated runs, one over real ones."""

import contextlib
import csv
import gc
import io
import itertools
import json
import math
import os
import signal

import pytest
from rich.console import Console

from sparsejax import config as configs
from sparsejax import schedule
from sparsejax.account import account_model
from sparsejax.budget import read_match
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.signals import Interrupted
from sparsejax.sweep import SweepError, suggest_period
from sparsejax.sweep.supervisor import Supervisor
from sparsejax.workdir import SweepFolder, read_json, read_rows
from tests.messages import check_message, rejects
from tests.train import runs

pytest.importorskip("optuna", reason="needs the extra search")
from sparsejax.sweep.search import Search, read_objectives, read_space, run_search

CONFIG = str(runs.RECIPE)
NAMES = ("ssm", "local", "full")
BEST = ("full", "ssm")  # the best schedule of simulated runs
STEPS, EVERY = 20, 5


def draw(trial):
    return {"model.schedule": suggest_period(trial, NAMES, layers=4, period=2)}


def loss(names, step):
    """Of a simulated run: falls with every layer as in BEST and with every step; different for all schedules."""
    wrong = sum(name != best for name, best in zip(names, itertools.cycle(BEST), strict=False))
    return 1 + wrong + sum(NAMES.index(name) * 0.01 * 3**-position for position, name in enumerate(names)) + 1 / step


class Simulated:
    """An executor whose runs advance by one evaluation per look, unless `event` returns an exit code."""

    poll_interval, detached = 0.0, False

    def __init__(self, jobs=1, event=lambda attempt, step: None):
        self.jobs, self.event, self.launched, self.codes = jobs, event, [], {}

    def launch(self, waiting, live):
        chosen = list(waiting[: self.jobs - len(live)])
        for attempt in chosen:
            attempt.asked = False
            self.codes.pop(attempt.run.name, None)
            self.launched.append(attempt.run.name)
        return chosen

    def ended(self, attempt):
        metrics = attempt.job.result.with_name("metrics.jsonl")
        metrics.parent.mkdir(parents=True, exist_ok=True)
        attempt.job.files.path.parent.mkdir(parents=True, exist_ok=True)
        step = EVERY + max((row["step"] for row in read_rows(metrics)), default=0)
        code = 75 if attempt.asked else self.event(attempt, step)
        if code is None:
            value = loss(attempt.run.checked.model.names, step)
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step, "train/loss": value, "eval/loss": value}) + "\n")
            if step < STEPS:
                return False
            attempt.job.result.write_text(json.dumps({"step": step, "eval/loss": value}))
            code = 0
        self.codes[attempt.run.name] = code
        return True

    def started(self, attempt):
        return True

    def stop(self, attempt):
        attempt.asked = True

    def exit_code(self, attempt):
        return self.codes.get(attempt.run.name)

    def find(self, attempt):
        return False


def make(objective="eval/loss", trials=20, **options):
    return Search(CONFIG, draw, read_objectives(objective), trials, **options)


def run(search, folder, executor=None):
    """The rows of trials.csv, and what was printed."""
    console = Console(file=io.StringIO(), width=300)
    run_search(search, folder, executor or Simulated(), console)
    return list(csv.DictReader((folder / "trials.csv").open())), console.file.getvalue()


def names_of(row):
    return schedule.parse(row["model.schedule"])


def test_the_best_schedule_is_found(tmp_path):
    executor = Simulated()
    rows, printed = run(make(trials=30), tmp_path, executor)
    assert configs.load(str(tmp_path / "best.py")).model.schedule == "2x(full ssm)"
    (best,) = csv.DictReader((tmp_path / "best.csv").open())
    assert float(best["eval/loss"]) == pytest.approx(loss(BEST * 2, STEPS))
    assert len(rows) == 30
    finished = [name for name in executor.launched if SweepFolder(tmp_path).workdir(name).result.exists()]
    assert len(finished) == len(set(finished))  # no run is repeated
    assert len(set(executor.launched)) <= 9 < 30
    assert "sparsejax train" in printed
    assert "--config.model.schedule='2x(full ssm)'" in printed or "'--config.model.schedule=2x(full ssm)'" in printed


def test_successive_halving(tmp_path):
    """The rule: a trial that is not among the best third of those that reached a rung stops there."""
    rows, _ = run(make(sampler="random", trials=25), tmp_path)
    reached = {5: [], 15: []}  # rungs: the first evaluation, and three times as far
    for row in rows:
        expected = STEPS
        for step, values in reached.items():
            value = loss(names_of(row), step)
            values.append(value)
            if value > sorted(values)[max(0, len(values) // 3 - 1)]:
                expected = step
                break
        assert (int(row["step"]), row["state"]) == (expected, "complete" if expected == STEPS else "pruned")
    assert {int(row["step"]) for row in rows} == {5, 15, STEPS}


def test_the_front_of_a_whole_space(tmp_path):
    rows, _ = run(make("eval/loss,kv", trials=45, sampler="random"), tmp_path)
    assert {row["state"] for row in rows} == {"complete"}  # none of several objectives is pruned
    points = {}
    for period in itertools.product(NAMES, repeat=2):
        text = schedule.write(period * 2)
        config = configs.load(CONFIG, {"model.schedule": text})
        layers, _ = account_model(configs.check(config).model, config.data.length)
        points[text] = loss(period * 2, STEPS), sum(layer.cache_bytes for layer in layers)
    assert {row["model.schedule"] for row in rows} == set(points)
    expected = {
        text
        for text, (a, b) in points.items()
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points.values())
    }
    front = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    assert {row["model.schedule"] for row in front} == expected
    assert 1 < len(expected) < len(points)
    for row in front:
        assert (float(row["eval/loss"]), float(row["kv"])) == pytest.approx(points[row["model.schedule"]])
    assert configs.load(str(tmp_path / "pareto-1.py")).model.schedule == front[0]["model.schedule"]


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 12), ("nsga2", 18)])  # beyond the random start
def test_equal_seeds_make_equal_searches(sampler, trials, tmp_path):
    first, second, third = (
        run(make("eval/loss,kv", trials=trials, sampler=sampler, seed=seed), tmp_path / str(i))[0]
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == second != third


class Killed(BaseException):
    """Simulates kill -9: nothing runs on the way out."""


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_killed_search_loses_nothing(jobs, tmp_path, monkeypatch):
    search = make(trials=12)
    whole, _ = run(search, tmp_path / "whole", Simulated(jobs))
    folder, looks, deaths = tmp_path / "killed", itertools.count(), 0

    def die(attempt, step):
        if next(looks) % 3 == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "stop_all", lambda self: None)
        for _ in range(30):
            try:
                rows, _ = run(search, folder, Simulated(jobs, die))
                break
            except Killed:
                deaths += 1
                with (folder / "study.journal").open("a") as file:
                    file.write('{"op_code":')  # it died while it wrote, and held the lock
                (folder / "study.journal.lock").symlink_to(folder / "study.journal")
    assert deaths > 3
    assert [row["trial"] for row in rows] == [str(number) for number in range(12)]
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    if jobs == 1:
        assert rows == whole
        assert (folder / "best.py").read_bytes() == (tmp_path / "whole" / "best.py").read_bytes()


def test_a_search_can_be_extended(tmp_path):
    first, _ = run(make(trials=5), tmp_path)
    executor = Simulated()
    assert run(make(trials=5), tmp_path, executor)[0] == first
    assert executor.launched == []
    extended, _ = run(make(trials=8), tmp_path)
    assert (extended[:5], len(extended)) == (first, 8)


def test_a_failed_run_is_reported_with_its_log(tmp_path):
    def fail(attempt, step):
        if attempt.run.checked.model.names[0] == "ssm":
            attempt.job.files.log.write_text("first\nout of memory\n")
            return 1
        return None

    rows, printed = run(make(sampler="random"), tmp_path, Simulated(event=fail))
    assert {row["state"] for row in rows if names_of(row)[0] == "ssm"} == {"failed"}
    assert {row["state"] for row in rows if names_of(row)[0] != "ssm"} <= {"complete", "pruned"}
    assert "exit code 1" in printed
    assert "    out of memory" in printed
    with rejects(SweepError, "search"):
        run(make(trials=2), tmp_path / "other", Simulated(event=lambda attempt, step: 1))


def test_a_run_that_others_stop_resumes(tmp_path):
    stops = iter([75, None, -15])
    executor = Simulated(event=lambda attempt, step: next(stops, None))
    (row,), _ = run(make(trials=1), tmp_path, executor)
    assert (row["state"], len(executor.launched)) == ("complete", 3)


def test_a_search_that_is_asked_to_stop_asks_its_runs(tmp_path):
    asked = []

    class Asked(Simulated):
        def stop(self, attempt):
            asked.append(attempt.run.name)
            super().stop(attempt)

    def ask(attempt, step):
        if step == 10 and not asked:
            os.kill(os.getpid(), signal.SIGTERM)

    with rejects(Interrupted, "SIGTERM"):
        run(make(trials=4), tmp_path, Asked(event=ask))
    assert len(asked) == 1
    assert [row["state"] for row in run(make(trials=4), tmp_path)[0]] == [
        row["state"] for row in run(make(trials=4), tmp_path / "whole")[0]
    ]


def test_trials_that_search_skips(tmp_path):
    from optuna import TrialPruned

    def choosy(trial):
        if trial.number % 2:
            raise TrialPruned
        return draw(trial)

    rows, _ = run(Search(CONFIG, choosy, read_objectives("eval/loss"), 4), tmp_path)
    assert [row["run"] == "" for row in rows] == [False, True, False, True]


def test_trials_of_equal_flops(tmp_path):
    def playing(attempt, step):
        steps.append(attempt.run.checked.train.steps)

    steps = []
    run(make(trials=4, match=read_match("flops:1e9"), sampler="random"), tmp_path, Simulated(event=playing))
    for row in csv.DictReader((tmp_path / "trials.csv").open()):
        config = configs.check(configs.load(CONFIG, {key: str(row[key]) for key in ("model.schedule", "train.steps")}))
        layers, rest = account_model(config.model, 32)
        each = 4 * 32 * sum(part.training_flops for part in (*layers, rest))
        assert config.train.steps * each == pytest.approx(1e9, rel=0.01)


def test_seconds(tmp_path):
    rates = iter([4.0, 2.0, 1.0, 0.5] * 2)

    def keep_time(attempt, step):
        with attempt.job.result.with_name("timing.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "steps_per_second": next(rates)}) + "\n")

    rows, _ = run(make("eval/loss,seconds", trials=2), tmp_path, Simulated(event=keep_time))
    assert [float(row["seconds"]) for row in rows] == [20 / 1.5] * 2
    assert math.isfinite(float(rows[0]["eval/loss"]))


def searching(draw):
    return Search(CONFIG, draw, read_objectives("eval/loss"), 1)


INVALID = {
    "other_search": ("workdir", lambda folder: (run(make(trials=1), folder), run(make(trials=1, seed=5), folder))),
    "metric": ("objective", lambda folder: run(make("eval/accuracy"), folder)),
    "max_steps": ("max_steps", lambda folder: run(make(max_steps=10), folder)),
    "no_target": ("match", lambda folder: make(match=read_match("flops:first"))),
    "trials": ("trials", lambda folder: make(trials=0)),
    "sampler": ("sampler", lambda folder: make(sampler="grid")),
    "no_dict": ("space", lambda folder: run(searching(lambda trial: None), folder)),
    "exception": ("space", lambda folder: run(searching(lambda trial: 1 / 0), folder)),
    "key": ("train.stepz", lambda folder: run(searching(lambda trial: {"train.stepz": 1}), folder)),
    "three_objectives": ("objective", lambda folder: read_objectives("eval/loss,kv,flops")),
    "no_metric": ("objective", lambda folder: read_objectives("kv,eval/loss")),
    "cost": ("objective", lambda folder: read_objectives("eval/loss,bytes")),
    "file": ("space", lambda folder: read_space("nowhere.py")),
    "function": ("space", lambda folder: read_space(f"{CONFIG}:nothing")),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_searches(case, tmp_path):
    argument, call = INVALID[case]
    with rejects(SweepError, argument):
        call(tmp_path)


COMMAND_LINES = {
    "no_trials": ["search", "--space=x.py"],
    "no_space": ["search", "--trials=3"],
    "retry": ["search", "--space=x.py", "--trials=3", "--retry"],
    "file": ["search", "--space=x.py", "--trials=3"],
    "sampler": ["search", "--space=x.py", "--trials=3", "--sampler=grid"],
    "trials": ["sweep", "--sweep=seed=range(3)", "--trials=3"],
    "match": ["sweep", "--sweep=seed=range(3)", "--match=flops"],
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_invalid_command_lines(case, tmp_path, capsys):
    verb, *options = COMMAND_LINES[case]
    assert main([verb, f"--config={CONFIG}", f"--workdir={tmp_path / 'a'}", *options]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    check_message(err.strip())
    assert not (tmp_path / "a").exists()


SPACE = """
from sparsejax.sweep import suggest_placement

def space(trial):
    return {"model.schedule": suggest_placement(trial, "local", "full", layers=2, counts=(0, 1, 2))}
"""


def test_a_search_by_real_runs(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="needs the extra launch")
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    text = runs.write_text(tmp_path / "text")
    (tmp_path / "space.py").write_text(SPACE)
    folder = tmp_path / "search"
    command = ["search", f"--config={CONFIG}", f"--space={tmp_path / 'space.py'}", f"--workdir={folder}", "--jobs=1"]
    command += ["--trials=4", "--objective=eval/loss,kv", "--sampler=random", f"--config.data.files={text}"]
    command += [
        "--config.train.steps=4",
        "--config.eval.every=2",
        "--config.checkpoint.every=4",
        "--config.eval.batches=1",
    ]
    gc.disable()  # as in a process that exits after the search: the destructor of a job that is still alive fails there
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(command) == 0
        assert not any(isinstance(thing, submitit.LocalJob) for thing in gc.get_objects())
    finally:
        gc.enable()
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * 4
    for row in rows:
        result = json.loads(SweepFolder(folder).workdir(row["run"]).result.read_text())
        assert float(row["eval/loss"]) == result["eval/loss"]
    assert f"wrote {folder / 'pareto-1.py'}" in said.getvalue()
    front = configs.load(str(folder / "pareto-1.py"))
    first = next(csv.DictReader((folder / "pareto.csv").open()))
    recorded = read_json(SweepFolder(folder).workdir(first["run"]).config)
    assert json.loads(json.dumps(front.to_dict())) == recorded  # JSON has no tuples
