"""What the sides of a measurement agree on, and how one asks another that runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np

THREADS = 2
HEADS, WIDTH = 8, 64
REACH = 256  # keys on either side of a query, itself not counted
BIG_BIRD_TILE, RANDOM_TILES = 64, 3
LEFT, SINK = 4095, 128  # the layouts' mask: causal & (window(LEFT) | sink(SINK))


def draw_arrays(length: int) -> list[np.ndarray]:
    """Queries, keys, values and the cotangent of the output, each [1, length, HEADS, WIDTH]."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, length, HEADS, WIDTH), np.float32) for _ in range(4)]


def keep_to_cores() -> list[int]:
    """Binds this process, and those it starts, to THREADS cores; to be called before a thread pool starts."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)
    return cores


class OtherProcess:
    """A script of this folder, run by a Python, with other variables of the environment; see there for what to ask."""

    def __init__(self, python: str, script: str = "torch_contenders.py", **variables: str):
        quiet = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        path = Path(__file__).with_name(script)
        self.process = subprocess.Popen(
            [python, path], stdin=pipe, stdout=pipe, text=True, env=os.environ | quiet | variables
        )

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **request: object) -> dict:
        """One answer, which may be `{"error": ...}`; a process that died is an error too."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"{self.process.args[1]} ended"}
