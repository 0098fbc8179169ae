"""Cores and GPUs of this machine, without JAX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def share_out(items: Sequence[Any], slot: int, slots: int) -> tuple[Any, ...]:
    """Returns a slot's share of the items: equal contiguous parts; with fewer items than slots, slots share items."""
    if len(items) < slots:
        return (items[slot % len(items)],) if items else ()
    size = len(items) // slots
    return tuple(items[slot * size : (slot + 1) * size])


def find_cores() -> tuple[int, ...]:
    """Returns the cores that this process may use; none where the system has no affinity."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def find_devices() -> tuple[str, ...]:
    """Returns the GPUs that runs may use, without JAX, which would allocate their memory."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return ()
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return tuple(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(map(str, sorted(int(text) for text in numbers if text.isdigit())))


def default_jobs(devices: Sequence[str], cores: Sequence[int]) -> int:
    """Returns the number of concurrent runs: one per GPU, for all TPU chips, or per two cores."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return 1
    return len(devices) or max(1, (len(cores) or os.cpu_count() or 1) // 2)
