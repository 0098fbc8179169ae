"""One process and two processes read the same global batches, and train the same model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from sparsejax import sharding
from sparsejax.cli.exit_codes import VERIFICATION_FAILED
from sparsejax.errors import InputError
from sparsejax.runs import list_steps
from sparsejax.signals import INTERRUPTED
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs

GLOO = {"Gloo", "Rank", "is", "connected", "to", "peer", "ranks", "Expected", "number", "of"}


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_read_the_batches_of_one(text):
    port = find_port()

    def start(index, count):
        command = [sys.executable, "-m", "tests.train.share", str(port), str(index), str(count), str(text)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(process):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        *_, line = out.splitlines()
        rows, _, digest = line.rpartition(" ")
        return rows, digest

    single, *pair = [finish(process) for process in [start(0, 1), start(0, 2), start(1, 2)]]
    assert single[0] == "(0, 1)"
    assert [rows for rows, _ in pair] == ["(0, 2)", "(1, 2)"]
    assert {digest for _, digest in pair} == {single[1]}


def start_pair(workdir, keys, *options):
    """Starts two processes that train together."""
    arguments = [f"--config={runs.RECIPE}", f"--workdir={workdir.path}", *options]
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    address = f"127.0.0.1:{find_port()}"
    return [runs.start("train", *arguments, f"--distributed={address},{index}/2") for index in range(2)]


LEAKING = """
import dataclasses
import jax.numpy as jnp
from sparsejax import layers

@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakingConfig(layers.MixerConfig):
    pass

@layers.register("leaking", LeakingConfig)
class Leaking(layers.Mixer):
    def __call__(self, x, context=layers.EMPTY):
        return x + jnp.roll(x, 1, axis=1)
"""


def test_processes_agree_on_a_failed_check(text, tmp_path):
    """The first process checks, and both stop before the first checkpoint."""
    workdir = Workdir(tmp_path / "two")
    (tmp_path / "leaking.py").write_text(LEAKING)
    keys = {"data.files": text, "model.schedule": "full", "model.layers.full.mixer.kind": "leaking"}
    pair = start_pair(workdir, keys | {"train.check": True}, f"--import={tmp_path / 'leaking.py'}")
    for code, _, err in [runs.finish(process) for process in pair]:
        assert code == VERIFICATION_FAILED, err
        assert "sparsejax: causality: the logits at position 0 change" in err
    assert list_steps(workdir.checkpoints) == []


def test_processes_agree_on_a_signal(text, tmp_path):
    """SIGTERM to one of them stops both within seconds, although they log once in a long time."""
    workdir = Workdir(tmp_path / "two")
    keys = {
        "data.files": text,
        "train.steps": 10**6,
        "train.log_every": 10**6,
        "eval.every": 20,
        "checkpoint.every": 20,
        "model.schedule": "full",
        "train.check": True,
    }
    pair = start_pair(workdir, keys)
    while not (workdir.checkpoints / "20").is_dir():
        assert pair[0].poll() is None
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)
    assert [certificate["passed"] for certificate in read_json(workdir.certificate)] == [True]
    start = time.monotonic()
    (code, _, err), (second_code, _, second_err) = [runs.finish(process) for process in pair]
    assert (code, second_code) == (INTERRUPTED, INTERRUPTED), err + second_err
    assert time.monotonic() - start < 60
    assert list_steps(workdir.checkpoints)[-1] >= 20


def test_two_processes_train_together(trained, text, tmp_path):
    """Like one process; the first one prints and writes, and one process resumes their run."""
    workdir = tmp_path / "two"
    arguments = [f"--config={runs.RECIPE}", f"--config.data.files={text}", "--config.model.dropout=0.1"]
    arguments += ["--config.sharding.fsdp=2", f"--workdir={workdir}"]
    address = f"127.0.0.1:{find_port()}"
    pair = [runs.start("train", *arguments, f"--distributed={address},{index}/2", devices=2) for index in range(2)]
    (code, out, err), (second_code, second_out, second_err) = [runs.finish(process) for process in pair]
    assert (code, second_code) == (0, 0), err + second_err
    assert "validation:" in out
    # The threads of Gloo print too, and their lines mix.
    assert set(re.findall(r"[A-Za-z]+", second_out)) <= GLOO
    alone, together = (read_rows(Workdir(path).metrics) for path in (trained[0], workdir))
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for a, b in zip(alone, together, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in trained[0].iterdir()}
    assert "at step 20\n" in runs.train_here(runs.load(text, {"model.dropout": 0.1}), workdir)


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:1,2/2", "127.0.0.1,0/2"], ids=["text", "index", "port"])
def test_an_invalid_address_is_named(address):
    with rejects(InputError, "distributed"):
        sharding.initialize_distributed(address)
