"""A search on a trained model: its record, so that it resumes, and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsejax import config as configs
from sparsejax.config import ModelSource
from sparsejax.errors import require_at_least, require_choice
from sparsejax.loading import load_source
from sparsejax.overrides import Overrides
from sparsejax.placement.choices import plan_choices, split_labels
from sparsejax.placement.results import write_results
from sparsejax.placement.scores import Scored, Scorer
from sparsejax.placement.search import Placement, find_best, search_all, search_beam
from sparsejax.workdir import append_row, hold_lock, resume_rows

METHODS = ("beam", "greedy", "all")
RECORD, LOCK = "placements.jsonl", "lock"


@dataclasses.dataclass(frozen=True)
class PlacementSearch:
    """A search over the attention layers of a trained model, without training.

    Attributes:
      source: The model.
      layers: What a layer can become, see `choices.FORMS`.
      budget: `QUANTITY:TARGET`, see `choices.read_budget`.
      data: Keys of the section data, which change those of the run.
      method: "beam", "greedy" (a beam of width 1), or "all" placements.
      width: Placements that a beam keeps per step.
      windows: Windows of the text.
      questions: Questions about needles in the text.
      weight: Weight of the loss of the answers beside that of the text.
    """

    source: ModelSource
    layers: str
    budget: str
    data: Overrides = dataclasses.field(default_factory=dict)
    method: str = "beam"
    width: int = 4
    windows: int = 8
    questions: int = 8
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self, "method", METHODS)
        require_at_least(self, 1, "width", "windows")
        require_at_least(self, 0, "questions", "weight")

    @property
    def record(self) -> dict[str, Any]:
        """What must not change when a search resumes."""
        values = dataclasses.asdict(self) | {"source": str(self.source.resolve())}
        for name in ("method", "width", "weight"):
            del values[name]
        return json.loads(json.dumps(values))


def run_search(
    search: PlacementSearch, folder: Path, progress: Callable[[int, int], None] = lambda index, count: None
) -> tuple[list[str], list[Path]]:
    """Runs or resumes a search in `folder`; returns lines about the result, and the files.

    Placements that another search of the same choices in the folder has measured are not measured again.

    Raises:
      InputError: An argument is invalid, or the folder holds another search.
    """
    model = load_source(search.source)
    dataset = model.load_data(search.data)
    length = dataset.held_out.length
    choices = plan_choices(model, split_labels(search.layers), search.budget, length, search.data)
    scorer = Scorer(choices, dataset, search.windows, search.questions)
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / LOCK, folder, folder):
        record = _Record(
            folder / RECORD, {**search.record, "step": model.step, "length": length, "text": dataset.digest}
        )
        measure = _Measure(scorer, record, progress)
        (full,) = measure.all([choices.source])

        def score(placements: Sequence[Placement]) -> list[float]:
            return [scored.combine(search.weight) for scored in measure.all(placements)]

        if search.method == "all":
            visited = search_all(choices.costs, score)
        else:
            visited = search_beam(choices.costs, score, 1 if search.method == "greedy" else search.width)
        best = find_best(visited)
        spent = choices.account(best)
        assert spent <= choices.budget * (1 + 1e-9), f"{spent} exceeds the budget of {choices.budget}"
        settings = configs.load(str(search.source))
        scores = {placement: record.scores[placement] for placement in visited}
        return write_results(folder, choices, scores, best, full, settings, search.source)


class _Record:
    """The measured placements, one row each, after a row with what determines them."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        self._path = path
        rows = resume_rows(path, identity, "workdir", "search")
        self.scores = {tuple(row["placement"]): Scored(**row["scores"]) for row in rows}

    def add(self, placement: Placement, scored: Scored) -> None:
        """Records the scores of a placement."""
        append_row(self._path, {"placement": list(placement), "scores": dataclasses.asdict(scored)})
        self.scores[placement] = scored


class _Measure:
    """Measures the placements that the record does not hold."""

    def __init__(self, scorer: Scorer, record: _Record, progress: Callable[[int, int], None]):
        self._scorer, self._record, self._progress = scorer, record, progress

    def all(self, placements: Sequence[Placement]) -> list[Scored]:
        """The scores of placements. Those with a common beginning are measured one after another."""
        missing = sorted(set(placements) - self._record.scores.keys())
        done = len(self._record.scores)
        for index, placement in enumerate(missing):
            self._progress(done + index, done + len(missing))
            self._record.add(placement, self._scorer.measure(placement))
        return [self._record.scores[placement] for placement in placements]
