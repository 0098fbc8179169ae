"""How fast are prefill and decoding, compared with a forward pass, the memory's bandwidth and Hugging Face?

A model of 16M parameters in float32 (4 layers of width 512, window 512, 4,096 tokens of vocabulary; or Mamba) reads a
prompt in chunks and generates 128 tokens, with layers scanned, unrolled as `LoadedModel.generate` runs them, and
unrolled with bfloat16 weights. The bound of decoding is the bytes of weights and caches per token over the bandwidth of
a copy, reads and writes. The products of a vector and every matrix of the model are timed in the same process; the rest
of the time of a token is attention or recurrences, and sampling. `--torch` is an interpreter with torch and
transformers, which runs the same config.json in a process of its own, in turn with the others. `--long` measures the
peak memory of a prompt, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import ROOT, Save, alternate, timed
from sparsejax.account import count_bytes
from sparsejax.config import ModelConfig
from sparsejax.inference import Sampling
from sparsejax.inference.generation import Decoder, Plan, iterate
from sparsejax.interop.huggingface import read_config
from sparsejax.model import Functional, restack

Runs = dict[str, Callable[[], float]]
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 4096, "hidden_size": 512,
        "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "sliding_window": 512, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "mamba": {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 4096, "hidden_size": 512,
        "state_size": 16, "num_hidden_layers": 7, "conv_kernel": 4, "expand": 2, "time_step_rank": 32,
        "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--model", choices=CONFIGS, default="mistral", help="architecture")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--cores", type=int, default=2, help="cores of each process")
    parser.add_argument("--long", type=int, nargs="*", default=[], help="prompts whose peak memory is measured")
    parser.add_argument("--torch", metavar="TORCH_PYTHON", help="Python interpreter with torch and transformers")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures, prints and saves."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    prompt, generated = (48, 4) if options.quick else (options.prompt, 128)
    repetitions = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIGS[options.model]))
        record: dict[str, Any] = {"cores": options.cores, "prompt": prompt, "tokens": generated}
        torch = stack.enter_context(start_torch(options.torch, path, prompt, generated)) if options.torch else {}
        record |= measure(read_config(path).model, prompt, generated, repetitions, torch)
        for length in options.long:
            arguments = [sys.executable, "-m", "benchmarks.workers.prefill", path, length]
            result = subprocess.run(map(str, arguments), cwd=ROOT, capture_output=True, text=True, check=True)
            record[f"{length:,} tokens"] = json.loads(result.stdout)
    for name, value in flatten(record):
        print(f"{name}: {value:.4g}")
    save(record)


@contextlib.contextmanager
def start_torch(python: str, config: Path, prompt: int, generated: int) -> Iterator[Runs]:
    """Starts a process with the model of Hugging Face; yields functions that time its prefill and its decoding."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "benchmarks.workers.generate", str(config), str(prompt), str(generated)]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1) as process:

        def ask(part: str) -> float:
            print(part, file=process.stdin, flush=True)
            return float(process.stdout.readline())

        yield {part: functools.partial(ask, part) for part in ("prefill", "decode")}
        process.stdin.close()


def measure(config: ModelConfig, prompt: int, generated: int, repetitions: int, torch: Runs) -> dict[str, Any]:
    """Seconds of a forward pass and of the prefill, and tokens per second of decoding, by variant and for torch."""
    parameters = Functional(config).init(jax.random.key(0))
    unrolled = dataclasses.replace(config, scan=False)
    flat = restack(parameters, config, unrolled)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), flat)
    variants = {
        "scanned": (config, parameters),
        "unrolled": (unrolled, flat),
        "unrolled, bfloat16": (dataclasses.replace(unrolled, dtype="bfloat16"), low),
    }
    tokens = jax.random.randint(jax.random.key(1), (1, prompt), 0, config.vocab)
    runs: Runs = {"copy": make_copy()} | {f"torch: {part}": run for part, run in torch.items()}
    sizes = {}
    for name, (variant, arrays) in variants.items():
        model = Functional(variant)
        for part, function in make_parts(model, arrays, np.asarray(tokens), generated).items():
            function()  # compiles
            runs[f"{name}: {part}"] = function
        length = Plan.build([prompt], generated + 1).length
        cache = jax.eval_shape(lambda model=model, a=arrays, n=length: model.bind(a).init_cache(1, n))
        if arrays is not parameters:  # those of scanned layers are stacked
            runs[f"{name}: products"] = make_products(arrays, config.tied)
        table = 0 if config.tied else arrays["embedding"]["tokens"].nbytes
        sizes[name] = count_bytes(arrays) - table + count_bytes(cache)
    rows = {name: row["seconds"] for name, row in alternate(runs, repetitions, 0.2).items()}
    bandwidth = 2 * COPY / rows["copy"]
    result: dict[str, Any] = {
        "copy, GB/s": bandwidth / 1e9,
        "parameters": Functional(config).size,
    }
    if torch:
        result["torch"] = {
            "prefill, s": rows["torch: prefill"],
            "decoding, tokens/s": generated / rows["torch: decode"],
        }
    for name in variants:
        seconds = {part: rows[f"{name}: {part}"] for part in ("forward", "prefill", "decode")}
        speed, bound = generated / seconds["decode"], bandwidth / sizes[name]
        result[name] = {
            "forward, s": seconds["forward"],
            "prefill, s": seconds["prefill"],
            "prefill / forward": seconds["prefill"] / seconds["forward"],
            "prefill token by token, s": prompt / speed,
            "decoding, tokens/s": speed,
            "bytes per token": sizes[name],
            "bound, tokens/s": bound,
            "fraction of the bound": speed / bound,
        }
        if f"{name}: products" in rows:
            alone = PRODUCTS / rows[f"{name}: products"]
            result[name] |= {"products alone, tokens/s": alone, "fraction of the products": speed / alone}
    return result


COPY = 2**28
PRODUCTS = 32


def make_copy():
    """Returns a function that times a copy of `COPY` bytes."""
    source, target = np.ones(COPY, np.uint8), np.zeros(COPY, np.uint8)
    return lambda: min(timed(lambda: np.copyto(target, source)) for _ in range(2))  # the first may page memory in


def make_products(parameters: Any, tied: bool) -> Callable[[], float]:
    """Returns a function that times `PRODUCTS` products of a vector with each matrix of an unstacked model."""
    matrices = [x for x in jax.tree.leaves(parameters) if x.ndim == 2]
    if not tied:  # a token reads one row of the table
        matrices = [x for x in matrices if x is not parameters["embedding"]["tokens"]]

    def multiply(matrices: list[jax.Array], x: jax.Array) -> jax.Array:
        for matrix in matrices:
            x = x + (jnp.full(matrix.shape[0], x, matrix.dtype) @ matrix)[0].astype(x.dtype)
        return jnp.tanh(x)

    run = jax.jit(lambda matrices, x: jax.lax.fori_loop(0, PRODUCTS, lambda _, x: multiply(matrices, x), x))
    return lambda: min(timed(lambda: jax.block_until_ready(run(matrices, jnp.float32(0)))) for _ in range(2))


def make_parts(
    model: Functional, parameters: Any, tokens: np.ndarray, generated: int
) -> dict[str, Callable[[], float]]:
    """Returns functions that time a forward pass of the prompt, its prefill, and the decoding after it."""
    forward = jax.jit(lambda parameters, tokens: model.bind(parameters)(tokens)[:, -1])

    def prefill() -> tuple[float, Decoder]:
        decoder = Decoder(model, parameters, tokens, generated + 1, sampling=Sampling(temperature=0))
        return timed(decoder.advance), decoder

    def decode() -> float:
        _, decoder = prefill()
        return timed(lambda: list(iterate(decoder)))

    return {
        # The system may page memory out that another contender did not touch, so that each is called twice.
        "forward": lambda: min(timed(lambda: jax.block_until_ready(forward(parameters, tokens))) for _ in range(2)),
        "prefill": lambda: min(prefill()[0] for _ in range(2)),
        "decode": decode,
    }


def flatten(record: dict[str, Any], path: str = ""):
    """Numbers of nested dicts by path."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{name}: ")
        else:
            yield f"{path}{name}", value
