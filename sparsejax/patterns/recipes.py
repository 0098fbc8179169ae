"""Patterns by the name of the paper or model that uses them: plain functions that return expressions.

Whatever a paper calls a window of w, here `left` and `right` count keys without the query itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

from sparsejax.patterns import library as lib
from sparsejax.patterns.base import Multiset, Pattern, PatternError, Shift, per_head
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles


def longformer(
    left: int, right: int | None = None, ids: int | Sequence[int] = 0, strides: Sequence[int] = ()
) -> Pattern:
    """Longformer (arXiv:2004.05150): a window, dilated on some heads, and symmetric global tokens.

    Args:
      left: keys before the query. The released models' `attention_window` w is `left = right = w // 2`.
      right: keys after it; as many as before if not given. 0 for the paper's language models.
      ids: global tokens, as in `globals`.
      strides: the dilation of each head, 1 for none; if not given, all heads share one window.
    """
    right = left if right is None else right
    windows = [lib.Window(left, right) if n == 1 else lib.Dilated(left, right, stride=n) for n in strides]
    near = per_head(*windows) if windows else lib.Window(left, right)
    return near | lib.Globals(ids if isinstance(ids, int) else tuple(ids)) if ids else near


def bigbird(
    tile: int,
    r: int,
    seed: int,
    heads: int | None = None,
    layer: int = 0,
    extra: int = 0,
    plan: str | Sequence = "uniform",
    multiset: bool = False,
) -> Pattern:
    """BigBird (arXiv:2007.14062): a tile, its neighbours, global tiles, and `r` random ones. Both directions.

    Args:
      tile: tokens of a tile. Lengths should be multiples of it.
      r: random key tiles of each query tile; 0 for none.
      seed: of the draw; the released models use the number of the layer.
      heads: draws for so many heads; one draw for all of them if not given.
      layer: number of the layer; draws of different layers differ.
      extra: 0: the first and the last tile are global (ITC). Otherwise the first so many tokens are, which are put
        before the sequence (ETC).
      plan: "uniform": drawn from all tiles not seen anyway. "released": what the released code draws in training.
        "evaluation": what it has then, the first tile `r` times; only `multiset` makes a difference of that. Or the
        tiles themselves, a list of `r` for each inner query tile of each head: [heads, tiles - 2, r].
      multiset: a tile listed twice counts twice, as in the released code.

    Raises:
      PatternError: a plan that is none of these.
    """
    near = functools.reduce(operator.or_, (Shift(lib.Chunk(tile), by) for by in (tile, -tile)), lib.Chunk(tile))
    ends = (lib.Globals(extra),) if extra else (lib.Globals(tile), lib.Globals(-tile))
    known = functools.reduce(operator.or_, ends, near)
    if not isinstance(plan, str):
        drawn = [[_tiles_of_draw(tile, head, i) for i in range(r)] for head in plan]
        heads = len(drawn)
    elif plan == "uniform":
        keys = {"tile": tile, "seed": seed, "apart": 2, "ends": 0 if extra else 1, "layer": layer}
        drawn = [(Random(r, **keys, head=i),) if r else () for i in range(heads or 1)]
    elif plan == "released":
        keys = {"tile": tile, "seed": seed, "among": heads or 1}
        drawn = [(BigBirdRandom(r, **keys, head=i),) if r else () for i in range(heads or 1)]
    elif plan == "evaluation":
        drawn = [(lib.GlobalKeys(tile) - (lib.GlobalQueries(tile) | lib.GlobalQueries(-tile)),) * r] * (heads or 1)
    else:
        raise PatternError(f"bigbird: plan must be uniform, released or evaluation, got {plan!r}")
    join = Multiset.of if multiset else lambda *terms: functools.reduce(operator.or_, terms)
    each = [join(known, *terms) for terms in drawn]
    return per_head(*each) if heads else each[0]


def _tiles_of_draw(tile: int, rows: Sequence[Sequence[int]], draw: int) -> Pattern:
    """The key tile of one draw for each inner query tile; the first and the last query tile see everything anyway."""
    return Tiles(((), *((int(row[draw]),) for row in rows), ()), tile=tile)


def sparse_transformer_strided(stride: int, heads: int | None = None) -> Pattern:
    """Sparse Transformer, strided (arXiv:1904.10509): the last `stride` keys and every `stride`-th one. Causal.

    With `heads`, the paper's other form: even heads have the one half, odd heads the other.
    """
    return _merged_or_alternating(lib.Window(stride), lib.Strided(stride), heads)


def sparse_transformer_fixed(l: int, c: int, heads: int | None = None) -> Pattern:  # noqa: E741 (the paper's name)
    """Sparse Transformer, fixed (arXiv:1904.10509): the span of `l` and the last `c` keys of all before. Causal.

    With `heads`, the paper's other form: even heads have the one half, odd heads the other.
    """
    return _merged_or_alternating(lib.Chunk(l), lib.Fixed(l, c), heads)


def mistral(w: int = 4096) -> Pattern:
    """Mistral 7B (arXiv:2310.06825), as released: a causal window of `w` keys, the query itself included."""
    return lib.Causal() & lib.Window(w - 1)


def streaming_llm(sinks: int = 4, recent: int = 1020) -> Pattern:
    """StreamingLLM (arXiv:2309.17453): the first `sinks` keys and the `recent` last ones, itself included. Causal."""
    return lib.Causal() & (lib.Window(recent - 1) | lib.Sink(sinks))


def llama4_local(c: int = 8192) -> Pattern:
    """Llama 4's local layers: causal within chunks of `c`. Every fourth layer is `causal`, without positions."""
    return lib.Causal() & lib.Chunk(c)


def gemma_local(w: int = 1024) -> Pattern:
    """Gemma's local layers: a causal window of `w` keys, itself included.

    Gemma 2 (arXiv:2408.00118) has 4,096 and alternates with `causal`; Gemma 3 (arXiv:2503.19786) has 1,024 and
    five of them to one.
    """
    return lib.Causal() & lib.Window(w - 1)


def gemma_global() -> Pattern:
    """Gemma's global layers."""
    return lib.Causal()


def _merged_or_alternating(row: Pattern, column: Pattern, heads: int | None) -> Pattern:
    if heads is None:
        return lib.Causal() & (row | column)
    return lib.Causal() & per_head(*((row, column)[i % 2] for i in range(heads)))
