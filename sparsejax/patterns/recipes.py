"""Patterns by the paper or model that uses them: functions that return expressions of the algebra.

Every recipe is part of the text form: `parse("mistral(4096)") == mistral(4096)`. `left` and `right` count keys without
the query itself; `w` follows the paper.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from sparsejax.patterns import library as lib
from sparsejax.patterns.algebra import Multiset, Shift, per_head
from sparsejax.patterns.base import Pattern, PatternError, format_value, require_integer
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles

MAX_TERMS = 1024  # patterns that one argument of a recipe makes


def longformer(
    left: int, right: int | None = None, ids: int | Sequence[int] = 0, strides: Sequence[int] = ()
) -> Pattern:
    """Longformer (arXiv:2004.05150): a window, dilated on some heads, and symmetric global tokens.

    Args:
      left: Keys before the query. The `attention_window` w of the released models is `left = right = w // 2`.
      right: Keys after the query; defaults to `left`. 0 for the language models of the paper.
      ids: Global tokens, as in `globals`.
      strides: Dilation per head, 1 for none. By default all heads share one window.
    """
    right = left if right is None else right
    if not isinstance(strides, list | tuple):
        raise PatternError("longformer.strides", f"{format_value(strides)} is not a list of integers")
    windows = [lib.Window(left, right) if n == 1 else lib.Dilated(left, right, stride=n) for n in strides]
    near = per_head(*windows) if windows else lib.Window(left, right)
    return near | lib.Globals(tuple(ids) if isinstance(ids, Sequence) else ids) if ids else near


def bigbird(
    tile: int,
    r: int,
    seed: int,
    heads: int | None = None,
    layer: int = 0,
    extra: int = 0,
    plan: str | Sequence[Sequence[Sequence[int]]] = "uniform",
    multiset: bool = False,
) -> Pattern:
    """BigBird (arXiv:2007.14062): the query's tile, its neighbours, global tiles and `r` random tiles, bidirectional.

    Args:
      tile: Tokens of a tile. Lengths should be multiples of it.
      r: Random key tiles per query tile; 0 for none.
      seed: Seed of the draw; the released models use the number of the layer.
      heads: Number of heads, each with its own draw. By default all heads share one draw.
      layer: Number of the layer; draws of different layers differ.
      extra: 0 makes the first and the last tile global (ITC). A number n makes the first n tokens global (ETC).
      plan: "uniform" draws from the tiles to which the query does not attend otherwise. "released" draws as the
        released code does in training. "evaluation" has the first tile `r` times, as that code does in evaluation; this
        matters only with `multiset`. A list gives the tiles per head and inner query tile: [heads, tiles - 2, r].
      multiset: Whether a tile that is listed twice counts twice, as in the released code.

    Raises:
      PatternError: The plan is none of these.
    """
    for name, value, minimum in (("tile", tile, 1), ("seed", seed, 0), ("layer", layer, 0), ("extra", extra, 0)):
        require_integer(f"bigbird.{name}", value, minimum)
    require_integer("bigbird.r", r, 0, MAX_TERMS)
    if heads is not None:
        require_integer("bigbird.heads", heads, 1, MAX_TERMS)
    near = functools.reduce(operator.or_, (Shift(lib.Chunk(tile), by) for by in (tile, -tile)), lib.Chunk(tile))
    ends = (lib.Globals(extra),) if extra else (lib.Globals(tile), lib.Globals(-tile))
    local = functools.reduce(operator.or_, ends, near)
    count = heads or 1
    drawn: Sequence[Sequence[Pattern]]  # per head
    if not isinstance(plan, str):
        drawn = [_tiles_of_plan(tile, r, rows) for rows in _check_plan(plan, r)]
        heads = len(drawn)
    elif plan == "uniform":
        draw = functools.partial(Random, r, tile=tile, seed=seed, apart=2, ends=0 if extra else 1, layer=layer)
        drawn = [(draw(head=i),) if r else () for i in range(count)]
    elif plan == "released":
        released = functools.partial(BigBirdRandom, r, tile=tile, seed=seed, among=count)
        drawn = [(released(head=i),) if r else () for i in range(count)]
    elif plan == "evaluation":
        drawn = [(lib.GlobalKeys(tile) - (lib.GlobalQueries(tile) | lib.GlobalQueries(-tile)),) * r] * count
    else:
        raise PatternError("bigbird.plan", f"{plan!r} is not uniform, released, evaluation or a list of tiles")
    join = Multiset.of if multiset else _union
    by_head = [join(local, *terms) for terms in drawn]
    return per_head(*by_head) if heads else by_head[0]


def _union(*terms: Pattern) -> Pattern:
    return functools.reduce(operator.or_, terms)


def _check_plan(plan: Sequence[Sequence[Sequence[int]]], r: int) -> Sequence[Sequence[Sequence[int]]]:
    """Checks that a plan is a list [heads, tiles - 2, r]."""
    lists = isinstance(plan, Sequence) and all(isinstance(rows, Sequence) for rows in plan)
    if not (lists and plan and all(isinstance(row, Sequence) and len(row) == r for rows in plan for row in rows)):
        raise PatternError(
            "bigbird.plan", f"{format_value(plan)} is not a list of {r} tiles per inner query tile and head"
        )
    return plan


def _tiles_of_plan(tile: int, r: int, rows: Sequence[Sequence[int]]) -> list[Pattern]:
    """One pattern per draw. The first and the last query tile attend to everything without them."""
    return [Tiles(((), *((row[i],) for row in rows), ()), tile=tile) for i in range(r)]


def sparse_transformer_strided(stride: int, heads: int | None = None) -> Pattern:
    """Sparse Transformer, strided (arXiv:1904.10509): the last `stride` keys and every `stride`-th key. Causal.

    `heads` selects the other form of the paper: even heads have the first half, odd heads the second.
    """
    return _merged_or_alternating("sparse_transformer_strided", lib.Window(stride), lib.Strided(stride), heads)


def sparse_transformer_fixed(l: int, c: int, heads: int | None = None) -> Pattern:  # noqa: E741 (the paper's name)
    """Sparse Transformer, fixed (arXiv:1904.10509): the block of `l` keys and the last `c` keys of all blocks. Causal.

    `heads` selects the other form of the paper: even heads have the first half, odd heads the second.
    """
    return _merged_or_alternating("sparse_transformer_fixed", lib.Chunk(l), lib.Fixed(l, c), heads)


def _merged_or_alternating(recipe: str, row: Pattern, column: Pattern, heads: int | None) -> Pattern:
    if heads is None:
        return lib.Causal() & (row | column)
    require_integer(f"{recipe}.heads", heads, 1, MAX_TERMS)
    return lib.Causal() & per_head(*((row, column)[i % 2] for i in range(heads)))


def mistral(w: int = 4096) -> Pattern:
    """Mistral 7B (arXiv:2310.06825), as released: a causal window of `w` keys, including the query."""
    return _causal_window("mistral", w)


def streaming_llm(sinks: int = 4, recent: int = 1020) -> Pattern:
    """StreamingLLM (arXiv:2309.17453): the first `sinks` and the last `recent` keys, including the query. Causal."""
    require_integer("streaming_llm.recent", recent, 1)
    return lib.Causal() & (lib.Window(recent - 1) | lib.Sink(sinks))


def llama4_local(c: int = 8192) -> Pattern:
    """Local layers of Llama 4: causal within chunks of `c` keys. Every fourth layer is `causal`, without positions."""
    return lib.Causal() & lib.Chunk(c)


def gemma_local(w: int = 1024) -> Pattern:
    """Local layers of Gemma: a causal window of `w` keys, including the query.

    Gemma 2 (arXiv:2408.00118) has w = 4,096 and alternates local and global layers; Gemma 3 (arXiv:2503.19786) has
    w = 1,024 and five local layers per global layer.
    """
    return _causal_window("gemma_local", w)


def gemma_global() -> Pattern:
    """Global layers of Gemma: causal."""
    return lib.Causal()


def _causal_window(recipe: str, w: int) -> Pattern:
    require_integer(f"{recipe}.w", w, 1)
    return lib.Causal() & lib.Window(w - 1)


RECIPES: dict[str, Callable[..., Pattern]] = {
    recipe.__name__: recipe
    for recipe in (
        longformer,
        bigbird,
        sparse_transformer_strided,
        sparse_transformer_fixed,
        mistral,
        streaming_llm,
        llama4_local,
        gemma_local,
        gemma_global,
    )
}
