"""Measures how long the training gradient takes to compile, by the number of layers.

    python scripts/measure_compile.py [--out FILE.json]

A scanned model compiles one period of its schedule, however often it repeats: 32 layers should take at most 1.3 times
as long as 8. An unrolled model grows with the depth. Tracing and lowering are included. The runs alternate; each number
is the median of three.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from sparsejax.config import ModelConfig
from sparsejax.layers import AttentionConfig, LayerConfig, MambaConfig, MixerConfig, MlpConfig, NormConfig, RopeConfig
from sparsejax.model import Functional

COMMAND = "python scripts/measure_compile.py --out FILE.json"
PERIOD, DEPTHS, REPEATS, TARGET = "ssm ssm local full", (8, 32), 3, 1.3
BATCH, LENGTH, WIDTH, VOCAB = 2, 128, 64, 256


def build_config(depth: int, scan: bool) -> ModelConfig:
    """A hybrid of `depth` layers with a period of 4."""
    norm = NormConfig(kind="rms", eps=1e-6)

    def layer(mixer: MixerConfig) -> LayerConfig:
        return LayerConfig(
            mixer=mixer,
            mlp=MlpConfig(kind="gated", width=2 * WIDTH, activation="silu"),
            norm=norm,
            norm_position="pre",
            remat=False,
        )

    def attention(pattern: str) -> LayerConfig:
        return layer(
            AttentionConfig(
                pattern=pattern,
                heads=4,
                kv_heads=2,
                head_width=WIDTH // 4,
                rope=RopeConfig(base=1e4),
                qk_norm=norm,
                impl="auto",
            )
        )

    return ModelConfig(
        vocab=VOCAB,
        width=WIDTH,
        schedule=f"{depth // 4}x({PERIOD})",
        layers={
            "ssm": layer(MambaConfig(inner=2 * WIDTH, state=8, conv=4, dt_rank=4, dt_min=1e-3, dt_max=0.1)),
            "local": attention("causal & (window(31) | sink(4))"),
            "full": attention("causal"),
        },
        norm=norm,
        tied=True,
        dtype="float32",
        scan=scan,
    )


def time_compilation(config: ModelConfig) -> float:
    """Returns the seconds from the model's functions to an executable."""
    model = Functional(config)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(parameters, tokens):
        scores = jax.nn.log_softmax(model.bind(parameters)(tokens[:, :-1]))
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).lower(model.shapes, tokens).compile()
    return time.perf_counter() - start


def measure() -> list[dict]:
    """Returns the median seconds of every model; the models alternate."""
    cases = [(scan, depth) for scan in (True, False) for depth in DEPTHS]
    seconds = {case: [] for case in cases}
    time_compilation(build_config(4, scan=True))  # the first compilation also loads the compiler
    for repeat in range(REPEATS):
        for scan, depth in cases:
            seconds[scan, depth].append(time_compilation(build_config(depth, scan)))
            kind = "scanned" if scan else "unrolled"
            print(f"{repeat + 1}/{REPEATS} {kind}, {depth} layers: {seconds[scan, depth][-1]:.2f} s", flush=True)
    return [
        {"scan": scan, "layers": depth, "seconds": statistics.median(times), "runs": times}
        for (scan, depth), times in seconds.items()
    ]


def main() -> None:
    """Prints a table; with --out also writes the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = measure()
    table = Table("", *(f"{depth} layers" for depth in DEPTHS), "ratio", title=f"period {PERIOD}: seconds to compile")
    ratios = {}
    for kind, scan in (("scanned", True), ("unrolled", False)):
        shallow, deep = (row["seconds"] for row in rows if row["scan"] == scan)
        ratios[kind] = deep / shallow
        table.add_row(kind, f"{shallow:.2f}", f"{deep:.2f}", f"{ratios[kind]:.2f}")
    Console().print(table)
    print(f"scanned: {ratios['scanned']:.2f}, target: at most {TARGET}")
    if options.out:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        about = {"command": COMMAND, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
        record = about | versions | {"period": PERIOD, "rows": rows, "ratios": ratios, "target": TARGET}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
