"""Training runs as processes of their own, to be watched, killed and started again."""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sparsejax.train import read_rows

RECIPE = Path(__file__).with_name("recipe.py")
COMPILED = tempfile.TemporaryDirectory(prefix="sparsejax-compiled-")  # every run compiles the same few programs


def write_text(folder: Path) -> Path:
    """A folder of small files, enough for both sides of a corpus."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(40):
        words = (draw.choice(["sparse", "dense", "window", "sink", "scan", "tile"]) for _ in range(40))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that compiles in no time, for so many devices of the CPU."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    cache = {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*arguments: str, devices: int = 1, program: tuple[str, ...] = ("-m", "sparsejax")) -> subprocess.Popen:
    """Starts a Python program, the command line if no other is named, on so many devices of the CPU."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=os.environ | environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_row(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns as soon as the run has logged a step after `step`; it logs every step."""
    while process.poll() is None:
        rows = read_rows(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] > step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before step {step}: {finish(process)}")


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same arrays, to the last bit."""
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert found[path].tobytes() == leaf.tobytes(), path
