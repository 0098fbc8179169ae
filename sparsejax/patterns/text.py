"""The text form: `parse("causal & (window(255) | sink(4))")`; `str(pattern)` is its inverse.

union        = intersection ("|" intersection)*
intersection = difference ("&" difference)*
difference   = atom ("-" atom)*
atom         = "(" union ")" | name [ "(" [argument ("," argument)*] ")" ]
argument     = [name "="] (integer | "[" integer ("," integer)* "]" | union)
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from sparsejax.patterns.library import NAMES
from sparsejax.patterns.base import And, Minus, Multiset, Or, Pattern, PatternError, PerHead, per_head

DEEPEST = 100  # parentheses inside parentheses; far more than any pattern needs, far fewer than Python's stack holds
LONGEST = 10_000  # characters
SHOWN = 120  # characters of a text in an error
JOINED = {PerHead.name: per_head, Multiset.name: Multiset.of}  # words that take any number of patterns
TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<integer>-?\d+)|(?P<sign>[()\[\],=&|-]))")


def parse(text: str | Pattern, t: int | None = None, s: int | None = None) -> Pattern:
    """The pattern that a text describes.

    Args:
      text: see above. A pattern is taken as it is, however long its text would be.
      t: number of queries it is meant for. If given, what does not fit into it (ids past the end, more random
        tiles than there are) is an error too.
      s: number of keys, `t` if not given.

    Raises:
      PatternError: one line with the text, the column (from 1) and, for an unknown word, the nearest known one.
    """
    if isinstance(text, Pattern):
        if t is not None:
            text.check(t, t if s is None else s)
        return text
    return _Parser(text, None if t is None else (t, t if s is None else s)).parse()


class _Parser:
    def __init__(self, text: str, lengths: tuple[int, int] | None):
        self.text, self.lengths = text, lengths
        if len(text) >= LONGEST:
            raise self.error(f"{len(text):,} characters; fewer than {LONGEST:,} are read", LONGEST - 1)
        self.tokens = list(self._split())
        self.next = 0
        self.depth = 0

    def _split(self):
        at, end = 0, len(self.text.rstrip())
        while at < end:
            match = TOKEN.match(self.text, at)
            if not match:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise self.error(f"unexpected {self.text[at]!r}", at)
            yield match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)
            at = match.end()
        yield "end", "", end

    def error(self, problem: str, at: int | None = None) -> PatternError:
        at = self.tokens[self.next][2] if at is None else at
        shown, start = self.text, max(0, at - SHOWN // 2)
        if len(shown) > SHOWN:
            shown = "..." * (start > 0) + shown[start : start + SHOWN] + "..." * (start + SHOWN < len(shown))
        return PatternError(f"pattern {shown!r}: column {at + 1}: {problem}")

    def unknown(self, kind: str, word: str, known: list[str], at: int) -> PatternError:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0)
        return self.error(f"unknown {kind} {word!r}, did you mean {near[0]!r}?", at)

    def take(self, value: str) -> bool:
        found = self.tokens[self.next][1] == value
        self.next += found
        return found

    def parse(self) -> Pattern:
        pattern = self.union()
        if self.tokens[self.next][0] != "end":
            raise self.error(f"expected '&', '|', '-' or the end, found {self.tokens[self.next][1]!r}")
        return pattern

    def union(self) -> Pattern:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} patterns inside one another")
        pattern = self.joined("|", self.intersection, Or)
        self.depth -= 1
        return pattern

    def intersection(self) -> Pattern:
        return self.joined("&", self.difference, And)

    def difference(self) -> Pattern:
        return self.joined("-", self.atom, Minus)

    def joined(self, sign: str, part: Any, combination: type[And] | type[Or] | type[Minus]) -> Pattern:
        at = self.tokens[self.next][2]
        terms = [part()]
        while self.take(sign):
            terms.append(part())
        try:
            return terms[0] if len(terms) == 1 else combination.of(*terms)
        except PatternError as error:
            raise self.error(str(error), at) from None

    def atom(self) -> Pattern:
        kind, word, at = self.tokens[self.next]
        if self.take("("):
            pattern = self.union()
            if not self.take(")"):
                raise self.error(f"expected ')' for the parenthesis opened at column {at + 1}")
            return pattern
        if kind != "name":
            raise self.error(f"expected a pattern, found {word or 'the end'!r}")
        if word not in NAMES and word not in JOINED:
            raise self.unknown("pattern", word, [*NAMES, *JOINED], at)
        self.next += 1
        arguments = self.arguments() if self.tokens[self.next][1] == "(" else []
        try:
            pattern = self.build(word, arguments, at)
            if self.lengths:
                pattern.check(*self.lengths)
            return pattern
        except PatternError as error:
            raise error if str(error).startswith("pattern ") else self.error(str(error), at) from None

    def arguments(self) -> list[tuple[str | None, Any, int]]:
        opened = self.tokens[self.next][2]
        self.next += 1
        found = []
        while not self.take(")"):
            if found and not self.take(","):
                raise self.error(f"expected ',' or ')' for the parenthesis opened at column {opened + 1}")
            _, word, at = self.tokens[self.next]
            named = self.tokens[self.next][0] == "name" and self.tokens[self.next + 1][1] == "="
            self.next += 2 * named
            found.append((word if named else None, self.value(), at))
        return found

    def value(self) -> Any:
        kind, word, _ = self.tokens[self.next]
        if kind == "integer":
            if len(word) > 20:
                raise self.error(f"a number of {len(word)} digits")
            self.next += 1
            return int(word)
        if self.take("["):
            values = []
            while not self.take("]"):
                if values and not self.take(","):
                    raise self.error("expected ',' or ']'")
                values.append(self.value())
            return tuple(values)
        return self.union()

    def build(self, word: str, arguments: list[tuple[str | None, Any, int]], at: int) -> Pattern:
        if word in JOINED:
            for name, value, where in arguments:
                if name or not isinstance(value, Pattern):
                    raise self.error(f"{word} takes patterns only", where)
            return JOINED[word](*(value for _, value, _ in arguments))
        fields = {field.name: field for field in dataclasses.fields(NAMES[word])}
        values: dict[str, Any] = {}
        for index, (name, value, where) in enumerate(arguments):
            if name is None and index >= len(fields):
                raise self.error(f"{word} takes at most {len(fields)} arguments", where)
            name = list(fields)[index] if name is None else name
            if name not in fields:
                raise self.unknown(f"argument of {word}", name, list(fields) or [word], where)
            if name in values:
                raise self.error(f"{word} got {name} twice", where)
            values[name] = value
        missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
        if missing:
            raise self.error(f"{word} needs {' and '.join(missing)}", at)
        return NAMES[word](**values)
