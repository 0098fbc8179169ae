"""Our attention on several CPU devices, for `measure_cpu_attention.py`: a process of its own, as JAX fixes their number
when it starts (`XLA_FLAGS=--xla_force_host_platform_device_count=N`).

It answers one request for each line of standard input (JSON), with one line (JSON):

    {"do": "attend", "pattern": TEXT, "length": N, "save": FILE or null}     seconds of one forward and backward
    {"do": "memory", "pattern": TEXT, "length": N}                           temporary MiB of all devices together
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
    """Attention with its gradients, and its inputs, whose heads are spread over all devices."""
    pattern = patterns.parse(text)

    def differentiate(q, k, v, d_out):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, pattern, impl="gather"), q, k, v)
        return out, *backward(d_out)

    mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, None, "heads", None))
    arrays = [jax.device_put(x, place) for x in draw_arrays(length)]
    return jax.jit(differentiate, out_shardings=place).lower(*arrays).compile(), arrays


def time_attention(pattern: str, length: int, save: str | None) -> dict:
    """Seconds of one forward and backward pass; writes output and gradients to `save` if given."""
    compiled, arrays = compile_attention(pattern, length)
    start = time.perf_counter()
    found = jax.block_until_ready(compiled(*arrays))
    seconds = time.perf_counter() - start
    if save:
        np.savez(save, *(np.asarray(x) for x in found))
    return {"seconds": seconds}


def report_memory(pattern: str, length: int) -> dict:
    """What the compiler says, of one device times their number."""
    compiled, _ = compile_attention(pattern, length)
    return {"mib": jax.device_count() * compiled.memory_analysis().temp_size_in_bytes / 2**20}


def main() -> None:
    """Answers until standard input ends."""
    actions = {"attend": time_attention, "memory": report_memory}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(actions[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    main()
