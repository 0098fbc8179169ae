"""Training runs in this process, or as processes that a test watches, kills and resumes."""

import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from sparsejax import config as configs
from sparsejax.train import train
from sparsejax.train.writers import Writers
from sparsejax.workdir import Workdir, read_rows
from tests.devices import simulate

RECIPE = Path(__file__).with_name("recipe.py")
COMPILED = tempfile.TemporaryDirectory(prefix="sparsejax-compiled-")  # every run compiles the same few programs
NARROW = {"model.layers.local.mixer.pattern": "causal & window(1)", "model.schedule": "2x(ssm local) local"}
ALSO = {"same": {"data.length": 32}, "short": {"data.length": 8}, "narrow": NARROW}  # of the fixture `trained`
TRAINED = {"model.dropout": 0.1} | {
    f"eval.also.{name}.{key}": value for name, overrides in ALSO.items() for key, value in overrides.items()
}


def write_text(folder: Path) -> Path:
    """Writes a folder of small files, enough for a training and a validation side."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        words = (draw.choice(["sparse", "dense", "window", "sink", "scan", "tile"]) for _ in range(40))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def load(text: Path, overrides: dict | None = None) -> ConfigDict:
    """Loads the recipe for a folder of text."""
    return configs.load(str(RECIPE), {"data.files": str(text)} | (overrides or {}))


def train_here(settings: ConfigDict, workdir: Path | str, extend: bool = False) -> str:
    """Trains in this process; returns the printed text."""
    console = Console(file=io.StringIO(), width=160)
    train(settings, workdir, console, extend)
    return console.file.getvalue()


def send_signal_at(monkeypatch, step: int) -> None:
    """Sends SIGTERM to this process as soon as its run has logged `step`."""
    write = Writers.write

    def write_and_signal(writers, number, *rows):
        write(writers, number, *rows)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Writers, "write", write_and_signal)


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the variables of a process that compiles quickly, for `devices` devices on the CPU."""
    cache = {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return cache | simulate(devices)


def start(*arguments: str, devices: int = 1, program: tuple[str, ...] = ("-m", "sparsejax")) -> subprocess.Popen:
    """Starts a Python program, by default the command line, on `devices` devices of the CPU."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=os.environ | environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for the end of a process; returns its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for_row(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns as soon as the run, which logs every step, has logged a step after `step`."""
    while process.poll() is None:
        rows = read_rows(Workdir(workdir).metrics)
        if rows and rows[-1]["step"] > step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before step {step}: {finish(process)}")


def assert_same_bits(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Asserts that arrays are equal, to the last bit."""
    assert arrays.keys() == expected.keys()
    for path, leaf in expected.items():
        assert arrays[path].dtype == leaf.dtype, path
        assert arrays[path].tobytes() == leaf.tobytes(), path
