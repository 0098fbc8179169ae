"""sparsejax attention on several CPU devices, for `measure_cpu_attention.py`.

A separate process, as JAX fixes the number of devices when it starts
(`XLA_FLAGS=--xla_force_host_platform_device_count=N`). It answers one request per line of standard input (JSON) with
one line (JSON):

    {"do": "attend", "pattern": TEXT, "length": N, "save": FILE or null}     seconds of one forward and backward pass
    {"do": "memory", "pattern": TEXT, "length": N}                           temporary MiB, summed over the devices
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from protocol import draw_arrays

from sparsejax import patterns
from sparsejax.ops import attend


@functools.cache
def compile_attention(text: str, length: int) -> tuple[Callable, list[jax.Array]]:
    """Compiles attention with its gradients; returns it with its inputs, whose heads are sharded over the devices."""
    pattern = patterns.parse(text)

    def differentiate(q, k, v, do):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, pattern, impl="gather"), q, k, v)
        return out, *backward(do)

    mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "heads", None))
    arrays = [jax.device_put(x, sharding) for x in draw_arrays(length)]
    return jax.jit(differentiate, out_shardings=sharding).lower(*arrays).compile(), arrays


def time_attention(pattern: str, length: int, save: str | None) -> dict:
    """Seconds of one forward and backward pass. Writes the output and the gradients to `save` unless it is None."""
    compiled, arrays = compile_attention(pattern, length)
    start = time.perf_counter()
    results = jax.block_until_ready(compiled(*arrays))
    seconds = time.perf_counter() - start
    if save:
        np.savez(save, *(np.asarray(x) for x in results))
    return {"seconds": seconds}


def report_memory(pattern: str, length: int) -> dict:
    """Temporary memory per device by the compiler, times the number of devices."""
    compiled, _ = compile_attention(pattern, length)
    return {"mib": jax.device_count() * compiled.memory_analysis().temp_size_in_bytes / 2**20}


def main() -> None:
    """Answers requests until standard input ends."""
    actions = {"attend": time_attention, "memory": report_memory}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(actions[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    main()
