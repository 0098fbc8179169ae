"""How fast are prefill and decoding, compared with a forward pass, the memory's bandwidth and Hugging Face?

A model of 16M parameters in float32 (4 layers of width 512, window 512, 4,096 tokens of vocabulary; or Mamba) reads a
prompt in chunks and generates 128 tokens, with layers scanned, unrolled, and unrolled with bfloat16 weights. The bound
of decoding is the bytes of weights and caches per token over the bandwidth of a copy, measured in the same process.
`--torch` is a Python interpreter with torch and transformers, which runs the same config.json in its own process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import ROOT, Save, alternate, timed
from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface import read_config
from sparsejax.model import Functional, restack

CHUNK = 512
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
    parser.add_argument("--torch", metavar="TORCH_PYTHON", help="Python interpreter with torch and transformers")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures, prints and saves."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    prompt, generated = (48, 4) if options.quick else (options.prompt, 128)
    repetitions = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIGS[options.model]))
        record: dict[str, Any] = {
            "cores": options.cores,
            "prompt": prompt,
            "tokens": generated,
            "sparsejax": measure(read_config(path).model, prompt, generated, repetitions),
        }
        if options.torch:
            arguments = [options.torch, "-m", "benchmarks.workers.generate", path, prompt, generated, repetitions]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.cores)}
            result = subprocess.run(map(str, arguments), env=environment, capture_output=True, text=True, check=True)
            record["torch"] = json.loads(result.stdout)
    for name, value in flatten(record):
        print(f"{name}: {value:.4g}")
    save(record)


def measure(config: ModelConfig, prompt: int, generated: int, repetitions: int) -> dict[str, Any]:
    """Seconds of a forward pass and of the prefill, and tokens per second of decoding, by variant."""
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
    runs: dict[str, Any] = {"copy": make_copy()}
    sizes = {}
    for name, (variant, arrays) in variants.items():
        model = Functional(variant)
        forward, prefill, decode = (
            functools.partial(make(model, prompt + generated), arrays, tokens, generated)
            for make in (make_forward, make_prefill, make_decode)
        )
        for part, function in (("forward", forward), ("prefill", prefill), ("decode", decode)):
            function()
            runs[f"{name}: {part}"] = functools.partial(clock, function)
        cache = jax.eval_shape(lambda model=model, a=arrays: model.bind(a).init_cache(1, prompt + generated))
        table = 0 if config.head.tied else arrays["embedding"]["tokens"].nbytes
        sizes[name] = count_bytes(arrays) - table + count_bytes(cache)
    rows = {name: row["seconds"] for name, row in alternate(runs, repetitions, 0.2).items()}
    bandwidth = 2 * COPY / rows["copy"]
    result: dict[str, Any] = {"copy, GB/s": bandwidth / 1e9, "parameters": Functional(config).size}
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
    return result


COPY = 2**28


def make_copy():
    """Returns a function that times a copy of `COPY` bytes."""
    source, target = np.ones(COPY, np.uint8), np.zeros(COPY, np.uint8)
    return lambda: timed(lambda: np.copyto(target, source))


def clock(function) -> float:
    """Seconds of a call; a decoder prepares its cache before and returns its own."""
    result = function()
    return result if isinstance(result, float) else timed(function)


def count_bytes(tree: Any) -> int:
    """Bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_forward(model: Functional, length: int):
    """Returns a forward pass of the prompt."""
    forward = jax.jit(lambda parameters, tokens: model.bind(parameters)(tokens)[:, -1])
    return lambda parameters, tokens, _: jax.block_until_ready(forward(parameters, tokens))


def make_extend(model: Functional, length: int):
    """Returns a prefill in chunks, a function of parameters and tokens, with logits and cache."""

    @functools.partial(jax.jit, donate_argnums=1)
    def extend(parameters, cache, tokens, position):
        return model.bind(parameters).extend(tokens, cache, jnp.full(len(tokens), position), length, last=True)

    def prefill(parameters, tokens):
        cache = model.bind(parameters).init_cache(1, length)
        for start in range(0, tokens.shape[1], CHUNK):
            logits, cache = extend(parameters, cache, tokens[:, start : start + CHUNK], jnp.int32(start))
        return jax.block_until_ready((logits, cache))

    return prefill


def make_prefill(model: Functional, length: int):
    """Returns a prefill with the signature of the other functions."""
    prefill = make_extend(model, length)
    return lambda parameters, tokens, _: prefill(parameters, tokens)[0]


def make_decode(model: Functional, length: int):
    """Returns a function that prefills and returns the seconds of decoding."""
    prefill = make_extend(model, length)

    @functools.partial(jax.jit, donate_argnums=1, static_argnums=4)
    def decode(parameters, cache, logits, start, count):
        bound = model.bind(parameters)

        def advance(carry, position):
            cache, logits = carry
            token = logits.argmax(-1, keepdims=True)
            logits, cache = bound.extend(token, cache, jnp.full(1, position), length, last=True)
            return (cache, logits), token

        return jax.lax.scan(advance, (cache, logits), start + jnp.arange(count))

    def run(parameters, tokens, generated) -> float:
        logits, cache = prefill(parameters, tokens)
        work = functools.partial(decode, parameters, cache, logits, jnp.int32(tokens.shape[1]), generated)
        return timed(lambda: jax.block_until_ready(work()))

    return run


def flatten(record: dict[str, Any], path: str = ""):
    """Numbers of nested dicts by path."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{name}: ")
        else:
            yield f"{path}{name}", value
