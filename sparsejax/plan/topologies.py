"""Devices to plan for: their peaks by datasheet, and absent ones for which a program can be compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from sparsejax.config import ShardingConfig
from sparsejax.errors import InputError, shorten, suggest
from sparsejax.sharding import MESH_AXES, arrange_devices, resolve_axes

GB, GIB, TERA = 1e9, 2**30, 1e12
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {capacity}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device, as JAX counts devices. Peaks are those of datasheets; a program reaches a part of them.

    Attributes:
      name: Name in `--on`.
      kind: Name by JAX.
      platform: "tpu", "cuda" or "cpu".
      capacity: Bytes of memory that a program can use.
      flops: FLOPs per second of matrix products in bfloat16; 0 if unknown.
      bandwidth: Bytes per second of memory.
      interconnect: Bytes per second that arrive from the other devices of a slice or a host, all links together.
      ranks: Number of axes of a topology.
      per_chip: Devices per chip of the topology.
      cores: Cores of a device.
      extra: The extra of this package that installs the compiler.
      module: A module of the compiler.
    """

    name: str
    kind: str
    platform: str
    capacity: float
    flops: float = 0.0
    bandwidth: float = 0.0
    interconnect: float = 0.0
    ranks: int = 1
    per_chip: int = 1
    cores: int = 1
    extra: str = ""
    module: str = ""


def _tpu(
    name: str, kind: str, capacity: float, flops: float, bandwidth: float, interconnect: float, **others
) -> Machine:
    rates = flops * TERA, bandwidth * GB, interconnect * GB / 2  # half of the bidirectional bandwidth
    return Machine(name, kind, "tpu", capacity * GIB, *rates, extra="tpu", module="libtpu", **others)


def _hopper(name: str, kind: str, capacity: float, bandwidth: float) -> Machine:
    rates = 989 * TERA, bandwidth * GB, 450 * GB
    return Machine(name, kind, "cuda", capacity * GB, *rates, cores=132, extra="cuda", module="jax_plugins.xla_cuda13")


# Peaks: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x (of a chip, of which a device of tpu7x is one half), and
# the datasheets of NVIDIA's H100 SXM and H200 SXM. Capacity of TPUs: what the compiler leaves to programs.
MACHINES = {
    machine.name: machine
    for machine in (
        _tpu("v5e", "TPU v5 lite", 15.75, 197, 819, 400, ranks=2),
        _tpu("v5p", "TPU v5", 95.74, 459, 2765, 1200, ranks=3, cores=2),
        _tpu("v6e", "TPU v6 lite", 31.25, 918, 1638, 800, ranks=2),
        _tpu("tpu7x", "TPU7x", 94.75, 2307 / 2, 7380 / 2, 1200 / 2, ranks=3, per_chip=2),
        _hopper("h100", "NVIDIA H100 80GB HBM3", 80, 3350),
        _hopper("h200", "NVIDIA H200", 141, 4800),
        Machine("cpu", "cpu", "cpu", math.inf),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Connected devices.

    Attributes:
      machine: The kind of the devices.
      shape: Chips per axis, or a single number of devices.
    """

    machine: Machine
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads `v5e:4x4` or `h100:8`.

        Raises:
          InputError: There is no such device or topology.
        """
        name, _, sizes = text.partition(":")
        if name not in MACHINES:
            raise InputError("on", f"{name!r} is no device to plan for; {suggest(name, MACHINES, 'devices')}")
        machine, example = MACHINES[name], "x".join(["2"] * MACHINES[name].ranks)
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", sizes):
            raise InputError("on", f"{text!r} is not {name}:{example}, the device and the size of each axis")
        shape = tuple(map(int, sizes.split("x")))
        if len(shape) != machine.ranks:
            nearest = "x".join(map(str, _reshape(math.prod(shape), machine.ranks)))
            raise InputError("on", f"{text}: {name} has {machine.ranks} axes; write {name}:{nearest}")
        return cls(machine, shape)

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.shape) * self.machine.per_chip

    def __str__(self) -> str:
        return f"{self.machine.name}:{'x'.join(map(str, self.shape))}"

    def stay_on_cpu(self) -> None:
        """Keeps JAX on the CPU of this machine, with as many devices as a topology of it; before JAX looks for them."""
        flags = os.environ.get("XLA_FLAGS", "")
        if self.machine.platform == "cpu" and "host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.count}".strip()
        jax.config.update("jax_platforms", "cpu")

    @property
    def capacity(self) -> float:
        """Bytes of memory of a device that a program can use; devices of a CPU share that of this machine."""
        if self.machine.platform != "cpu":
            return self.machine.capacity
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.count

    def abstract_mesh(self, config: ShardingConfig) -> AbstractMesh:
        """The mesh without devices, for which a program can be traced.

        Raises:
          ConfigError: The product of the axes is not the number of devices.
        """
        fields: dict[str, Any] = {
            "device_kind": self.machine.kind,
            "num_cores": self.machine.cores,
            "platform": self.machine.platform,
        }
        known = {name: value for name, value in fields.items() if name in AbstractDevice.__dataclass_fields__}
        types = (AxisType.Auto,) * len(MESH_AXES)
        sizes = resolve_axes(config, self.count)
        return AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=AbstractDevice(**known))

    def mesh(self, config: ShardingConfig) -> Mesh:
        """The mesh of absent devices, for which a program can be compiled.

        Raises:
          ConfigError: The product of the axes is not the number of devices.
          CompilerMissing: The compiler is not installed, or does not know the topology.
        """
        return arrange_devices(resolve_axes(config, self.count), self.devices())

    def devices(self) -> list[Any]:
        """Absent devices, or those of this machine's CPU.

        Raises:
          CompilerMissing: The compiler is not installed, or does not know the topology.
        """
        machine = self.machine
        if machine.platform == "cpu":
            return _cpu_devices(self.count)
        if importlib.util.find_spec(machine.module.partition(".")[0]) is None:
            problem = f"the compiler for {machine.name} is not installed: pip install 'sparsejax[{machine.extra}]'"
            raise CompilerMissing(problem)
        from jax.experimental import topologies

        options: dict[str, Any]
        if machine.platform == "tpu":
            options = {"platform": "tpu", "topology_name": str(self)}
        else:
            figures = {"bandwidth": int(machine.bandwidth), "capacity": int(machine.capacity), "kind": machine.kind}
            options = {"platform": "cuda", "topology": f"1x1x{self.count}", "target_config": HOPPER.format(**figures)}
        with _compiler_environment(machine):
            try:
                return topologies.get_topology_desc(**options).devices
            except Exception as error:  # of the plugin, in a type of its own
                raise CompilerMissing(f"the compiler does not know {self}: {shorten(str(error), 300)}") from error


class CompilerMissing(Exception):
    """There is no compiler for a topology."""


@contextlib.contextmanager
def _compiler_environment(machine: Machine) -> Iterator[None]:
    """Variables that keep the compiler of TPUs from asking for a device, and let several processes compile."""
    values = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    values["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    missing = values.keys() - os.environ.keys() if machine.platform == "tpu" else set()
    os.environ |= {name: values[name] for name in missing}
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name)


def _cpu_devices(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise CompilerMissing(f"this process has {len(devices)} CPU devices; set {flag}")
    return devices[:count]


def _reshape(count: int, ranks: int) -> tuple[int, ...]:
    """The most even topology of `count` chips."""
    shapes = (
        (*sizes, count // math.prod(sizes))
        for sizes in itertools.product(range(1, min(count, 64) + 1), repeat=ranks - 1)
        if count % math.prod(sizes) == 0
    )
    return min(shapes, key=lambda shape: (max(shape), [-size for size in shape]))
