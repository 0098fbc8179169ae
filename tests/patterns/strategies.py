"""Hypothesis strategies for every pattern that the library and its algebra can express."""

import functools

from hypothesis import strategies as st

from sparsejax.patterns import And, Causal, Chunk, Full, Globals, Or, Pattern, Sink, Window, per_head


def numbers(least: int, longest: int) -> st.SearchStrategy[int]:
    """Up to `longest`, often much less: patterns that show everything meet few tiles halfway."""
    return st.integers(least, max(least, longest // 8)) | st.integers(least, longest)


# Each named pattern. One that is missing here fails test_masks.py.
LIBRARY = {
    "causal": lambda longest: st.just(Causal()),
    "window": lambda longest: st.builds(Window, numbers(0, longest), st.just(0) | numbers(0, longest)),
    "chunk": lambda longest: st.builds(Chunk, numbers(1, longest)),
    "sink": lambda longest: st.builds(Sink, numbers(1, longest)),
    "globals": lambda longest: st.builds(
        Globals, numbers(0, longest) | st.lists(st.integers(-longest, longest), max_size=4).map(tuple)
    ),
    "full": lambda longest: st.just(Full()),
}


def shared_patterns(longest: int = 40) -> st.SearchStrategy[Pattern]:
    """Expressions that are the same for all heads."""
    return joined(st.one_of([strategy(longest) for strategy in LIBRARY.values()]))


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


JOINS = st.sampled_from([And, Or])


def joined(terms: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """Terms in chains of `&` and `|` from the left, and chains of such chains."""

    def chains(parts: st.SearchStrategy[Pattern], most: int) -> st.SearchStrategy[Pattern]:
        links = st.lists(st.tuples(JOINS, parts), max_size=most)
        fold = functools.partial(functools.reduce, lambda pattern, link: link[0].of(pattern, link[1]))
        return st.builds(lambda first, links: fold(links, first), parts, links)

    return chains(chains(terms, 2), 2)
