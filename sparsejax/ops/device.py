"""The devices that a program is compiled for: those of the current mesh, which can be absent, or the local ones."""

from __future__ import annotations

import jax


def device_kind() -> str:
    """Kind of the devices."""
    return (_abstract_device() or jax.devices()[0]).device_kind


def on_cpu() -> bool:
    """Whether the devices are those of a CPU."""
    return device_kind() == "cpu"


def core_count() -> int | None:
    """Number of multiprocessors of a device; None if it is unknown or the device is not a GPU."""
    abstract = _abstract_device()
    cores = None if abstract is None else abstract.num_cores
    return cores or getattr(jax.devices()[0], "core_count", None)


def has_host_memory() -> bool:
    """Whether a device can keep arrays in pinned memory of its host."""
    local = jax.devices()[0]
    if device_kind() != local.device_kind:  # the program is compiled for accelerators, all of which have it
        return True
    return any(memory.kind == "pinned_host" for memory in local.addressable_memories())


def _abstract_device():
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
