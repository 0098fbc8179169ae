"""reference/config.md: the keys of a configuration, from the dataclasses of the schema and their comments."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import operator
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from generators import markdown
from sparsejax.config import EFFECTS, schema
from sparsejax.config.build import UNIONS
from sparsejax.overrides import Overrides
from sparsejax.patterns import Pattern

NAMES = {int: "integer", float: "number", bool: "boolean", str: "text", Overrides: "overrides"}
INTRODUCTION = """\
A config is a file that defines `get_config()`, which returns a `ConfigDict` with the sections below. On the command
line `--config.KEY=VALUE` sets a key, such as `--config.model.width=256`. NAME stands for a name that the config
chooses. A key without a default is required. The text form of a pattern is described in [Patterns](patterns.md).

A run can [resume](../howto/interrupt_and_resume.md#change-the-configuration) with another value of a key that is marked
*resume*; the mark says what that changes. Of a marked section, every key is. With any other change it is refused."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a configuration: its path, and its dataclass."""

    path: str
    schema: type
    kind: str = ""

    @property
    def heading(self) -> str:
        """Heading on the page."""
        return f"{self.path}: {self.kind}" if self.kind else self.path


def generate() -> str:
    """The page."""
    sections = _list_sections()
    links: dict[type, str] = {}
    for section in sections:
        links.setdefault(section.schema, markdown.anchor(section.heading))
    hints = typing.get_type_hints(schema.Config)
    contents = [
        f"- [`{field.name}`](#{field.name}): {_first_sentence(hints[field.name])} {_resume(field)}".rstrip()
        for field in dataclasses.fields(schema.Config)
    ]
    parts = [part for section in sections for part in _section(section, links)]
    return markdown.page("Config keys", INTRODUCTION, "\n".join(contents), *parts)


def _list_sections() -> list[Section]:
    """The sections, breadth first below each section of a run, each dataclass once."""
    sections = []
    seen: set[type] = set()
    for field in dataclasses.fields(schema.Config):
        level = [Section(field.name, typing.get_type_hints(schema.Config)[field.name])]
        while level:
            sections += level
            candidates = [item for section in level for item in _subsections(section)]
            level = []
            for section in candidates:
                if section.schema not in seen:
                    seen.add(section.schema)
                    level.append(section)
    return sections


def _subsections(section: Section) -> Iterator[Section]:
    hints = typing.get_type_hints(section.schema)
    for field in dataclasses.fields(section.schema):
        key, annotation = f"{section.path}.{field.name}", _split_none(hints[field.name])[0]
        if typing.get_origin(annotation) is dict and annotation != Overrides:
            key, annotation = f"{key}.NAME", typing.get_args(annotation)[1]
        if typing.get_origin(annotation) is tuple:
            key, annotation = f"{key}[i]", typing.get_args(annotation)[0]
        if annotation in UNIONS:
            yield from (Section(key, member, kind) for kind, member in _kinds(annotation).items())
        elif dataclasses.is_dataclass(annotation):
            yield Section(key, typing.cast(type, annotation))


def _kinds(union: Any) -> dict[str, type]:
    """The config classes of a union; the kinds that share a class are one entry."""
    kinds: dict[type, list[str]] = {}
    for kind in _builtin(UNIONS[union]):
        member = UNIONS[union][kind]
        kinds.setdefault(member[0] if isinstance(member, tuple) else member, []).append(kind)
    return {", ".join(names): member for member, names in kinds.items()}


def _builtin(kinds: Mapping[str, Any]) -> list[str]:
    """The kinds of the package, without those of other installed packages."""
    return list(getattr(kinds, "members", kinds))


def _split_none(annotation: Any) -> tuple[Any, bool]:
    """An annotation without None and Pattern, whose text a configuration holds, and whether it has None."""
    if not isinstance(annotation, types.UnionType) or annotation in UNIONS:
        return annotation, False
    members = [member for member in typing.get_args(annotation) if member not in (types.NoneType, Pattern)]
    return functools.reduce(operator.or_, members), types.NoneType in typing.get_args(annotation)


def _section(section: Section, links: dict[type, str]) -> Iterator[str]:
    level = 2 + section.path.replace(".NAME", "").count(".")
    yield f"{'#' * min(4, level)} {section.heading}"
    yield _describe(section.schema)
    comments, hints = read_comments(section.schema), typing.get_type_hints(section.schema)
    ranges, errors = read_checks(section.schema)
    rows = (
        [("`kind`", f"`{section.kind}`", "", "Selects this section")] if section.path.endswith(("mixer", "mlp")) else []
    )
    rows = [] if not section.kind or "kind" in hints else rows
    for field in dataclasses.fields(section.schema):
        annotation = _split_none(hints[field.name])[0]
        described = dataclasses.is_dataclass(annotation) and _first_sentence(annotation).rstrip(".")
        meaning = markdown.sentence(comments.get(field.name) or described or "")
        meaning = ". ".join(filter(None, (meaning, _resume(field))))
        kind = _type(hints[field.name], ranges.get(field.name, {}), links)
        rows.append((f"`{field.name}`", kind, _default(field), meaning))
    yield markdown.table(("key", "type", "default", "meaning"), rows) if rows else "It has no keys."
    if errors:
        yield "Errors:\n\n" + "\n".join(f"- `{error}`" for error in errors)


def _type(annotation: Any, checks: dict[str, str], links: dict[type, str]) -> str:
    annotation, optional = _split_none(annotation)
    name = checks.get("choice") or checks.get("even", "") + _name(annotation, links) + checks.get("range", "")
    return name + " or none" * optional


def _name(annotation: Any, links: dict[type, str]) -> str:
    if annotation in UNIONS:
        kinds = [f"[{kind}](#{links[member]})" for kind, member in _kinds(annotation).items()]
        return f"section, by kind: {', '.join(kinds)}"
    if annotation == Overrides:
        return "section of overrides"
    if typing.get_origin(annotation) is dict:
        return f"{_name(typing.get_args(annotation)[1], links)} per name"
    if typing.get_origin(annotation) is tuple:
        return f"list ({_name(typing.get_args(annotation)[0], links)})"
    if dataclasses.is_dataclass(annotation):
        return f"[section](#{links[typing.cast(type, annotation)]})"
    return NAMES[annotation]


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return ""
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, dict) or dataclasses.is_dataclass(default):
        return "its defaults" if default else "no sections"
    if default is None:
        return "none"
    return f"`{list(default) if isinstance(default, tuple) else default!r}`"


def _resume(field: dataclasses.Field) -> str:
    """What the change of a key at a resume does; empty for a key that cannot change."""
    return f"*Resume: {EFFECTS[field.metadata['resume']]}.*" if "resume" in field.metadata else ""


def _describe(section: type) -> str:
    """The docstring without its list of attributes, and the tables of keys that it mentions."""
    text = re.split(r"\n\n(?=(?:Attributes|Args):)", inspect.getdoc(section) or "")[0]
    scope = vars(inspect.getmodule(section))
    keys = [scope[name] for name in re.findall(r"`([A-Z_]+)`", text) if isinstance(scope.get(name), tuple)]
    return "\n\n".join([text, *("Keys: " + ", ".join(f"`{key}`" for key in group) + "." for group in keys)])


def _first_sentence(section: type) -> str:
    return (inspect.getdoc(section) or "").partition("\n")[0]


# Reading source.


def read_comments(section: type) -> dict[str, str]:
    """The comments of the fields: those above a field, and the one at the end of its line. Inherited ones are included.

    The attributes that the docstring of a base describes need no comment.
    """
    comments: dict[str, str] = {}
    for base in reversed(section.__mro__):
        attributes = (inspect.getdoc(base) or "").partition("Attributes:\n")[2]
        comments |= dict(re.findall(r"^  (\w+): (.*?)\.?$", attributes, re.MULTILINE))
        if dataclasses.is_dataclass(base):
            comments |= _read_comments(base)
    return comments


def _read_comments(section: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            numbers = range(first, (node.end_lineno or node.lineno) + 1)
            text = " ".join(comments[number] for number in numbers if number in comments)
            texts[node.target.id] = re.sub(r"noqa: \w+ ?\(?|^the paper's name\)$", "", text)
    return {name: text for name, text in texts.items() if text}


def read_checks(section: type) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The checks of `__post_init__`: ranges and choices by key, and the messages of other errors."""
    checks = _Checks()
    for base in section.__mro__:
        if "__post_init__" in vars(base):
            checks.scope = vars(inspect.getmodule(base))
            checks.visit(ast.parse(textwrap.dedent(inspect.getsource(base.__post_init__))))
    return checks.ranges, checks.errors


class _Checks(ast.NodeVisitor):
    """Collects checks."""

    def __init__(self) -> None:
        self.ranges: dict[str, dict[str, str]] = {}
        self.errors: list[str] = []
        self.scope: dict[str, Any] = {}
        self.names: list[str] = []  # of the keys over which a loop runs

    def visit_For(self, node: ast.For) -> None:
        if isinstance(node.iter, ast.Tuple):
            self.names = [str(item.value) for item in node.iter.elts if isinstance(item, ast.Constant)]
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        texts = [str(argument.value) if isinstance(argument, ast.Constant) else "" for argument in node.args]
        if function == "require_at_least":
            for name in texts[2:]:
                self._add(name, "range", f" ≥ {texts[1]}")
        elif function == "require":
            for keyword in node.keywords:
                least = ast.unparse(keyword.value).replace("self.", "").replace(" * ", " · ")
                self._add(str(keyword.arg), "range", f" ≥ {least}")
        elif function == "require_even":
            self._add(texts[1], "even", "even ")
        elif function == "require_choice":
            choices = eval(ast.unparse(node.args[2]), dict(self.scope))
            self._add(texts[1], "choice", ", ".join(f"`{choice}`" for choice in choices))
        elif function == "InputError":
            key, problem = node.args
            names = self.names if isinstance(key, ast.Name) else [_template(key)]
            self.errors += [f"{name}: {_template(problem)}" for name in names]
        self.generic_visit(node)

    def _add(self, key: str, check: str, text: str) -> None:
        self.ranges.setdefault(key, {})[check] = text


def _template(node: ast.AST) -> str:
    """A message with `...` for values, and a key with NAME for names."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr):
        return "..."
    text = "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return re.sub(r"(?<=\w)\.\.\.\.(?=\.\w|$)|(?<=\w)\.\.\.\.(?!\.)", ".NAME", text)
