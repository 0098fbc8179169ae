"""The text form: `parse("causal & (window(255) | sink(4))")`. `str(pattern)` is its inverse.

union        = intersection ("|" intersection)*
intersection = difference ("&" difference)*
difference   = atom ("-" atom)*
atom         = "(" union ")" | name [ "(" [argument ("," argument)*] ")" ]
argument     = [name "="] (integer | "[" [value ("," value)*] "]" | word | union)

A name is a pattern of `library.NAMES`, a recipe of `recipes.RECIPES`, `per_head`, `multiset` or a name that `register`
added. A recipe stands for the expression that it returns. A word is the value of a recipe's argument whose default is a
string, `true` or `false`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeVar, cast

from sparsejax.errors import excerpt, shorten, suggest
from sparsejax.patterns.algebra import Multiset, PerHead, per_head
from sparsejax.patterns.base import Pattern, PatternError
from sparsejax.patterns.library import NAMES
from sparsejax.patterns.recipes import RECIPES
from sparsejax.registry import Registry, is_frozen_dataclass

MAX_DEPTH = 100  # nested parentheses: far more than a pattern needs, far fewer than Python's stack holds
MAX_LENGTH = 10_000  # characters
JOINS: dict[str, Callable[..., Pattern]] = {
    PerHead.name: per_head,
    Multiset.name: Multiset.of,
}  # any number of patterns
REGISTRY: Registry[Callable[..., Pattern]] = Registry("pattern", "sparsejax.patterns", NAMES | RECIPES | JOINS)
NAME = re.compile(r"[A-Za-z_]\w*")
TOKEN = re.compile(rf"\s*(?:(?P<name>{NAME.pattern})|(?P<integer>-?\d+)|(?P<sign>[()\[\],=&|-]))")
Definition = TypeVar("Definition", bound=Callable[..., Pattern])


def register(definition: Definition) -> Definition:
    """Adds a pattern or a recipe to the text form.

        @patterns.register
        @dataclasses.dataclass(frozen=True)
        class Older(patterns.Pattern):
            name: ClassVar[str] = "older"
            ...

        @patterns.register
        def older_window(share: int, w: int) -> patterns.Pattern:
            return patterns.parse(f"causal & (older({share}) | window({w - 1}))")

    Args:
      definition: A frozen dataclass derived from `Pattern`, registered as its `name`; or a function that returns a
        pattern, registered as its own name.

    Returns:
      The definition; the one registered first if the same file is run again.

    Raises:
      InputError: The name belongs to another definition, or the class is no frozen dataclass with a `name`.
    """
    name: object = getattr(definition, "__name__", None)
    if isinstance(definition, type):
        name = getattr(definition, "name", None)
        if not issubclass(definition, Pattern):
            raise PatternError("register", f"{definition.__qualname__} does not derive from Pattern")
        if not is_frozen_dataclass(definition):
            raise PatternError(
                "register",
                f"{definition.__qualname__} is not a frozen dataclass; put @dataclasses.dataclass(frozen=True) below"
                " @register",
            )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PatternError("register", f"{definition.__qualname__} has the name {name!r}, which is not an identifier")
    return cast(Definition, REGISTRY.add(name, definition, definition))


def parse(text: str | Pattern, t: int | None = None, s: int | None = None) -> Pattern:
    """The pattern that a text describes.

    Args:
      text: See the grammar above. A pattern is returned unchanged.
      t: Number of queries. If set, a pattern that does not fit it (ids past the end, more random tiles than exist) is
        an error too.
      s: Number of keys; defaults to `t`.

    Raises:
      PatternError: One line with the text, the column (from 1) and, for an unknown name, the nearest known name.
    """
    lengths = None if t is None else (t, t if s is None else s)
    if isinstance(text, Pattern):
        if lengths:
            text.check(*lengths)
        return text
    return _Parser(text, lengths).parse()


class _Token(NamedTuple):
    kind: str | None  # name, integer, sign or end
    text: str
    at: int  # offset in the text


class _Argument(NamedTuple):
    name: str | None
    value: Any
    at: int


class _Parser:
    def __init__(self, text: str, lengths: tuple[int, int] | None):
        self.text, self.lengths = text, lengths
        if len(text) >= MAX_LENGTH:
            raise self.error(f"{len(text):,} characters exceed the limit of {MAX_LENGTH - 1:,}", MAX_LENGTH - 1)
        self.tokens = list(self.split())
        self.index = 0
        self.depth = 0

    def split(self) -> Iterator[_Token]:
        at, end = 0, len(self.text.rstrip())
        while at < end:
            match = TOKEN.match(self.text, at)
            if not match:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise self.error(f"unexpected {self.text[at]!r}", at)
            kind = str(match.lastgroup)
            yield _Token(kind, match[kind], match.start(kind))
            at = match.end()
        yield _Token("end", "", end)

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    @property
    def shown(self) -> str:
        return repr(self.token.text) if self.token.text else "the end"

    def error(self, problem: object, at: int | None = None) -> PatternError:
        at = self.token.at if at is None else at
        return PatternError("pattern", f"{excerpt(self.text, at)}: column {at + 1}: {shorten(str(problem))}")

    def unknown(self, kind: str, word: str, known: Collection[str], at: int) -> PatternError:
        remedy = suggest(word, known, f"{kind.partition(' ')[0]}s{kind[len(kind.partition(' ')[0]) :]}")
        if kind == "pattern" and not remedy.startswith("did"):
            remedy = f"import the module that registers it; {remedy}"
        return self.error(f"unknown {kind} {word!r}; {remedy}", at)

    def take(self, text: str) -> bool:
        matches = self.token.text == text
        self.index += matches
        return matches

    def parse(self) -> Pattern:
        pattern = self.union()
        if self.token.kind != "end":
            raise self.error(f"expected '&', '|', '-' or the end, found {self.shown}")
        return pattern

    def union(self) -> Pattern:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested patterns")
        pattern = self.joined("|", self.intersection)
        self.depth -= 1
        return pattern

    def intersection(self) -> Pattern:
        return self.joined("&", self.difference)

    def difference(self) -> Pattern:
        return self.joined("-", self.atom)

    def joined(self, sign: str, term: Callable[[], Pattern]) -> Pattern:
        at = self.token.at
        terms = [term()]
        while self.take(sign):
            terms.append(term())
        return terms[0] if len(terms) == 1 else self.call(Pattern.operators[sign], at, *terms)

    def call(self, build: Callable[..., Pattern], at: int, *values: Any, **named: Any) -> Pattern:
        """Builds a pattern and checks it against the lengths; an error names the column of the pattern."""
        try:
            pattern = build(*values, **named)
            if self.lengths:
                pattern.check(*self.lengths)
        except PatternError as error:
            raise self.error(error, at) from None
        return pattern

    def atom(self) -> Pattern:
        kind, word, at = self.token
        if self.take("("):
            pattern = self.union()
            if not self.take(")"):
                raise self.error(f"expected ')' for the parenthesis at column {at + 1}")
            return pattern
        if kind != "name":
            raise self.error(f"expected a pattern, found {self.shown}")
        self.index += 1
        if word in JOINS:
            arguments = self.arguments({})
            for argument in arguments:
                if argument.name or not isinstance(argument.value, Pattern):
                    raise self.error(f"{word} takes patterns only", argument.at)
            return self.call(JOINS[word], at, *(argument.value for argument in arguments))
        build = REGISTRY.get(word)
        if build is None:
            raise self.unknown("pattern", word, list(REGISTRY), at)
        parameters = inspect.signature(build).parameters
        return self.call(build, at, **self.bind(word, parameters, self.arguments(parameters), at))

    def arguments(self, parameters: Any) -> list[_Argument]:
        """The arguments in parentheses, if there are any."""
        opened = self.token.at
        arguments: list[_Argument] = []
        if not self.take("("):
            return arguments
        while not self.take(")"):
            if arguments and not self.take(","):
                raise self.error(f"expected ',' or ')' for the parenthesis at column {opened + 1}")
            _, word, at = self.token
            named = self.token.kind == "name" and self.tokens[self.index + 1].text == "="
            self.index += 2 * named
            name = word if named else next(iter(list(parameters)[len(arguments) :]), None)
            default = parameters[name].default if name in parameters else None
            arguments.append(_Argument(word if named else None, self.value(default), at))
        return arguments

    def value(self, default: object = None) -> Any:
        """An integer, a list, a pattern, or a word where the default value is a word."""
        kind, word, _ = self.token
        if isinstance(default, bool):
            if word not in ("true", "false"):
                raise self.error(f"expected true or false, found {self.shown}")
            self.index += 1
            return word == "true"
        if kind == "integer":
            if len(word) > 20:
                raise self.error(f"a number of {len(word)} digits")
            self.index += 1
            return int(word)
        if self.take("["):
            values: list[Any] = []
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.error(f"more than {MAX_DEPTH} nested patterns")
            while not self.take("]"):
                if values and not self.take(","):
                    raise self.error("expected ',' or ']'")
                values.append(self.value())
            self.depth -= 1
            return tuple(values)
        if kind == "name" and isinstance(default, str):
            self.index += 1
            return word
        return self.union()

    def bind(self, word: str, parameters: Any, arguments: list[_Argument], at: int) -> dict[str, Any]:
        """The arguments by the name of their parameter."""
        values: dict[str, Any] = {}
        for index, (name, value, where) in enumerate(arguments):
            if name is None and index >= len(parameters):
                raise self.error(
                    f"{word} takes at most {len(parameters)} argument{'s' * (len(parameters) != 1)}", where
                )
            name = list(parameters)[index] if name is None else name
            if name not in parameters:
                raise self.unknown(f"argument of {word}", name, list(parameters), where)
            if name in values:
                raise self.error(f"{word} got {name} twice", where)
            values[name] = value
        missing = [name for name, p in parameters.items() if name not in values and p.default is p.empty]
        if missing:
            raise self.error(f"{word} requires {' and '.join(missing)}", at)
        return values
