"""The PyTorch side of `measure_cpu_attention.py` and `measure_layouts.py`: a process of its own, run by a Python
that has torch and transformers, so that two thread pools never share the cores.

It answers one request for each line of standard input (JSON), with one line (JSON):

    {"do": "versions"}
    {"do": "attend", "contender": NAME, "length": N, "save": FILE or null}     seconds of one forward and backward
    {"do": "layout", "length": N, "tile": TILE, "limit_gib": G}                seconds of one block mask
"""

from __future__ import annotations

import functools
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from protocol import BIG_BIRD_TILE, HEADS, LEFT, RADIUS, RANDOM_TILES, SINK, THREADS, WIDTH, draw_arrays
from torch.nn import functional
from torch.nn.attention import flex_attention
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer import modeling_longformer


class Inputs(NamedTuple):
    """Queries, keys, values and the cotangent of the output, each [1, n, HEADS, WIDTH]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor


@functools.cache
def draw_inputs(length: int) -> Inputs:
    """The arrays on which both sides are measured."""
    return Inputs(*(torch.from_numpy(x).requires_grad_(i < 3) for i, x in enumerate(draw_arrays(length))))


@functools.cache
def band_mask(length: int) -> torch.Tensor:
    """Which pairs the window allows, [n, n]."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return distance.abs() <= RADIUS


def sdpa_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused attention under the whole mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=band_mask(q.shape[2])).transpose(1, 2)


def cut_band(x: torch.Tensor) -> torch.Tensor:
    """[1, n, h, d] -> [tiles, h, 3 * RADIUS, d]: each tile of RADIUS tokens between its two neighbours."""
    padded = functional.pad(x[0], (0, 0, 0, 0, RADIUS, RADIUS))
    return padded.unfold(0, 3 * RADIUS, RADIUS).permute(0, 1, 3, 2)


@functools.cache
def cut_mask(length: int) -> torch.Tensor:
    """Which keys of `cut_band` count, [tiles, 1, RADIUS, 3 * RADIUS]."""
    q_at = torch.arange(length).reshape(-1, RADIUS, 1)
    k_at = q_at[:, :1] + torch.arange(-RADIUS, 2 * RADIUS)
    return (((q_at - k_at).abs() <= RADIUS) & (k_at >= 0) & (k_at < length))[:, None]


def band_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The plain blocked band: each tile of queries against itself and its neighbours, by two batched products."""
    tiles = q[0].reshape(-1, RADIUS, HEADS, WIDTH).transpose(1, 2)
    scores = tiles @ cut_band(k).transpose(-1, -2) * WIDTH**-0.5
    weights = scores.masked_fill(~cut_mask(q.shape[1]), -torch.inf).softmax(dim=-1)
    return (weights @ cut_band(v)).transpose(1, 2).reshape(q.shape)


def band_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same band, with the fused attention for each tile."""
    tiles = q[0].reshape(-1, RADIUS, HEADS, WIDTH).transpose(1, 2)
    mask = cut_mask(q.shape[1])
    out = functional.scaled_dot_product_attention(tiles, cut_band(k), cut_band(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(q.shape)


class Given(torch.nn.Module):
    """Stands in for a projection and returns the given tensor, so that only the attention itself is timed."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.tensor * 1.0  # a copy: Longformer scales its queries in place


def longformer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hugging Face's Longformer self-attention without global tokens, from its scores to its output."""
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
        setattr(layer, name, Given())
        getattr(layer, name).tensor = x.reshape(1, length, -1).transpose(0, 1)
    nothing = torch.zeros(1, length)
    out = layer(q.detach().reshape(1, length, -1), nothing, nothing.bool(), nothing.bool(), is_global_attn=False)[0]
    return out.reshape(q.shape)


def big_bird_layer(length: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Hugging Face's BigBird attention (in training mode, for only then its links are random), and its masks."""
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
    """Its core alone, of given queries, keys and values."""
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
    """The same as it is called: with its projections, of one input, to queries, keys and values."""
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
    """Seconds of one forward and backward pass; writes output and gradients to `save` if given."""
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
    """Seconds of flex attention's block mask of `causal & (window(LEFT) | sink(SINK))`, and this process's peak."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)

    def allows(batch, head, q, k):
        return (k <= q) & ((k >= q - LEFT) | (k < SINK))

    start = time.perf_counter()
    mask = flex_attention.create_block_mask(allows, None, None, length, length, device="cpu", BLOCK_SIZE=tile)
    seconds = time.perf_counter() - start
    live = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    return {"seconds": seconds, "live": live, "peak_rss_mib": peak_rss_mib()}


def peak_rss_mib() -> float:
    """The most memory this process has held; `ru_maxrss` would count the process that started it."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def report_versions() -> dict:
    """What answers here."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "rss_mib": peak_rss_mib(),
    }


def main() -> None:
    """Answers until standard input ends."""
    torch.set_num_threads(THREADS)
    actions = {"versions": report_versions, "attend": time_attention, "layout": time_layout}
    for line in sys.stdin:
        request = json.loads(line)
        action = actions[request.pop("do")]
        try:
            answer = action(**request)
        except (RuntimeError, MemoryError) as error:
            answer = {"error": str(error).splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
