"""How fast is attention to selected keys on a CPU, forward and backward, compared with a window and with all keys?

The measured function is the core of one layer: 8 heads of width 64, batch size 1, float32, two cores, and 512 attended
keys per query. Selections are MoBA and tiles (8 blocks of 64), MSA (4 blocks of 128, an index head of width 64 per
head), InfLLM-V2 (8 blocks of 64) and DSA (512 keys, 4 index heads of width 32). `scores of NAME` is the selection
alone, forward. Index queries and keys are inputs without gradients. The parts of the benchmark are `compare`, at one
length; `packed`, a row of eight documents beside one; and `growth`, by length.
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

LENGTH, KEYS, DOCUMENTS = 8192, 512, 8
GROWTH_LENGTHS = (8192, 16_384, 32_768, 65_536)
BLOCK, MSA_BLOCK = 64, 128
DSA_HEADS, DSA_WIDTH = 4, 32
Segments = tuple[jax.Array, jax.Array] | None
CAUSAL, WINDOW = patterns.parse("causal"), patterns.parse(f"causal & window({KEYS - 1})")


def draw_index(length: int, heads: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws index queries, keys and weights."""
    random = np.random.default_rng(1)
    shapes = (1, length, heads, width), (1, length, width), (1, length, heads)
    q, k, weights = (jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes)
    return q, k, weights


def select_msa(q: jax.Array, k: jax.Array, segments: Segments) -> Selection:
    """Selects as MiniMax-M3."""
    q, k, _ = draw_index(k.shape[1], HEADS, WIDTH)
    index = Index(q, k, relu=False, per_head=True)
    blocks = make_blocks(k.shape[1], MSA_BLOCK, None if segments is None else segments[1])
    return select_indexed(index, KEYS // MSA_BLOCK, CAUSAL, blocks=blocks, local=1, segments=segments)


def select_dsa(q: jax.Array, k: jax.Array, segments: Segments) -> Selection:
    """Selects as DeepSeek-V3.2."""
    index = Index(*draw_index(k.shape[1], DSA_HEADS, DSA_WIDTH))
    return select_indexed(index, KEYS, CAUSAL, segments=segments)


BLOCKS = BLOCK, KEYS // BLOCK, CAUSAL
SELECTIONS: dict[str, Callable[[jax.Array, jax.Array, Segments], Selection]] = {
    "MoBA": lambda q, k, segments: moba(q, k, *BLOCKS, segments=segments),
    "tiles": lambda q, k, segments: top_tiles(q, k, *BLOCKS, segments=segments),
    "MSA": select_msa,
    "InfLLM-V2": lambda q, k, segments: infllm(q, k, *BLOCKS, window=32, stride=16, segments=segments),
    "DSA": select_dsa,
}


def attention_contender(
    length: int, name: str | None = None, pattern: patterns.Pattern = CAUSAL, documents: int = 1
) -> Contender:
    """Attention with its gradients, to the keys of a selection or of a pattern."""
    q, k, v, cotangent = (jnp.asarray(x) for x in draw_arrays(length))
    ids = None if documents == 1 else jnp.arange(length)[None] * documents // length
    segments = None if ids is None else (ids, ids)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        selection = None if name is None else SELECTIONS[name](q, k, segments)
        return attend(q, k, v, pattern, selection=selection, segment_ids=segments)

    return jax_contender(attention, (q, k, v), cotangent)


def scores_contender(length: int, name: str) -> Contender:
    """A selection alone, as floats, without gradients."""
    q, k, *_ = (jnp.asarray(x) for x in draw_arrays(length))
    run = jax.jit(lambda q, k: SELECTIONS[name](q, k, None).groups).lower(q, k).compile()
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


def compare_packed(length: int, quick: bool) -> dict:
    """Compares a row of documents with one document."""
    make = {}
    for name in SELECTIONS:
        make[name] = functools.partial(attention_contender, length, name)
        make[f"{name}, packed"] = functools.partial(attention_contender, length, name, documents=DOCUMENTS)
    rows = race(make, None, quick)
    ratios = {
        f"{name}: times one document": rows[f"{name}, packed"]["seconds"] / rows[name]["seconds"] for name in SELECTIONS
    }
    return {"title": f"{length:,} tokens in {DOCUMENTS} documents or in one", "contenders": rows, "ratios": ratios}


def measure_growth(name: str, lengths: tuple[int, ...], quick: bool) -> dict:
    """Measures a selection by length."""
    rows = race({str(n): functools.partial(attention_contender, n, name) for n in lengths}, None, quick)
    return {"title": f"{name} by length", "contenders": rows, "ratios": fit_exponents(rows)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this benchmark."""
    add_parts(parser, ("compare", "packed", "growth"))
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of `compare` and `packed`")
    parser.add_argument("--longest", type=int, default=GROWTH_LENGTHS[-1], help="most tokens of `growth`")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the parts."""
    pin_cores()
    lengths = tuple(n for n in GROWTH_LENGTHS if n <= options.longest)
    measures = {
        "compare": lambda: [compare(options.length, options.quick)],
        "packed": lambda: [compare_packed(options.length, options.quick)],
        "growth": lambda: [measure_growth(name, lengths, options.quick) for name in ("MoBA", "MSA")],
    }
    run_parts(measures, options.only, save)
