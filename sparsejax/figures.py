"""Matplotlib figures as files that depend on the figure alone: no user settings, no date, no random ids."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.errors import InputError
from sparsejax.svg import clean
from sparsejax.workdir import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 300


def write_figure(build: Callable[[], Figure], path: Path) -> None:
    """Writes the figure that `build` returns as a .png or .svg file, in one step, see `draw`.

    Raises:
      InputError: Matplotlib is not installed.
    """
    replace_file(path, draw(build, path.suffix[1:], path.name))


def draw(build: Callable[[], Figure], form: str, name: str = "figure") -> bytes:
    """Returns the figure that `build` returns as "svg" or "png", drawn in Matplotlib's default style.

    Raises:
      InputError: Matplotlib is not installed; names the figure by `name`.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise InputError(name, "figures require matplotlib; pip install 'sparsejax[plot]'") from None
    with style.context(["default", {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8}]):
        return render(build(), form, dpi=DPI, bbox_inches="tight")


def render(figure: Figure, form: str, **options: Any) -> bytes:
    """The figure as "svg" or "png"; equal figures give equal bytes. `options` are those of `savefig`."""
    from matplotlib import rc_context

    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[form]
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "sparsejax", "text.parse_math": False}):
        figure.savefig(file, format=form, metadata=metadata, **options)
    return clean(file.getvalue().decode()).encode() if form == "svg" else file.getvalue()
