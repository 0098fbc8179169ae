"""How fast is attention to selected keys on a CPU, forward and backward, compared with a window and with all keys?

The measured function is the core of one layer: 8 heads of width 64, batch size 1, float32, two cores, and 512 attended
keys per query. Selections are MoBA and tiles (8 blocks of 64), MSA (4 blocks of 128, an index head of width 64 per
head), InfLLM-V2 (8 blocks of 64) and DSA (512 keys, 4 index heads of width 32). `scores of NAME` is the selection
alone, forward. Index queries and keys are inputs without gradients. The parts of the benchmark are `compare`, at one
length, and `growth`, by length.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    HEADS,
    WIDTH,
    Contender,
    Save,
    add_parts,
    draw_arrays,
    fit_exponents,
    jax_contender,
    pin_cores,
    race,
    run_parts,
)
from sparsejax import patterns
from sparsejax.ops import Index, Selection, attend, infllm, moba, select_indexed, top_tiles
from sparsejax.ops.blocks import make_blocks

LENGTH, KEYS = 8192, 512
GROWTH_LENGTHS = (8192, 16_384, 32_768, 65_536)
BLOCK, MSA_BLOCK = 64, 128
DSA_HEADS, DSA_WIDTH = 4, 32
CAUSAL, WINDOW = patterns.parse("causal"), patterns.parse(f"causal & window({KEYS - 1})")


def draw_index(length: int, heads: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws index queries, keys and weights."""
    random = np.random.default_rng(1)
    shapes = (1, length, heads, width), (1, length, width), (1, length, heads)
    q, k, weights = (jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes)
    return q, k, weights


def select_msa(length: int) -> Callable[..., Selection]:
    """Returns the selection of MiniMax-M3."""
    q, k, _ = draw_index(length, HEADS, WIDTH)
    index, blocks = Index(q, k, relu=False, per_head=True), make_blocks(length, MSA_BLOCK)
    return lambda *_: select_indexed(index, KEYS // MSA_BLOCK, CAUSAL, blocks=blocks, local=1)


def select_dsa(length: int) -> Callable[..., Selection]:
    """Returns the selection of DeepSeek-V3.2."""
    index = Index(*draw_index(length, DSA_HEADS, DSA_WIDTH))
    return lambda *_: select_indexed(index, KEYS, CAUSAL)


SELECTIONS: dict[str, Callable[[int], Callable[..., Selection]]] = {
    "MoBA": lambda length: lambda q, k: moba(q, k, BLOCK, KEYS // BLOCK, CAUSAL),
    "tiles": lambda length: lambda q, k: top_tiles(q, k, BLOCK, KEYS // BLOCK, CAUSAL),
    "MSA": select_msa,
    "InfLLM-V2": lambda length: lambda q, k: infllm(q, k, BLOCK, KEYS // BLOCK, CAUSAL, window=32, stride=16),
    "DSA": select_dsa,
}


def attention_contender(length: int, name: str | None = None, pattern: patterns.Pattern = CAUSAL) -> Contender:
    """Attention with its gradients, to the keys of a selection or of a pattern."""
    q, k, v, cotangent = (jnp.asarray(x) for x in draw_arrays(length))
    select = None if name is None else SELECTIONS[name](length)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, pattern, selection=None if select is None else select(q, k))

    return jax_contender(attention, (q, k, v), cotangent)


def scores_contender(length: int, name: str) -> Contender:
    """A selection alone, as floats, without gradients."""
    q, k, *_ = (jnp.asarray(x) for x in draw_arrays(length))
    select = SELECTIONS[name](length)
    run = jax.jit(lambda q, k: select(q, k).groups).lower(q, k).compile()
    return Contender(functools.partial(time_call, run, q, k), run.memory_analysis().temp_size_in_bytes / 2**20)


def time_call(run: Callable, q: jax.Array, k: jax.Array, keep: bool) -> tuple[float, list | None]:
    """Runs a compiled selection; returns its seconds and, if `keep`, the groups."""
    start = time.perf_counter()
    groups = jax.block_until_ready(run(q, k))
    return time.perf_counter() - start, [np.asarray(groups)] if keep else None


def compare(length: int, quick: bool) -> dict:
    """Compares selections with dense attention and with a window of as many keys."""
    make = {
        "all keys": functools.partial(attention_contender, length),
        "window": functools.partial(attention_contender, length, None, WINDOW),
    }
    for name in SELECTIONS:
        make[name] = functools.partial(attention_contender, length, name)
        make[f"scores of {name}"] = functools.partial(scores_contender, length, name)
    rows = race(make, None, quick)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    ratios = {}
    for name in SELECTIONS:
        ratios[f"{name}: times faster than all keys"] = seconds["all keys"] / seconds[name]
        bound = seconds["window"] + seconds[f"scores of {name}"]
        ratios[f"{name}: times a window plus its scores"] = seconds[name] / bound
        ratios[f"{name}: times a window"] = seconds[name] / seconds["window"]
    return {"title": f"{length:,} tokens, {KEYS} keys per query", "contenders": rows, "ratios": ratios}


def measure_growth(name: str, lengths: tuple[int, ...], quick: bool) -> dict:
    """Measures a selection by length."""
    rows = race({str(n): functools.partial(attention_contender, n, name) for n in lengths}, None, quick)
    return {"title": f"{name} by length", "contenders": rows, "ratios": fit_exponents(rows)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this benchmark."""
    add_parts(parser, ("compare", "growth"))
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of `compare`")
    parser.add_argument("--longest", type=int, default=GROWTH_LENGTHS[-1], help="most tokens of `growth`")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the parts."""
    pin_cores()
    lengths = tuple(n for n in GROWTH_LENGTHS if n <= options.longest)
    measures = {
        "compare": lambda: [compare(options.length, options.quick)],
        "growth": lambda: [measure_growth(name, lengths, options.quick) for name in ("MoBA", "MSA")],
    }
    run_parts(measures, options.only, save)
