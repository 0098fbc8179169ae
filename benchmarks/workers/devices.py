"""sparsejax attention on several CPU devices, for the benchmark `cpu_attention`.

It runs in a separate process because JAX fixes the number of devices when it starts
(`XLA_FLAGS=--xla_force_host_platform_device_count=N`). It reads one JSON request per line of standard input, and writes
one JSON response per line:

    {"do": "attend", "pattern": TEXT, "length": N, "save": FILE or null}     seconds per forward and backward pass
    {"do": "memory", "pattern": TEXT, "length": N}                           temporary MiB, summed over the devices
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.harness import draw_arrays, serve
from sparsejax import patterns
from sparsejax.ops import attend


@functools.cache
def compile_attention(text: str, length: int) -> tuple[Callable, list[jax.Array]]:
    """Compiles attention together with its gradients; returns it and its inputs, with heads sharded over devices."""
    pattern = patterns.parse(text)

    def differentiate(q, k, v, do):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, pattern, impl="gather"), q, k, v)
        return out, *backward(do)

    mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "heads", None))
    arrays = [jax.device_put(x, sharding) for x in draw_arrays(length)]
    return jax.jit(differentiate, out_shardings=sharding).lower(*arrays).compile(), arrays


def time_attention(pattern: str, length: int, save: str | None) -> dict:
    """Times a forward and backward pass; writes output and gradients to `save`, if any."""
    compiled, arrays = compile_attention(pattern, length)
    start = time.perf_counter()
    results = jax.block_until_ready(compiled(*arrays))
    seconds = time.perf_counter() - start
    if save:
        np.savez(save, *(np.asarray(x) for x in results))
    return {"seconds": seconds}


def report_memory(pattern: str, length: int) -> dict:
    """Returns the compiler's temporary memory per device times the number of devices."""
    compiled, _ = compile_attention(pattern, length)
    return {"mib": jax.device_count() * compiled.memory_analysis().temp_size_in_bytes / 2**20}


if __name__ == "__main__":
    serve({"attend": time_attention, "memory": report_memory})
