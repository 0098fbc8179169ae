"""The check of a run's models: beside the first steps, once per model, and in all processes."""

import dataclasses
import os
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from sparsejax import cli, layers
from sparsejax.check import Certificate, CheckFailed, Finding
from sparsejax.cli.exit_codes import VERIFICATION_FAILED
from sparsejax.runs import list_steps, read_arrays
from sparsejax.signals import Interrupted
from sparsejax.train import certify
from sparsejax.train.writers import Writers
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import check_message
from tests.train import runs

KEYS = {
    "train.check": True,
    "train.steps": 6,
    "checkpoint.every": 4,
    "checkpoint.keep_best": 0,
    "eval.every": 3,
    "model.schedule": "full",
}
FAILURE = Finding("causality", False, "the logits at position 2 change")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this machine."""
    monkeypatch.setenv("SPARSEJAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "certificates"


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path / "run")


def load(text, **overrides):
    return runs.load(text, KEYS | {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture
def replace_check(monkeypatch):
    """Replaces `check_model` by a function from `report` to findings; returns the models that are checked."""

    def replace(check):
        models = []

        def check_model(config, length, report):
            models.append((config.schedule, length))
            return Certificate(tuple(check(report)), length, "", 1.0)

        monkeypatch.setattr(certify, "check_model", check_model)
        return models

    return replace


def passes(report):
    return [Finding("causality", True, ""), Finding("scan", None, "")]


def block(report):
    """A check that does not end before it is abandoned."""
    while True:
        report(FAILURE)
        time.sleep(0.01)


def assert_no_thread():
    assert "check" not in {thread.name for thread in threading.enumerate()}


def test_a_run_is_checked_without_changing_a_number(text, workdir, tmp_path, cache):
    printed = runs.train_here(load(text), workdir.path)
    (certificate,) = read_json(workdir.certificate)
    assert certificate["passed"]
    assert certificate["length"] == 32
    assert "check: passed" in printed
    assert [path.stem for path in cache.iterdir()] == [certificate["key"]]
    other = Workdir(tmp_path / "unchecked")
    assert "check: " not in runs.train_here(load(text, train__check=False), other.path)
    assert not other.certificate.exists()
    assert workdir.metrics.read_bytes() == other.metrics.read_bytes()
    runs.assert_same_bits(*(read_arrays(run.checkpoints, 6) for run in (workdir, other)))
    assert_no_thread()


class Circular(layers.Mixer):
    """A mixer of users that reads from the last position."""

    def __call__(self, x, context=layers.EMPTY):
        return x + jnp.roll(x, 1, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircularConfig(layers.MixerConfig):
    pass


def test_a_model_that_leaks_ends_the_run_without_a_checkpoint(registries, text, workdir, capsys, cache):
    layers.register("circular", CircularConfig)(Circular)
    options = {"data.files": text, "model.layers.full.mixer.kind": "circular"} | KEYS
    arguments = [f"--config.{key}={value}" for key, value in options.items()]
    command = ["train", f"--config={runs.RECIPE}", f"--workdir={workdir.path}", *arguments]
    assert cli.main(command) == VERIFICATION_FAILED
    error = capsys.readouterr().err
    assert error.startswith("sparsejax: causality: the logits at position 0 change by up to")
    assert error.endswith("; train.check=false trains the model without a check\n")
    assert error.count("\n") == 1
    assert list_steps(workdir.checkpoints) == []
    assert not workdir.result.exists()
    assert not cache.exists()
    (certificate,) = read_json(workdir.certificate)
    assert not certificate["passed"]
    assert cli.main(command) == VERIFICATION_FAILED  # it is checked again
    assert cli.main([*command, "--config.train.check=false"]) == 0


def test_a_model_is_checked_once(text, workdir, tmp_path, cache, replace_check):
    models = replace_check(passes)
    assert "check: passed 1 checks at 32 tokens in 1.0 s\n" in runs.train_here(load(text), workdir.path)
    runs.train_here(load(text, train__seed=1), tmp_path / "seed")
    assert len(models) == 1
    for path in cache.iterdir():
        path.unlink()
    assert "check: " not in runs.train_here(load(text), workdir.path)  # there is nothing left to train
    extended = runs.train_here(load(text, train__steps=8), workdir.path, extend=True)
    assert "check: passed" in extended
    assert len(models) == 1
    runs.train_here(load(text, model__tied=False), tmp_path / "other")
    next(cache.iterdir()).write_text("{")  # a damaged file
    runs.train_here(load(text, model__tied=False), tmp_path / "again")
    assert len(models) == 3


def test_each_model_of_the_phases_is_checked_at_its_longest_sequences(text, workdir, replace_check):
    models = replace_check(passes)
    phases = {
        "long.start": 2,
        "long.set.data.length": 64,
        "local.start": 4,
        "local.set.model.layers.full.mixer.pattern": "causal & window(3)",
    }
    settings = load(text, **{f"train.phases.{key}": value for key, value in phases.items()})
    printed = runs.train_here(settings, workdir.path)
    assert models == [("full", 64), ("full", 32)]
    assert "check: phase long: passed" in printed
    assert "check: phase local: passed" in printed
    assert len(read_json(workdir.certificate)) == 2


def test_a_check_that_fails_late_stops_at_the_next_step(text, workdir, monkeypatch, replace_check):
    reached = threading.Event()
    write = Writers.write

    def write_and_tell(writers, number, *rows):
        write(writers, number, *rows)
        if number == 3:
            reached.set()

    def fail(report):
        assert reached.wait(60)
        return [FAILURE]

    monkeypatch.setattr(Writers, "write", write_and_tell)
    replace_check(fail)
    with pytest.raises(CheckFailed) as caught:
        runs.train_here(load(text, train__steps=10**6, checkpoint__every=10**6), workdir.path)
    check_message(str(caught.value))
    assert read_rows(workdir.metrics)[-1]["step"] >= 3
    assert list_steps(workdir.checkpoints) == []


def test_the_first_checkpoint_waits_for_the_check(text, workdir, replace_check):
    def fail(report):
        time.sleep(2)
        return [FAILURE]

    replace_check(fail)
    with pytest.raises(CheckFailed):
        runs.train_here(load(text, checkpoint__every=1), workdir.path)
    assert list_steps(workdir.checkpoints) == []


def test_a_failure_of_the_check_itself_ends_the_run(text, workdir, replace_check):
    def fail(report):
        raise ZeroDivisionError("of the check")

    replace_check(fail)
    with pytest.raises(ZeroDivisionError, match="of the check"):
        runs.train_here(load(text), workdir.path)
    assert list_steps(workdir.checkpoints) == []
    assert not workdir.certificate.exists()
    assert_no_thread()


def test_an_interrupted_run_does_not_wait_for_the_check(text, workdir, monkeypatch, replace_check):
    replace_check(block)
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 2)
        with pytest.raises(Interrupted, match="SIGTERM"):
            runs.train_here(load(text), workdir.path)
    assert list_steps(workdir.checkpoints) == [3]
    assert not workdir.certificate.exists()
    assert_no_thread()
    models = replace_check(passes)
    assert "check: passed" in runs.train_here(load(text), workdir.path)
    assert len(models) == 1


def test_a_signal_ends_the_wait_for_the_check(text, workdir, replace_check):
    def block_and_signal(report):
        while not any(row["step"] == 3 for row in read_rows(workdir.metrics)):
            time.sleep(0.01)
        time.sleep(1)  # the run then waits to save step 4
        os.kill(os.getpid(), signal.SIGTERM)
        block(report)

    replace_check(block_and_signal)
    with pytest.raises(Interrupted, match="SIGTERM at step 4"):
        runs.train_here(load(text), workdir.path)
    assert list_steps(workdir.checkpoints) == [4]
    assert_no_thread()


def test_a_model_that_may_leak_is_marked(text, workdir, replace_check):
    replace_check(passes)
    mixer = {"kind": "lsh", "heads": 2, "head_width": 8, "chunk": 8, "buckets": (4,), "hashes": 1}
    mixer |= {"causal": True, "seed": 0}
    overrides = {f"model.layers.full.mixer.{key}": value for key, value in mixer.items()}
    printed = runs.train_here(load(text, model__allow_leaks=True, **overrides), workdir.path)
    assert "but may read the future: model.allow_leaks is true" in printed
