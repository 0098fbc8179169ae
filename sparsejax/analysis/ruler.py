"""Tasks of RULER (arXiv:2404.06654) as text: chains of variables, and the most frequent words of a list."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sparsejax.analysis.figures import new_axes, note, thin, use_log
from sparsejax.analysis.kind import Findings, Picture, Row, Unit
from sparsejax.analysis.prompts import Question, build_tracking, build_words, count_common, count_frequent
from sparsejax.analysis.retrieval import ContextAnalysis
from sparsejax.analysis.subject import require_options, require_single_text
from sparsejax.errors import InputError, suggest
from sparsejax.loaded import LoadedModel
from sparsejax.palette import GREY, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = ("variable_tracking", "common_words", "frequent_words")
COMMON_QUESTION = " The most common words are"
FREQUENT_QUESTION = " The most frequent words, from the most frequent one, are"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerOptions:
    """Options of `ruler`."""

    tasks: tuple[str, ...] = dataclasses.field(default=TASKS, metadata={"help": f"some of {', '.join(TASKS)}"})
    lengths: tuple[int, ...] | None = dataclasses.field(
        default=None,
        metadata={"help": "largest number of tokens per question; by default multiples of the trained length"},
    )
    examples: int = dataclasses.field(default=32, metadata={"help": "number of examples per task and length"})
    candidates: int = dataclasses.field(default=8, metadata={"help": "number of answers that are ranked by likelihood"})
    chains: int = dataclasses.field(default=2, metadata={"help": "variable_tracking: number of chains"})
    hops: int = dataclasses.field(
        default=2, metadata={"help": "variable_tracking: assignments after the first of a chain"}
    )
    answers: int = dataclasses.field(default=3, metadata={"help": "words: number of words that are asked for"})
    alpha: float = dataclasses.field(default=2.0, metadata={"help": "frequent_words: exponent of the frequencies"})

    def __post_init__(self) -> None:
        require_options(self, {"chains": 2, "hops": 1, "answers": 1, "alpha": 0})
        for task in self.tasks:
            if task not in TASKS:
                raise InputError("tasks", f"{task!r} is unknown; {suggest(task, TASKS, 'tasks')}")


class Ruler(ContextAnalysis):
    """Accuracy of a model of text by task and length: how often the right answer is the most likely of several."""

    kind: ClassVar[str] = "ruler"
    tasks: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type] = RulerOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: RulerOptions):
        super().__init__(model, data, options)
        self.dataset = model.load_data(self.data)
        require_single_text(self.dataset)
        self.lengths = self.choose_lengths(options.lengths, model.source.length, self._problem)

    @property
    def source(self) -> str:
        return self.dataset.digest

    @property
    def units(self) -> list[Unit]:
        return [[task, n] for task in self.options.tasks for n in self.lengths]

    def measure(self, unit: Unit) -> dict[str, float]:
        """Returns the accuracy of a task at a length."""
        task, n = unit
        return self.ask(lambda seed: self._ask(task, n, seed))

    def _problem(self, length: int) -> InputError | None:
        """Returns the error about a length, if any."""
        try:
            for task in self.options.tasks:
                self._ask(task, length, 0)
        except InputError as error:
            return error
        return None

    def _ask(self, task: str, length: int, seed: int) -> Question:
        options: RulerOptions = self.options
        if task == "variable_tracking":
            assert self.dataset.corpus is not None
            tokens, sizes = self.dataset.corpus.held_out.tokens, (options.chains, options.hops, options.candidates)
            return build_tracking(self.model, tokens, length, *sizes, seed)
        is_ranked = task == "frequent_words"
        counts = (
            functools.partial(count_frequent, alpha=options.alpha)
            if is_ranked
            else functools.partial(count_common, answers=options.answers)
        )
        question = FREQUENT_QUESTION if is_ranked else COMMON_QUESTION
        return build_words(self.model, length, counts, question, is_ranked, options.answers, options.candidates, seed)

    def _chance(self, task: str) -> float:
        most = (
            self.options.chains ** (1 + self.options.hops) if task == "variable_tracking" else self.options.candidates
        )
        return 1 / min(most, self.options.candidates)

    def summarize(self, results: list[Any]) -> Findings:
        rows: list[Row] = [
            {"task": task, "length": n, "chance": self._chance(task)}
            | {k: v for k, v in result.items() if k != "length"}
            for (task, n), result in zip(self.units, results, strict=True)
        ]
        lines = []
        for task in self.options.tasks:
            cells = [row for row in rows if row["task"] == task]
            values = ", ".join(f"{row['exact_match']:.3f} at {row['length']:,}" for row in cells)
            lines.append(f"{task}: exact match {values} tokens; chance {self._chance(task):.3f}.")
        caption = (
            "Exact match by length: the right answer is the most likely one. Dashed: share of the evidence, the"
            " assignments of the chain or the list of words, inside of the receptive field. Dotted: chance."
        )
        return Findings(
            "Tasks of RULER as text", {"accuracy": rows}, [Picture("accuracy", caption, lambda: draw(rows))], lines
        )


def draw(rows: list[Row]) -> Figure:
    """A curve over lengths per task, with the share of the evidence in the receptive field and chance."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = new_axes(1, len(tasks), width=3.1, height=2.9)
    for axis, task in zip(axes, tasks, strict=True):
        cells = [row for row in rows if row["task"] == task]
        lengths = [row["length"] for row in cells]
        marks: dict[str, Any] = {"marker": "o", "markersize": 3.5}
        axis.plot(lengths, [row["exact_match"] for row in cells], color=SERIES[0], label="exact match", **marks)
        axis.plot(
            lengths, [row["reachable"] for row in cells], color=INK, linestyle=(0, (4, 2)), linewidth=1.1,
            marker="s", markersize=3.5, label="evidence in the receptive field",
        )  # fmt: skip
        axis.axhline(cells[0]["chance"], color=GREY, linewidth=1, linestyle="dotted", label="chance")
        if len(lengths) > 1:
            use_log(axis, "x")
        axis.set_xticks(thin(lengths), [f"{n:,}" for n in thin(lengths)])
        axis.set(xlabel="length (tokens)", ylim=(-0.02, 1.04))
        note(axis, task.replace("_", " "))
    axes[0].set_ylabel("share")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", frameon=False, fontsize=7, ncols=3 if len(tasks) > 1 else 1
    )
    return figure
