"""Keys that the data choose, as an option of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.stream import Cost, attention_cost
from sparsejax.ops import Selection, attention_flops, moba, top_tiles, top_tokens
from sparsejax.ops.selectors import POOLINGS
from sparsejax.patterns import Pattern

KINDS = ("tokens", "tiles", "moba")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A query attends only to `count` groups of the keys of its pattern, which it chooses by content.

    | kind | a group | is chosen by |
    |---|---|---|
    | `tokens` | a key | its logit; exact, and as many scores as dense attention |
    | `tiles` | a block of keys | the logits of its keys, by `pooling`; as many scores as dense attention |
    | `moba` | a block of keys | the product with its mean key; that of the query is always chosen (arXiv:2502.13189) |

    Blocks are counted from the start of each document. Each query head chooses for itself. Gradients flow to the chosen
    keys and not through the choice; of equal scores the lower position wins.
    """

    kind: str  # tokens, tiles or moba
    count: int  # groups per query
    block: int = 1  # keys per group
    pooling: str = "max"  # max, mean or logsumexp of the logits of a tile

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        require_choice(self, "pooling", POOLINGS)
        require_at_least(self, 1, "count", "block")
        if self.kind == "tokens" and self.block != 1:
            raise InputError("block", f"{self.block}: a token is chosen alone; use kind = 'tiles'")
        if self.kind != "tiles" and self.pooling != "max":
            raise InputError("pooling", f"{self.pooling!r} applies to kind = 'tiles' only")

    @property
    def summary(self) -> str:
        """What is chosen, in a few words."""
        groups = "keys" if self.kind == "tokens" else f"blocks of {self.block}"
        return f"top {self.count} {groups}" + (" (MoBA)" if self.kind == "moba" else "")

    def choose(
        self, q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], pattern: Pattern, scale: float, **options: Any
    ) -> Selection:
        """Chooses groups; `options` are the segments, positions and length of `ops.selectors`."""
        if self.kind == "tokens":
            return top_tokens(q, k, self.count, pattern, scale=scale, **options)
        if self.kind == "tiles":
            return top_tiles(q, k, self.block, self.count, pattern, pooling=self.pooling, scale=scale, **options)
        return moba(q, k, self.block, self.count, pattern, **options)

    def cost(self, pattern: Pattern, length: int, *, heads: int, width: int) -> Cost:
        """Cost of the scores, and of attention to as many keys as the groups can hold."""
        dense, t = attention_cost(pattern, length, heads=heads, score_width=width, value_width=width), np.arange(length)
        if self.kind == "moba":
            before = t // self.block  # blocks before that of the query
            kept, scored = t % self.block + 1 + np.minimum(self.count - 1, before) * self.block, before
        else:
            kept, scored = np.minimum(t + 1, self.count * self.block), t + 1
        pairs, scores = (min(dense.pairs, heads * int(keys.sum())) for keys in (kept, scored))
        flops = attention_flops(pairs, width) + attention_flops(scores, width, 0)
        return Cost(pairs + scores, flops / max(length, 1), dense.tiles)
