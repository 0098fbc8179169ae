"""Elements of generated pages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

GENERATED = "<!-- Written by docs/generate.py. -->"


def page(title: str, *parts: str) -> str:
    """A page of paragraphs, tables and headings. Papers become links."""
    text = "\n\n".join([f"# {title}", GENERATED, *(part for part in parts if part)]) + "\n"
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})(?!\])", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table; the columns in `right` are aligned to the right."""
    lines = [heading, ["---:" if name in right else "---" for name in heading], *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: str) -> str:
    """A cell whose bars do not end it. GitHub and the site disagree about bars in backticks, but not about entities."""
    code = r"`([^`]*\|[^`]*)`"
    cell = re.sub(code, lambda match: f"<code>{html.escape(match[1]).replace('|', '&#124;')}</code>", cell)
    return cell.replace("|", r"\|")


def anchor(heading: str) -> str:
    """The anchor that the site and GitHub give a heading of letters, digits, spaces, hyphens and underscores."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def sentence(text: str) -> str:
    """A comment as a table cell, which starts with a capital letter."""
    return text[:1].upper() + text[1:]
