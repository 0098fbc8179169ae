"""Generated expressions and damaged texts of patterns: every view agrees with the mask, every error names a column."""

import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from sparsejax import patterns
from sparsejax.errors import InputError
from sparsejax.patterns import PatternError
from tests.fuzz.worker import read_cases, run_cases, run_nightly

FUZZER = "tests.fuzz.test_patterns:check"
NAMES = sorted(patterns.text.REGISTRY)
LARGE = (2**30, 2**30 + 1, 2**29, 2**31 - 1, 2**31, 2**32, 2**63, 10**19, -(2**30), -(2**31), 100_000, 4096)
CHARACTERS = "()[],=&|- \t\n0123456789azAZ_é٣\u200b'\"\\\0#.:;"
DAMAGED = 0.4  # share of damaged texts among the cases


def test_stored_cases():
    failures = run_cases(FUZZER, read_cases("patterns"))
    assert not failures, failures


@pytest.mark.nightly
def test_generated_and_damaged_texts():
    run_nightly("patterns", FUZZER, generate, 20_000)


# Cases.


def generate(rng: random.Random) -> dict:
    """A text of the grammar, two times in five damaged."""
    text = write_union(rng, 3)
    damaged = rng.random() < DAMAGED
    for _ in range(rng.randint(1, 4) if damaged else 0):
        text = damage(rng, text)
    return {"text": text, "length": rng.choice([0, 1, 7, 33, 48]), "keys": rng.choice([0, 1, 20, 33, 48])}


def write_union(rng: random.Random, depth: int) -> str:
    """An expression of up to three terms."""
    signs = rng.choices(["|", "&", "-"], k=rng.choice([0, 0, 1, 2]))
    terms = [write_atom(rng, depth) for _ in range(len(signs) + 1)]
    return "".join(f"{term} {sign} " for term, sign in zip(terms, signs, strict=False)) + terms[-1]


def write_atom(rng: random.Random, depth: int) -> str:
    """A pattern or an expression in parentheses."""
    if depth and rng.random() < 0.25:
        return f"({write_union(rng, depth - 1)})"
    name = rng.choice(NAMES)
    if name in ("multiset", "per_head"):
        return f"{name}({', '.join(write_union(rng, max(0, depth - 1)) for _ in range(rng.randint(1, 3)))})"
    if name == "shift":
        return f"shift({write_union(rng, max(0, depth - 1))}, {number(rng, -40)})"
    return write_call(rng, name)


def write_call(rng: random.Random, name: str) -> str:
    """A call of a pattern or a recipe with plausible arguments, some of them large."""
    few, n = rng.randint(1, 3), lambda least=0: str(number(rng, least))
    tile = rng.choice([1, 2, 3, 4, 8])
    if name in ("globals", "global_keys", "global_queries"):
        ids = ", ".join(n(-40) for _ in range(rng.randint(0, 4)))
        return f"{name}({rng.choice([n(-40), f'[{ids}]'])})"
    if name == "tiles":
        rows = [[rng.randrange(few + 1) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 5))]
        return f"tiles({rows}{rng.choice(['', f', tile={tile}', f', tile={n(1)}'])})"
    if name == "random":
        options = {"reach": n(), "apart": n(), "ends": n(), "layer": "1", "head": "2"}
        chosen = "".join(f", {key}={value}" for key, value in options.items() if rng.random() < 0.3)
        return f"random({rng.choice([few, n(1)])}, tile={rng.choice([tile, n(1)])}, seed={n()}{chosen})"
    if name == "bigbird_random":
        return f"bigbird_random({few}, tile={tile}, seed={n()}, head={rng.randrange(2)}, among={n(2)}, longest={n(1)})"
    if name == "bigbird":
        plan = rng.choice(["uniform", "released", "evaluation"])
        heads = rng.choice(["", f", heads={rng.choice([few, rng.choice(LARGE)])}"])
        return f"bigbird({tile}, {few}, seed={n()}{heads}, plan={plan}, multiset={rng.choice(['true', 'false'])})"
    if name == "longformer":
        return f"longformer({n()}, {n()}, [{n()}], strides=[{n(1)}, 1])"
    arguments = {
        "dilated": (n(), n(), f"stride={n(1)}"),
        "window": (n(), n()),
        "fixed": (str(few + tile), str(few)),
        "streaming_llm": (n(1), n(1)),
        "sparse_transformer_strided": (n(1), f"heads={rng.choice([few, rng.choice(LARGE)])}"),
        "sparse_transformer_fixed": (str(few + tile), str(few)),
        "mistral": (n(1),),
        "llama4_local": (n(1),),
        "gemma_local": (n(1),),
    }
    if name in ("full", "causal", "gemma_global"):
        return name
    return f"{name}({', '.join(arguments.get(name, (n(1),)))})"


def number(rng: random.Random, least: int) -> int:
    """A small number, one time in twenty a large one."""
    return rng.choice(LARGE) if rng.random() < 0.05 else rng.randint(least, 40)


def damage(rng: random.Random, text: str) -> str:
    """A text with one fault."""
    start, stop = sorted(rng.randint(0, len(text)) for _ in range(2))
    fault = rng.randrange(8)
    if fault == 0:
        return text[:start] + text[stop:]
    if fault == 1:
        return text[:stop] + text[start:]
    if fault == 2:
        return text[:start] + rng.choice(CHARACTERS) + text[start:]
    if fault == 3:
        return text[:start] + rng.choice(NAMES) + text[start:]
    if fault == 4:
        return re.sub(r"-?\d+", lambda match: str(rng.choice(LARGE)) if rng.random() < 0.5 else match[0], text)
    if fault == 5:
        return text[:start] + rng.choice(["(" * 200, "[" * 200, "9" * 30, "causal|" * 50, "()", ",,"]) + text[start:]
    if fault == 6:
        return text[: start + 1].swapcase() + text[start + 1 :]
    return re.sub(r"\w+=", "", text, count=1)


# The check.


def check(case: dict) -> None:
    """Raises an exception if a text fails: a wrong view, or an error that is not one line with a column."""
    text = case["text"]
    try:
        patterns.parse(text, 4096)
    except PatternError as error:
        check_error(error)
    try:
        pattern = patterns.parse(text)
    except PatternError as error:
        check_error(error)
        return
    assert patterns.parse(str(pattern)) == pattern, str(pattern)
    assert pattern.digest == patterns.parse(str(pattern)).digest
    t, s = case["length"], case["keys"]
    misfit = catch(lambda: pattern.check(t, s))
    error = catch(lambda: check_views(pattern, t, s))
    assert error is None or misfit is not None, f"fits {t} queries and {s} keys, but: {error}"


def catch(call: Callable[[], None]) -> str | None:
    """The message of the error of a call, which must be one line; None without an error."""
    try:
        call()
    except InputError as error:
        (line,) = str(error).splitlines()
        return line
    return None


def check_error(error: PatternError) -> None:
    """Checks that an error is one line that names a column."""
    assert re.search(r"column \d+: ", str(error)), str(error)
    assert len(str(error)) < 1000
    assert len(str(error).splitlines()) == 1


def check_views(pattern: patterns.Pattern, t: int, s: int) -> None:
    """Compares the layout, pairs, edges, last queries and lookahead with the mask, and runs the linter."""
    mask = pattern.dense(t, s)
    mask = mask if mask.ndim == 3 else mask[None]
    heads = [mask[min(i, len(mask) - 1)] for i in range(len(pattern.by_head()))]
    assert pattern.pairs(t, s) == sum(int(head.sum()) for head in heads)
    for tile in ((8, 8), (5, 16)):
        for layout, head in zip(pattern.layouts(t, s, tile), heads, strict=True):
            padded = np.zeros((-(-t // tile[0]) * tile[0], -(-s // tile[1]) * tile[1]), bool)
            area = np.zeros_like(padded)
            padded[:t, :s], area[:t, :s] = head, True
            split = (len(padded) // tile[0], tile[0], -1, tile[1])
            if 0 in padded.shape:
                continue
            counts, areas = padded.reshape(split).sum(axis=(1, 3)), area.reshape(split).sum(axis=(1, 3))
            np.testing.assert_array_equal(layout.dense(), (counts > 0) + (counts == areas).astype(int))
    q, k = np.nonzero(mask.any(axis=0))
    if len(q):
        assert (q <= pattern.last_query(np.arange(s))[k]).all()
        assert (k - q).max() <= pattern.lookahead()
    if t == s:
        patterns.lint_schedule([("a", pattern), ("b", patterns.Causal())], t)
