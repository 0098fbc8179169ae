"""A signal or a kill between a save and the row of its step costs no training and changes no number."""

import itertools
import os
import random
import signal
import threading
import time

import pytest
from rich.console import Console

from sparsejax.inference import evaluate
from sparsejax.runs import list_steps, read_arrays
from sparsejax.signals import INTERRUPTED, Interrupted, StopSignals, call_interruptibly
from sparsejax.train.certify import ModelCheck
from sparsejax.train.interruption import PERIOD, StopRequests, _Schedule
from sparsejax.train.runtime import Evaluator
from sparsejax.workdir import Workdir, read_rows
from tests.messages import check_message
from tests.train import runs


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing after it is written."""


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("undisturbed") / "run")
    runs.train_here(runs.load(text, CADENCES), workdir.path)
    return workdir


CADENCES = {"eval.every": 4, "checkpoint.every": 8, "train.steps": 18, "train.log_every": 3}


def assert_same_run(workdir, undisturbed):
    for name in ("metrics", "metrics_table", "result"):
        assert getattr(workdir, name).read_bytes() == getattr(undisturbed, name).read_bytes(), name
    assert list_steps(workdir.checkpoints) == list_steps(undisturbed.checkpoints)
    last = list_steps(workdir.checkpoints)[-1]
    runs.assert_same_bits(read_arrays(workdir.checkpoints, last), read_arrays(undisturbed.checkpoints, last))


def disturb_evaluation(monkeypatch, number, disturb, batch=1):
    """Calls `disturb` before a batch of the evaluation `number`, counted from 1."""
    numbers = iter(range(1, 1000))
    evaluated = Evaluator.evaluate

    def evaluate_and_disturb(self, state, limit, before_batch):
        current, batches = next(numbers), iter(range(1000))

        def before():
            if current == number and next(batches) == batch:
                disturb()
            before_batch()

        return evaluated(self, state, limit, before)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate_and_disturb)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_signal_in_an_evaluation_saves_its_step(text, undisturbed, tmp_path, monkeypatch, number):
    """Evaluations follow the steps 4, 8, 12, 16 and 18, of which 8, 16 and 18 are due for a checkpoint."""
    workdir, step = Workdir(tmp_path / "run"), [4, 8, 12, 16, 18][number - 1]
    with monkeypatch.context() as patch:
        disturb_evaluation(patch, number, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match=f"SIGTERM at step {step};"):
            runs.train_here(runs.load(text, CADENCES), workdir.path)
    assert list_steps(workdir.checkpoints)[-1] == step
    assert read_rows(workdir.metrics)[-1]["step"] < step
    assert f"resuming {workdir.path} at step {step}" in runs.train_here(runs.load(text, CADENCES), workdir.path)
    assert_same_run(workdir, undisturbed)


def test_a_kill_in_an_evaluation_loses_no_training(text, undisturbed, tmp_path, monkeypatch):
    workdir, step = Workdir(tmp_path / "run"), 18

    def kill():
        while step not in list_steps(workdir.checkpoints):  # the save runs in the background
            time.sleep(0.01)
        raise Killed

    with monkeypatch.context() as patch:
        disturb_evaluation(patch, 5, kill)
        with pytest.raises(Killed):
            runs.train_here(runs.load(text, CADENCES), workdir.path)
    assert f"resuming {workdir.path} at step {step}" in runs.train_here(runs.load(text, CADENCES), workdir.path)
    assert_same_run(workdir, undisturbed)


def test_the_final_evaluation_of_a_process_hears_a_signal(tmp_path):
    workdir = Workdir(tmp_path / "run")
    files = tmp_path / "long.txt"
    files.write_text("the final evaluation takes many seconds " * 80_000)
    keys = {
        "data.files": files,
        "train.steps": 2,
        "eval.every": 2,
        "checkpoint.every": 2,
        "eval.batch": 1,
        "eval.batches": 1,
    }
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    process = runs.start("train", f"--config={runs.RECIPE}", f"--workdir={workdir.path}", *overrides)
    while not (workdir.checkpoints / "2").is_dir():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    code, _, err = runs.finish(process)
    assert code == INTERRUPTED, err
    check_message(err.strip())
    assert list_steps(workdir.checkpoints) == [2]
    assert not workdir.result.exists()


def test_a_process_that_tokenizes_hears_a_signal(tmp_path):
    """It leaves neither a partial entry in the cache nor a workdir."""
    cache, files, draw = tmp_path / "cache", tmp_path / "words.txt", random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(2000)]
    files.write_text("\n".join(" ".join(draw.choices(words, k=20)) for _ in range(60_000)))
    keys = {"data.files": files, "data.cache": cache, "data.tokenizer": "bpe:300", "model.vocab": 300}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    process = runs.start("train", f"--config={runs.RECIPE}", f"--workdir={tmp_path / 'run'}", *overrides)
    while not any(path.is_dir() for path in cache.glob("*.part")):
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    code, _, err = runs.finish(process)
    assert code == INTERRUPTED, err
    check_message(err.strip())
    assert not list(cache.glob("*.part"))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_asks_before_every_batch():
    asked = []
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda parameters, batch: 1 / 0, {}, [{}], lambda: asked.append(1))
    assert asked == [1]


def leave(block):
    """Calls `block` while signals interrupt it; returns the seconds that this took."""
    start = time.monotonic()
    with StopSignals() as signals, signals.raising("while reading"):
        block()
    return time.monotonic() - start


def test_a_block_without_work_to_save_is_left_at_once():
    cleaned = []

    def wait():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(1)

    with pytest.raises(Interrupted, match="SIGTERM while reading"):
        leave(wait)
    assert cleaned == [1]


def test_an_error_that_a_library_makes_of_the_signal_is_no_failure():
    def fail():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("wrapped") from None

    with pytest.raises(Interrupted):
        leave(fail)
    with pytest.raises(ZeroDivisionError):
        leave(lambda: 1 / 0)


def test_native_code_is_left_at_once():
    left = []

    def work(items):
        next(iter(items))
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(20)  # stands for native code, which hears no signal
        left.append(1)

    with pytest.raises(Interrupted):
        leave(lambda: call_interruptibly(work, range(5)))
    assert not left
    assert call_interruptibly(sum, range(5)) == 10
    with pytest.raises(ZeroDivisionError):
        call_interruptibly(lambda items: 1 / 0, [])


@pytest.mark.parametrize("duration", [0.001, 0.4, 10.0])
def test_processes_exchange_every_few_seconds(duration):
    schedule, now, exchanges = _Schedule(), 0.0, []
    for _ in range(round(600 / duration) if duration < 1 else 200):
        now += duration
        if schedule.is_due():
            exchanges.append(now)
            schedule.start(schedule.next_interval(now), now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(exchanges)]
    assert max(gaps) <= max(PERIOD + duration, duration)
    assert sum(gaps[20:]) / len(gaps[20:]) == pytest.approx(max(PERIOD, duration), rel=0.2)


def test_one_process_needs_no_exchange(tmp_path):
    with StopSignals() as signals:
        requests = StopRequests(signals, ModelCheck(Workdir(tmp_path), [], Console()))
        assert requests.poll("steps") is None
        signal.raise_signal(signal.SIGTERM)
        assert requests.poll("steps") == requests.poll("other") == "SIGTERM"
        with pytest.raises(Interrupted, match="SIGTERM at step 7"):
            requests.check(7, "steps")
