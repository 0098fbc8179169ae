"""Hypothesis strategies for every pattern that the library and its algebra can express."""

import functools

from hypothesis import strategies as st

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


def numbers(least: int, longest: int) -> st.SearchStrategy[int]:
    """Up to `longest`, often much less: patterns that show everything meet few tiles halfway."""
    return st.integers(least, max(least, longest // 8)) | st.integers(least, longest)


def token_ids(longest: int) -> st.SearchStrategy[int | tuple[int, ...]]:
    return (
        numbers(0, longest) | st.integers(-longest, 0) | st.lists(st.integers(-longest, longest), max_size=4).map(tuple)
    )


def tile_lists() -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Up to five rows of key tiles, each below the number of rows."""
    return st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, n - 1), max_size=n).map(tuple), min_size=n, max_size=n).map(tuple)
    )


# Each named pattern that is not made of others. One that is missing here fails test_masks.py.
LIBRARY = {
    "causal": lambda longest: st.just(Causal()),
    "window": lambda longest: st.builds(Window, numbers(0, longest), st.just(0) | numbers(0, longest)),
    "dilated": lambda longest: st.builds(
        Dilated, numbers(0, longest), st.just(0) | numbers(0, longest), stride=numbers(1, longest)
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
    """Expressions that are the same for all heads."""
    named = st.one_of([strategy(longest) for strategy in LIBRARY.values()])
    return joined(named | st.builds(Shift, named, st.integers(-longest, longest)))


def patterns_with_heads(heads: int, longest: int = 40) -> st.SearchStrategy[Pattern]:
    """Expressions in which some term, at any depth, differs between the heads."""
    each = st.lists(shared_patterns(longest), min_size=heads, max_size=heads)
    distinguishing = each.map(lambda patterns: per_head(*patterns))
    rest = distinguishing | shared_patterns(longest)
    return distinguishing | st.builds(lambda a, b, join: join.of(a, b), distinguishing, rest, JOINS)


def patterns(longest: int = 40) -> st.SearchStrategy[Pattern]:
    """Every expression of the algebra."""
    with_heads = st.integers(1, 3).flatmap(lambda heads: patterns_with_heads(heads, longest))
    return shared_patterns(longest) | with_heads


JOINS = st.sampled_from([And, Or, Minus, Multiset])


def joined(terms: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """Terms in chains of `&`, `|`, `-` and `multiset` from the left, and chains of such chains."""

    def chains(parts: st.SearchStrategy[Pattern], most: int) -> st.SearchStrategy[Pattern]:
        links = st.lists(st.tuples(JOINS, parts), max_size=most)
        fold = functools.partial(functools.reduce, lambda pattern, link: link[0].of(pattern, link[1]))
        return st.builds(lambda first, links: fold(links, first), parts, links)

    return chains(chains(terms, 2), 2)
