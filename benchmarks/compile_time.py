"""How long does the training gradient take to compile, by the number of layers?

A scanned model compiles one period of its schedule, however often it repeats: 32 layers should take at most 1.3 times
as long as 8. An unrolled model grows with the depth. Tracing and lowering are included.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks.harness import Save, alternate, print_rows, timed
from sparsejax.config import ModelConfig
from sparsejax.layers import AttentionConfig, LayerConfig, MambaConfig, MixerConfig, MlpConfig, NormConfig, RopeConfig
from sparsejax.model import Functional

PERIOD, DEPTHS, REPETITIONS, TARGET = "ssm ssm local full", (8, 32), 3, 1.3
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
            remat="none",
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
    return timed(lambda: jax.jit(jax.grad(loss)).lower(model.shapes, tokens).compile())


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures scanned and unrolled models of all depths."""
    jax.config.update("jax_enable_compilation_cache", False)
    depths, repetitions = ((4, 8), 1) if options.quick else (DEPTHS, REPETITIONS)
    time_compilation(build_config(4, scan=True))  # the first compilation also loads the compiler
    configs = {(scan, depth): build_config(depth, scan) for scan in (True, False) for depth in depths}
    runs = {case: functools.partial(time_compilation, config) for case, config in configs.items()}
    seconds = alternate(runs, repetitions)
    rows = [{"scan": scan, "layers": depth} | row for (scan, depth), row in seconds.items()]
    print_rows(rows, f"period {PERIOD}: seconds to compile")
    ratios = {
        name: seconds[scan, depths[1]]["seconds"] / seconds[scan, depths[0]]["seconds"]
        for name, scan in (("scanned", True), ("unrolled", False))
    }
    print(f"{depths[1]} / {depths[0]} layers: {ratios}; target for scanned models: at most {TARGET}")
    save({"period": PERIOD, "rows": rows, "ratios": ratios, "target": TARGET})
