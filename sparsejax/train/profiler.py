"""Traces of training steps by `jax.profiler`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from sparsejax import sharding
from sparsejax.workdir import Workdir


class Profiler:
    """Traces steps of a run into its workdir; a context manager, which ends a trace in progress.

    Args:
      workdir: Its files; the trace is in `profile`.
      steps: The steps, which are adjacent.
    """

    def __init__(self, workdir: Workdir, steps: range):
        self._folder = workdir.profile
        self._steps = steps if sharding.is_coordinator() else range(0)
        self._traces = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[list[Any]]:
        """Runs a step; the arrays that it adds to the list are computed before the trace ends."""
        arrays: list[Any] = []
        if step not in self._steps:
            yield arrays
            return
        if not self._traces:
            jax.profiler.start_trace(str(self._folder))
            self._traces = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield arrays
        if step == self._steps[-1]:
            jax.block_until_ready(arrays)
            self.__exit__()
