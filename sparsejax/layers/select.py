"""Keys that the data choose, as an option of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.stream import Cost, attention_cost
from sparsejax.ops import Selection, attention_flops, infllm, moba, top_tiles, top_tokens
from sparsejax.ops.selectors import POOLINGS
from sparsejax.patterns import Pattern

KINDS = ("tokens", "tiles", "moba", "infllm")
INFLLM = ("window", "stride", "initial", "local", "dense_below")
KIND_OF = {"pooling": "tiles", "mass": "tokens"} | dict.fromkeys(INFLLM, "infllm")  # by field of a single kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A query attends only to `count` groups of the keys of its pattern, which it chooses by content.

    | kind | a group | is chosen by |
    |---|---|---|
    | `tokens` | a key | its logit; exact, and as many scores as dense attention |
    | `tiles` | a block of keys | the logits of its keys, by `pooling`; as many scores as dense attention |
    | `moba` | a block of keys | the product with its mean key; that of the query is always chosen (arXiv:2502.13189) |
    | `infllm` | a block of keys | the attention to the mean keys of windows that overlap it (arXiv:2509.24663) |

    Blocks and windows are counted from the start of each document. Each query head chooses for itself; with `infllm`
    the query heads of a key/value head choose together. Gradients flow to the chosen keys and not through the choice;
    of equal scores the lower position wins.
    """

    kind: str  # tokens, tiles, moba or infllm
    count: int  # groups per query
    block: int = 1  # keys per group
    pooling: str = "max"  # max, mean or logsumexp of the logits of a tile
    mass: float = 1.0  # probability that tokens hold: only the fewest that hold it are chosen (top-p), at most count
    window: int = 32  # keys per window of infllm, a multiple of stride
    stride: int = 16  # keys from one window of infllm to the next, which divides block
    initial: int = 1  # first blocks of the document, which infllm always chooses
    local: int = 1  # last blocks, with that of the query, which infllm always chooses
    dense_below: int = 0  # keys before a query in its document below which infllm attends to all of them

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        require_choice(self, "pooling", POOLINGS)
        require_at_least(self, 1, "count", "block", "window", "stride", "local")
        require_at_least(self, 0, "initial", "dense_below")
        if not 0 < self.mass <= 1:
            raise InputError("mass", f"{self.mass} is not in (0, 1]")
        if self.kind == "tokens" and self.block != 1:
            raise InputError("block", f"{self.block}: a token is chosen alone; use kind = 'tiles'")
        for field in dataclasses.fields(self):
            kind, value = KIND_OF.get(field.name, self.kind), getattr(self, field.name)
            if kind != self.kind and value != field.default:
                raise InputError(field.name, f"{value!r} applies to kind = {kind!r} only")
        if self.kind == "infllm":
            for name in ("window", "block"):
                if getattr(self, name) % self.stride:
                    raise InputError(name, f"{getattr(self, name)} is not a multiple of stride = {self.stride}")
            if self.count < self.initial + self.local:
                raise InputError("count", f"{self.count} is below initial + local = {self.initial + self.local}")

    @property
    def summary(self) -> str:
        """What is chosen, in a few words."""
        groups = "keys" if self.kind == "tokens" else f"blocks of {self.block}"
        if self.mass < 1:
            return f"top {self.count} keys of mass {self.mass:g}"
        return f"top {self.count} {groups}" + {"moba": " (MoBA)", "infllm": " (InfLLM-V2)"}.get(self.kind, "")

    def choose(
        self, q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], pattern: Pattern, scale: float, **options: Any
    ) -> Selection:
        """Chooses groups; `options` are the segments, positions and length of `ops.selectors`."""
        if self.kind == "tokens":
            return top_tokens(q, k, self.count, pattern, mass=self.mass, scale=scale, **options)
        if self.kind == "tiles":
            return top_tiles(q, k, self.block, self.count, pattern, pooling=self.pooling, scale=scale, **options)
        if self.kind == "infllm":
            options |= {"window": self.window, "stride": self.stride, "initial": self.initial, "local": self.local}
            return infllm(q, k, self.block, self.count, pattern, dense_below=self.dense_below, scale=scale, **options)
        return moba(q, k, self.block, self.count, pattern, **options)

    def cost(self, pattern: Pattern, length: int, *, heads: int, width: int) -> Cost:
        """Cost of the scores, and of attention to as many keys as the groups can hold."""
        dense, t = attention_cost(pattern, length, heads=heads, score_width=width, value_width=width), np.arange(length)
        if self.kind in ("moba", "infllm"):
            before = t // self.block  # blocks before that of the query
            kept, scored = t % self.block + 1 + np.minimum(self.count - 1, before) * self.block, before
            if self.kind == "infllm":
                kept = np.where(t < self.dense_below, t + 1, kept)
                scored = np.maximum((t + 1 - self.window) // self.stride + 1, 0)
        else:
            kept, scored = np.minimum(t + 1, self.count * self.block), t + 1
        pairs, scores = (min(dense.pairs, heads * int(keys.sum())) for keys in (kept, scored))
        index_flops = attention_flops(scores, width, 0) / max(length, 1)
        flops = attention_flops(pairs, width) / max(length, 1) + index_flops
        return Cost(pairs, flops, dense.tiles, index_pairs=scores, index_flops=index_flops)
