"""The PyTorch process of the benchmarks `cpu_attention`, `layouts` and `scans`.

It runs under a Python interpreter with torch and transformers, so that the thread pools of PyTorch and XLA do not share
the cores. It reads one JSON request per line of standard input, and writes one JSON response per line:

    {"do": "versions"}
    {"do": "attend", "contender": NAME, "length": N, "save": FILE or null}     seconds per forward and backward pass
    {"do": "layout", "length": N, "tile": TILE, "limit_gib": G}                seconds per block mask
    {"do": "step", "config": FIELDS, "length": N}      seconds of the loss of random tokens and its gradient

FIELDS are those of a config.json; the model has random weights in float32. Without CUDA, transformers runs the plain
PyTorch code of Mamba-2.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.nn.attention import flex_attention
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer import modeling_longformer

from benchmarks.harness import (
    BIG_BIRD_TILE,
    HEADS,
    LEFT,
    RADIUS,
    RANDOM_TILES,
    SINK,
    THREADS,
    WIDTH,
    draw_arrays,
    serve,
)


class Inputs(NamedTuple):
    """Queries, keys, values and the cotangent of the output, each [1, n, HEADS, WIDTH]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor


@functools.cache
def draw_inputs(length: int) -> Inputs:
    """Draws the inputs of all contenders."""
    return Inputs(*(torch.from_numpy(x).requires_grad_(i < 3) for i, x in enumerate(draw_arrays(length))))


@functools.cache
def band_mask(length: int) -> torch.Tensor:
    """Dense mask of the window, [n, n]."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return distance.abs() <= RADIUS


def sdpa_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Fused attention of PyTorch under the dense mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=band_mask(q.shape[2])).transpose(1, 2)


def cut_band(x: torch.Tensor) -> torch.Tensor:
    """[1, n, h, d] -> [tiles, h, 3 * RADIUS, d]: each tile of RADIUS tokens with its two neighbours."""
    padded = functional.pad(x[0], (0, 0, 0, 0, RADIUS, RADIUS))
    return padded.unfold(0, 3 * RADIUS, RADIUS).permute(0, 1, 3, 2)


@functools.cache
def cut_mask(length: int) -> torch.Tensor:
    """Mask of the keys of `cut_band`, [tiles, 1, RADIUS, 3 * RADIUS]."""
    query = torch.arange(length).reshape(-1, RADIUS, 1)
    key = query[:, :1] + torch.arange(-RADIUS, 2 * RADIUS)
    return (((query - key).abs() <= RADIUS) & (key >= 0) & (key < length))[:, None]


def band_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Blocked band: each query tile attends to itself and its neighbours, with two batched matrix products."""
    tiles = q[0].reshape(-1, RADIUS, HEADS, WIDTH).transpose(1, 2)
    scores = tiles @ cut_band(k).transpose(-1, -2) * WIDTH**-0.5
    weights = scores.masked_fill(~cut_mask(q.shape[1]), -torch.inf).softmax(dim=-1)
    return (weights @ cut_band(v)).transpose(1, 2).reshape(q.shape)


def band_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Blocked band with fused attention per tile."""
    tiles = q[0].reshape(-1, RADIUS, HEADS, WIDTH).transpose(1, 2)
    mask = cut_mask(q.shape[1])
    out = functional.scaled_dot_product_attention(tiles, cut_band(k), cut_band(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(q.shape)


class Constant(torch.nn.Module):
    """Replaces a projection by a constant tensor, so that attention alone is timed."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.tensor * 1.0  # a copy: Longformer scales its queries in place


def longformer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Longformer self-attention of transformers, without global tokens and projections."""
    config = transformers.LongformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_window=[2 * RADIUS],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    layer = modeling_longformer.LongformerSelfAttention(config, 0)
    length = q.shape[1]
    for name, x in (("query", q), ("key", k), ("value", v)):
        setattr(layer, name, Constant())
        getattr(layer, name).tensor = x.reshape(1, length, -1).transpose(0, 1)
    zeros = torch.zeros(1, length)
    out = layer(q.detach().reshape(1, length, -1), zeros, zeros.bool(), zeros.bool(), is_global_attn=False)[0]
    return out.reshape(q.shape)


def big_bird_layer(length: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """BigBird attention of transformers and its masks, in training mode: evaluation mode has no random tiles."""
    config = transformers.BigBirdConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        block_size=BIG_BIRD_TILE,
        num_random_blocks=RANDOM_TILES,
        max_position_embeddings=length,
    )
    layer = modeling_big_bird.BigBirdBlockSparseAttention(config, seed=0).train()
    masks = modeling_big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), BIG_BIRD_TILE)
    return layer, masks


def big_bird(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """BigBird attention of transformers without projections."""
    length = q.shape[1]
    layer, (blocked, band, rows, columns) = big_bird_layer(length)
    out, _ = layer.bigbird_block_sparse_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        *(band, rows, columns, blocked, blocked),
        *(HEADS, RANDOM_TILES, WIDTH, BIG_BIRD_TILE, BIG_BIRD_TILE, 1, length, length),
        seed=0,
        plan_from_length=None,
        plan_num_rand_blocks=None,
    )
    return out.reshape(q.shape)


def big_bird_projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """BigBird attention of transformers with its projections."""
    layer, (blocked, band, rows, columns) = big_bird_layer(q.shape[1])
    hidden = (q + k + v).reshape(1, q.shape[1], -1)
    return layer(hidden, band, rows, columns, blocked, blocked)[0].reshape(q.shape)


CONTENDERS = {
    "PyTorch dense SDPA": sdpa_dense,
    "PyTorch band, products": band_products,
    "PyTorch band, SDPA": band_sdpa,
    "HF Longformer": longformer,
    "HF BigBird": big_bird,
    "HF BigBird with projections": big_bird_projected,
}


def time_attention(contender: str, length: int, save: str | None) -> dict:
    """Times a forward and backward pass; writes output and gradients to `save`, if any."""
    inputs = draw_inputs(length)
    for x in inputs[:3]:
        x.grad = None
    start = time.perf_counter()
    out = CONTENDERS[contender](*inputs[:3])
    out.backward(inputs.d_out)
    seconds = time.perf_counter() - start
    if save:
        np.savez(save, *(x.detach().numpy() for x in (out, *(x.grad for x in inputs[:3]))))
    return {"seconds": seconds}


def time_layout(length: int, tile: int, limit_gib: float) -> dict:
    """Times the block mask of flex attention for `causal & (window(LEFT) | sink(SINK))`; returns peak memory too."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)

    def allows(batch, head, q, k):
        return (k <= q) & ((k >= q - LEFT) | (k < SINK))

    start = time.perf_counter()
    mask = flex_attention.create_block_mask(allows, None, None, length, length, device="cpu", BLOCK_SIZE=tile)
    seconds = time.perf_counter() - start
    live = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    return {"seconds": seconds, "live": live, "peak_rss_mib": peak_rss_mib()}


def peak_rss_mib() -> float:
    """Peak resident memory of this process; `ru_maxrss` would include the parent process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


@functools.cache
def build_model(config: str) -> torch.nn.Module:
    """Builds the model of a config.json."""
    torch.manual_seed(0)
    described = transformers.AutoConfig.for_model(**json.loads(config))
    return transformers.AutoModelForCausalLM.from_config(described).float().train()


def time_step(config: dict, length: int) -> dict:
    """Times the loss and its gradient."""
    model = build_model(json.dumps(config))
    tokens = torch.randint(0, config["vocab_size"], (1, length))
    start = time.perf_counter()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {"seconds": time.perf_counter() - start}


def report_versions() -> dict:
    """Returns the versions of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "rss_mib": peak_rss_mib(),
    }


if __name__ == "__main__":
    torch.set_num_threads(min(THREADS, len(os.sched_getaffinity(0))))
    actions = {"versions": report_versions, "attend": time_attention, "layout": time_layout, "step": time_step}
    serve(actions, errors=(RuntimeError, MemoryError))
