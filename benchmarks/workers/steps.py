"""The PyTorch process of the part `layers` of the benchmark `scans`: gradients of Hugging Face's models.

It reads one JSON request per line of standard input, and writes one JSON response per line:

    {"do": "versions"}
    {"do": "step", "config": FIELDS, "length": N}      seconds of the loss of random tokens and its gradient

FIELDS are those of a config.json. The model has random weights in float32. Without CUDA, transformers runs the plain
PyTorch code of Mamba and Mamba-2.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time

import torch
import transformers

from benchmarks.harness import serve


def versions() -> dict:
    """Returns the versions of Python, PyTorch and transformers."""
    named = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return named | {"threads": torch.get_num_threads()}


@functools.cache
def build(config: str) -> torch.nn.Module:
    """Builds the model of a config.json."""
    torch.manual_seed(0)
    fields = json.loads(config)
    described = transformers.AutoConfig.for_model(**fields)
    return transformers.AutoModelForCausalLM.from_config(described).float().train()


def step(config: dict, length: int) -> dict:
    """Times the loss and its gradient."""
    model = build(json.dumps(config))
    tokens = torch.randint(0, config["vocab_size"], (1, length))
    start = time.perf_counter()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    serve({"versions": versions, "step": step}, errors=(RuntimeError,))
