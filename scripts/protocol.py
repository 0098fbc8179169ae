"""Sizes that all contenders of a comparison share, and a client for contenders in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np

THREADS = 2
HEADS, WIDTH = 8, 64
RADIUS = 256  # keys on either side of a query
BIG_BIRD_TILE, RANDOM_TILES = 64, 3
LEFT, SINK = 4095, 128  # the mask of the layouts: causal & (window(LEFT) | sink(SINK))


def draw_arrays(length: int) -> list[np.ndarray]:
    """Draws queries, keys, values and the cotangent of the output, each [1, length, HEADS, WIDTH]."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, length, HEADS, WIDTH), np.float32) for _ in range(4)]


def pin_cores() -> list[int]:
    """Pins this process and its children to THREADS cores; call it before a thread pool starts."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)
    return cores


class OtherProcess:
    """A script of this folder that runs under another interpreter; its docstring lists the requests."""

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

    def request(self, **fields: object) -> dict:
        """Sends a request and returns the response, `{"error": ...}` if it fails or the process died."""
        try:
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()
            response = self.process.stdout.readline()
        except BrokenPipeError:
            response = ""
        return json.loads(response) if response else {"error": f"{self.process.args[1]} ended"}
