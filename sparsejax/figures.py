"""Matplotlib figures as files that depend on the figure alone: no user settings, no date, no random ids."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.errors import InputError
from sparsejax.svg import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 300


def write_figure(build: Callable[[], Figure], path: Path) -> None:
    """Writes the figure that `build` returns as a .png or .svg file, drawn in Matplotlib's default style.

    Raises:
      InputError: Matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise InputError(path.name, "figures require matplotlib; pip install 'sparsejax[plot]'") from None
    with style.context(["default", {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8}]):
        path.write_bytes(render(build(), path.suffix[1:], dpi=DPI, bbox_inches="tight"))


def render(figure: Figure, form: str, **options: Any) -> bytes:
    """The figure as "svg" or "png"; equal figures give equal bytes. `options` are those of `savefig`."""
    from matplotlib import rc_context

    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[form]
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "sparsejax", "text.parse_math": False}):
        figure.savefig(file, format=form, metadata=metadata, **options)
    return clean(file.getvalue().decode()).encode() if form == "svg" else file.getvalue()
