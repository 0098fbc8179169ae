"""Which implementation of `attend` is fastest on this CPU, and how much temporary memory does it take?

Forward and backward pass, float32, 4 heads of width 32. The cases bracket the thresholds `DENSE_LENGTH` and
`SEGMENT_FILL` of `sparsejax.ops.attention`. `density` is the fraction of live tiles, `fill` the fraction of allowed
pairs in live tiles.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Contender, Save, jax_contender, print_rows, race, relative_error
from sparsejax import patterns
from sparsejax.ops import attend
from sparsejax.ops.gather import SMALL

CASES = [
    (8, 64, "causal"),
    (8, 128, "causal"),
    (8, 128, "full"),
    (8, 256, "causal"),
    (8, 256, "full"),
    (8, 256, "causal & (window(63) | sink(4))"),
    (4, 512, "causal"),
    (4, 512, "full"),
    (2, 1024, "causal"),
    (2, 1024, "full"),
    (2, 1024, "causal & window(128)"),
    (1, 4096, "window(256, 256)"),
    (2, 1024, "globals([5, 900]) | window(0)"),
    (2, 1024, "globals([5, 900]) | window(15)"),
    (2, 1024, "chunk(2)"),
    (2, 1024, "chunk(4)"),
    (2, 1024, "chunk(8)"),
    (2, 1024, "chunk(16)"),
    (2, 1024, "chunk(32)"),
]
IMPLS = ("dense", "gather", "segment")
HEADS, WIDTH = 4, 32


def make_contender(batch: int, length: int, pattern: patterns.Pattern, impl: str) -> Contender:
    """Compiles `attend` together with its gradients."""
    random = np.random.default_rng(0)
    *inputs, cotangent = (jnp.asarray(random.normal(size=(batch, length, HEADS, WIDTH)), jnp.float32) for _ in range(4))
    return jax_contender(lambda q, k, v: attend(q, k, v, pattern, impl=impl), inputs, cotangent)


def measure(batch: int, length: int, text: str, quick: bool) -> dict:
    """Measures all implementations in alternation; returns a row of the table."""
    pattern = patterns.parse(text)
    make = {impl: functools.partial(make_contender, batch, length, pattern, impl) for impl in IMPLS}
    results = race(make, relative_error, quick, pause=0.0)
    layout = pattern.layout(length, tile=(SMALL, SMALL))
    return {
        "batch": batch,
        "length": length,
        "pattern": text,
        "density": layout.density,
        "fill": pattern.pairs(length) / (len(layout.columns) * SMALL**2),
        **{f"{impl}_ms": 1e3 * results[impl]["seconds"] for impl in IMPLS},
        **{f"{impl}_mib": results[impl]["temporary_mib"] for impl in IMPLS},
    }


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures all cases."""
    rows = []
    for case in CASES[: 2 if options.quick else None]:
        print(*case, flush=True)
        rows.append(measure(*case, options.quick))
    print_rows(rows)
    save({"device": jax.devices()[0].device_kind, "heads": HEADS, "head_width": WIDTH, "rows": rows})
