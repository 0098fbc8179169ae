"""Analysis: the measured behaviour of a trained model beside what its schedule predicts.

    model = sparsejax.load("runs/quickstart")
    analysis.analyze(model, "erf", "figures/erf")

A kind measures unit by unit and records each, so that a stopped analysis resumes. It writes tables as csv, figures as
PNG and SVG, into which the receptive field of the schedule is drawn, and one HTML page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsejax.analysis.attention import Attention
from sparsejax.analysis.erf import Erf
from sparsejax.analysis.kind import Analysis, Findings, Picture, open_analysis, run
from sparsejax.analysis.position import Position
from sparsejax.analysis.retrieval import Needle, Retrieval
from sparsejax.analysis.ruler import Ruler
from sparsejax.loaded import LoadedModel

KINDS: dict[str, type[Analysis]] = {kind.kind: kind for kind in (Position, Erf, Attention, Needle, Retrieval, Ruler)}

__all__ = ["KINDS", "Analysis", "Findings", "Picture", "analyze"]


def analyze(
    model: LoadedModel,
    kind: str,
    out: str | Path,
    data: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda unit, units: None,
    **options: Any,
) -> Findings:
    """Analyzes a model and writes tables, figures and a page; the same call resumes a stopped analysis.

    Args:
      model: The model, from `sparsejax.load`.
      kind: A name in `KINDS`.
      out: Folder of the files, which is created.
      data: Keys of the section `data` that differ from those of the run, as in `LoadedModel.evaluate`.
      progress: Called with the index of a unit before it is measured, and with their number.
      **options: Options of the kind, `KINDS[kind].Options`.

    Raises:
      InputError: The kind, an option or the folder is invalid, or does not fit the model or the data.
    """
    return run(open_analysis(KINDS, model, kind, data, **options), Path(out), progress)
