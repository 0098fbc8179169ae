"""Hypothesis strategies for every pattern of the library and its algebra."""

import functools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from sparsejax.patterns import (
    And,
    BigBirdRandom,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Full,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Minus,
    Multiset,
    Or,
    Pattern,
    Prefix,
    Random,
    Shift,
    Sink,
    Strided,
    Tiles,
    Window,
    per_head,
)
from sparsejax.patterns.base import MAX_POSITION

# New random examples every night; the database replays failures first.
NIGHTLY = settings(
    max_examples=20_000, derandomize=False, database=DirectoryBasedExampleDatabase(".hypothesis/examples")
)


def numbers(least: int, longest: int) -> st.SearchStrategy[int]:
    """Integers up to `longest`, mostly small: patterns that allow everything have few partial tiles."""
    return st.integers(least, max(least, longest // 8)) | st.integers(least, longest)


def token_ids(longest: int) -> st.SearchStrategy[int | tuple[int, ...]]:
    return (
        numbers(0, longest) | st.integers(-longest, 0) | st.lists(st.integers(-longest, longest), max_size=4).map(tuple)
    )


def tile_lists() -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Up to five rows of key tiles below the number of rows."""
    return st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, n - 1), max_size=n).map(tuple), min_size=n, max_size=n).map(tuple)
    )


# Each named pattern that contains no other; test_masks.py fails if one is missing.
LIBRARY = {
    "causal": lambda longest: st.just(Causal()),
    "window": lambda longest: st.builds(Window, numbers(0, longest), st.just(0) | numbers(0, longest)),
    "dilated": lambda longest: st.builds(
        lambda left, right, stride: Dilated(left, right, stride=min(stride, MAX_POSITION // max(left, right, 1))),
        numbers(0, longest),
        st.just(0) | numbers(0, longest),
        numbers(1, longest),
    ),
    "strided": lambda longest: st.builds(Strided, numbers(1, longest)),
    "fixed": lambda longest: numbers(1, longest).flatmap(
        lambda span: st.builds(Fixed, st.just(span), st.integers(1, span))
    ),
    "chunk": lambda longest: st.builds(Chunk, numbers(1, longest)),
    "sink": lambda longest: st.builds(Sink, numbers(1, longest)),
    "prefix": lambda longest: st.builds(Prefix, numbers(1, longest)),
    "globals": lambda longest: st.builds(Globals, token_ids(longest)),
    "global_keys": lambda longest: st.builds(GlobalKeys, token_ids(longest)),
    "global_queries": lambda longest: st.builds(GlobalQueries, token_ids(longest)),
    "random": lambda longest: st.builds(
        Random,
        st.integers(1, 4),
        tile=numbers(1, longest),
        seed=st.integers(0, 2**20),
        reach=st.none() | numbers(0, longest),
        apart=st.integers(0, 2),
        ends=st.integers(0, 1),
        layer=st.integers(0, 2),
        head=st.integers(0, 2),
    ),
    "bigbird_random": lambda longest: st.builds(
        BigBirdRandom,
        st.integers(1, 3),
        tile=numbers(1, longest),
        seed=st.integers(0, 5),
        head=st.integers(0, 1),
        among=st.just(2),
        longest=numbers(1, 2 * longest),
    ),
    "tiles": lambda longest: st.builds(Tiles, tile_lists(), tile=st.none() | numbers(1, longest)),
    "full": lambda longest: st.just(Full()),
}


def shared_patterns(longest: int = 40) -> st.SearchStrategy[Pattern]:
    """Expressions that all heads share."""
    named = st.one_of([strategy(longest) for strategy in LIBRARY.values()])
    return joined(named | st.builds(Shift, named, st.integers(-longest, longest)))


def patterns_with_heads(heads: int, longest: int = 40) -> st.SearchStrategy[Pattern]:
    """Expressions in which a term at any depth differs between the heads."""
    by_head = st.lists(shared_patterns(longest), min_size=heads, max_size=heads)
    distinguishing = by_head.map(lambda patterns: per_head(*patterns))
    other = distinguishing | shared_patterns(longest)
    return distinguishing | st.builds(lambda a, b, join: join.of(a, b), distinguishing, other, JOINS)


def patterns(longest: int = 40) -> st.SearchStrategy[Pattern]:
    """All expressions of the algebra."""
    with_heads = st.integers(1, 3).flatmap(lambda heads: patterns_with_heads(heads, longest))
    return shared_patterns(longest) | with_heads


JOINS = st.sampled_from([And, Or, Minus, Multiset])


def joined(terms: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """Chains of `&`, `|`, `-` and `multiset` over the terms, and chains of such chains."""

    def chains(parts: st.SearchStrategy[Pattern], most: int) -> st.SearchStrategy[Pattern]:
        links = st.lists(st.tuples(JOINS, parts), max_size=most)
        fold = functools.partial(functools.reduce, lambda pattern, link: link[0].of(pattern, link[1]))
        return st.builds(lambda first, links: fold(links, first), parts, links)

    return chains(chains(terms, 2), 2)
