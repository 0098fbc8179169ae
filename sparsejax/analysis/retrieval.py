"""Retrieval from a long context: of a needle by length and depth, and of a value by the position of its key."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsejax.analysis.figures import draw_cells, mark_unreachable, new_axes, note, outline_reachable, thin, use_log
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit
from sparsejax.analysis.prompts import QUESTION, SENTENCE, Haystack, Question, build_pairs, rank
from sparsejax.analysis.subject import Subject, require_options, require_single_text
from sparsejax.data import DataConfig
from sparsejax.data.probes import KeyValue, Probe
from sparsejax.data.probes.needle import HEX
from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel
from sparsejax.palette import GREY, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 8  # examples per call of the model
FACTORS = (0.25, 0.5, 1, 2)  # of the trained length, by default
MAX_PAIRS = 75  # of text, by default
MAX_WIDTH = 12.0  # inches of the panels of a row
TRACED = 4  # examples from which the receptive field is predicted


class ContextAnalysis(Analysis):
    """Accuracy on questions whose answer is in the context: of variants of a probe, or of a text model.

    The probe is that of the run, or `data.task`. A model of text answers by ranking candidates by their likelihood.
    """

    tasks: ClassVar[tuple[str, ...]]

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: Any):
        trained = dict(model.source.data).get("task", "text")
        self.task = dict(data).get("task", trained)
        super().__init__(model, {"task": self.task} | dict(data), options)
        require_options(options, {"examples": 1, "candidates": 2})
        if not model.config.causal:
            raise InputError("kind", f"{self.kind} needs a causal model; {model.source.kind} is an encoder")
        if self.task not in ("text", *self.tasks):
            known = " or ".join(filter(None, [", ".join(self.tasks), "text"]))
            problem = f"{self.task!r}: {self.kind} measures {known}; set data.task"
            raise InputError("data.task", problem)
        self.subjects: dict[int, Subject] = {}

    @property
    def is_text(self) -> bool:
        """Whether the questions are text."""
        return self.task == "text"

    @property
    def metric(self) -> str:
        """Column of the table that the figure shows."""
        return "exact_match"

    def choose_lengths(
        self, lengths: tuple[int, ...] | None, trained: int, find_problem: Callable[[int], InputError | None]
    ) -> tuple[int, ...]:
        """Returns the lengths to measure, by default multiples of the trained length without a problem.

        Raises:
          InputError: A length has a problem, or exceeds the learned positions.
        """
        longest = self.model.config.embedding.max_length or trained * 2
        default = [int(trained * factor) for factor in FACTORS if int(trained * factor) <= longest]
        fitting = tuple(n for n in default if find_problem(n) is None)
        chosen = lengths or fitting or tuple(default[-1:])  # the last has the clearest error
        for n in chosen:
            self.model.require_positions(n, "lengths")
            if (problem := find_problem(n)) is not None:
                raise InputError("lengths", problem.problem) if problem.argument == "length" else problem
        return chosen

    def config(self, changes: Mapping[str, Any]) -> DataConfig:
        """Returns the section `data` with changes of the probe."""
        return self.model.load_data(self.data | {f"probe.{key}": value for key, value in changes.items()}).config

    def evaluate(self, changes: Mapping[str, Any], argument: str) -> dict[str, float]:
        """Returns the accuracy of a variant of the probe, and the share of its answers that the field reaches."""
        probe = self.config(changes).probe
        assert probe is not None
        self.model.require_positions(probe.length, argument)
        batch = min(BATCH, self.options.examples)
        settings = self.data | {"length": probe.length} | {f"probe.{key}": value for key, value in changes.items()}
        result = self.model.evaluate(settings, stride=0, batch=batch, limit=-(-self.options.examples // batch))
        accuracy = result.evaluation.accuracy
        assert accuracy is not None
        return {
            "exact_match": accuracy.exact_match,
            "accuracy": accuracy.tokens,
            "loss": result.evaluation.loss,
            "reachable": self._reachable(probe),
            "length": probe.length,
        }

    def ask(self, build: Callable[[int], Question]) -> dict[str, float]:
        """Returns the accuracy on the questions that `build` makes of seeds, and the share in the receptive field."""
        questions = [build(seed) for seed in range(self.options.examples)]
        hits, losses = rank(self.model, questions, BATCH)
        inside = []
        for question in questions:
            end = len(question.prompt) - 1
            inside.append(self._subject(question.length).field(end)[question.evidence].mean())
        return {
            "exact_match": float(np.mean(hits)),
            "loss": float(np.mean(losses)),
            "reachable": float(np.mean(inside)),
            "length": max(question.length for question in questions),
        }

    def _subject(self, length: int) -> Subject:
        return self.subjects.setdefault(length, Subject(self.model, length))

    def _reachable(self, probe: Probe) -> float:
        """Share of the answers that are inside of the receptive field of the position that predicts them.

        If answers are not copied from a position, the share of the positions before the first answer instead.
        """
        subject, inside = self._subject(probe.length), []
        for index in range(TRACED):
            example = probe.example(0, index, validation=True)
            scored = np.flatnonzero(example["weights"])
            for position in map(int, scored):
                field = subject.field(position)
                if "distance" in example:
                    inside.append(field[position - example["distance"][position] + 1])
                else:
                    inside.append(field[: scored[0]].mean())
        return float(np.mean(inside))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """Options of `needle`."""

    lengths: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"help": "tokens per sequence; by default multiples of the trained length"}
    )
    depths: tuple[float, ...] = dataclasses.field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata={"help": "fractions of the haystack before the needle"}
    )
    needles: tuple[int, ...] = dataclasses.field(
        default=(1,), metadata={"help": "numbers of needles, all but one of which are distractors"}
    )
    examples: int = dataclasses.field(default=32, metadata={"help": "number of examples per cell"})
    candidates: int = dataclasses.field(
        default=8, metadata={"help": "text: number of answers that are ranked by likelihood"}
    )
    sentence: str = dataclasses.field(default=SENTENCE, metadata={"help": "text: the needle"})
    question: str = dataclasses.field(default=QUESTION, metadata={"help": "text: the end of the prompt"})


class Needle(ContextAnalysis):
    """Accuracy by length, by the depth of a needle and by the number of needles, as far as the task has them."""

    kind: ClassVar[str] = "needle"
    tasks: ClassVar[tuple[str, ...]] = ("passkey", "needles", "variable_tracking", "common_words", "frequent_words")
    Options: ClassVar[type] = NeedleOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: NeedleOptions):
        super().__init__(model, data, options)
        require_options(options, {"needles": 1})
        for depth in options.depths:
            if not 0 <= depth <= 1:
                raise InputError("depths", f"{depth} is not in [0, 1]")
        self.dataset = model.load_data(self.data)
        if self.is_text:
            require_single_text(self.dataset)
        probe = self.dataset.config.probe
        fields = {"needles", "depth"} if probe is None else {field.name for field in dataclasses.fields(probe)}  # type: ignore[arg-type]
        if "needles" not in fields and options.needles != (1,):
            raise InputError("needles", f"{list(options.needles)}: the probe {self.task} sets it in data.probe")
        self.depths = options.depths if "depth" in fields else (None,)
        self.needles = options.needles if "needles" in fields else (None,)
        trained = model.source.length if probe is None else probe.length
        self.lengths = self.choose_lengths(options.lengths, trained, self._problem)

    def _problem(self, length: int) -> InputError | None:
        """Returns the error about a length, if any."""
        try:
            for needles in self.needles:
                self._ask(length, self.depths[0], needles) if self.is_text else self._probe(length, None, needles)
        except InputError as error:
            return error
        return None

    def _probe(self, length: int, depth: float | None, needles: int | None) -> Probe:
        probe: Any = self.dataset.config.probe
        return dataclasses.replace(probe, **self._changes(length, depth, needles))

    @staticmethod
    def _changes(length: int, depth: float | None, needles: int | None) -> dict[str, Any]:
        changes = {"length": length, "depth": depth, "needles": needles}
        return {name: value for name, value in changes.items() if value is not None}

    def _ask(self, length: int, depth: float | None, needles: int | None, seed: int = 0) -> Question:
        assert depth is not None and needles is not None  # noqa: PT018
        return self._haystack.build(length, depth, needles, seed)

    @functools.cached_property
    def _haystack(self) -> Haystack:
        assert self.dataset.corpus is not None
        tokens = self.dataset.corpus.held_out.tokens
        return Haystack(self.model, tokens, self.options.sentence, self.options.question, self.options.candidates)

    @property
    def source(self) -> str:
        return self.dataset.digest if self.is_text else ""

    @property
    def units(self) -> list[Unit]:
        return [[needles, n, depth] for needles in self.needles for n in self.lengths for depth in self.depths]

    def measure(self, unit: Unit) -> dict[str, float]:
        """Returns the accuracy of a cell."""
        needles, n, depth = unit
        if self.is_text:
            return self.ask(lambda seed: self._ask(n, depth, needles, seed))
        return self.evaluate(self._changes(n, depth, needles), "lengths")

    def summarize(self, results: list[Any]) -> Findings:
        rows: list[Row] = []
        for (needles, n, depth), result in zip(self.units, results, strict=True):
            cell = {"needles": needles, "length": n, "depth": depth} | {
                k: v for k, v in result.items() if k != "length"
            }
            rows.append({name: value for name, value in cell.items() if value is not None})
        lines = []
        for name, cells in (("inside", [r for r in rows if r["reachable"] == 1]),
                            ("outside", [r for r in rows if r["reachable"] == 0])):  # fmt: skip
            if cells:
                mean = np.mean([row["exact_match"] for row in cells])
                lines.append(f"{len(cells)} cells {name} of the receptive field: exact match {mean:.3f} on average.")
        if self.is_text:
            count = max(self.options.candidates, *self.options.needles)
            lines.append(
                f"Exact match: the right one of {count} values is the most likely one; chance is {1 / count:.3f}."
            )
        if self.depths == (None,):
            caption = (
                f"Exact match of {self.task} by length, and the share of the evidence inside of the receptive field."
            )
            picture = Picture("accuracy", caption, lambda: draw_lengths(rows))
        else:
            caption = (
                "Exact match by length and depth of the needle (0: start). Orange: boundary of the receptive field;"
                " cells marked with a cross are outside of it."
            )
            picture = Picture("accuracy", caption, lambda: draw_needle(rows))
        title = "Needle in a haystack" if self.depths != (None,) else f"Accuracy of {self.task} by length"
        return Findings(title, {"accuracy": rows}, [picture], lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Options of `retrieval`."""

    queries: int = dataclasses.field(default=11, metadata={"help": "number of queried positions, evenly spaced"})
    examples: int = dataclasses.field(default=32, metadata={"help": "number of examples per cell"})
    candidates: int = dataclasses.field(
        default=8, metadata={"help": "text: number of answers that are ranked by likelihood"}
    )
    pairs: int | None = dataclasses.field(
        default=None,
        metadata={"help": "text: number of pairs; by default those that fit into the trained length, at most 75"},
    )


class Retrieval(ContextAnalysis):
    """Accuracy by the position of the queried pair, of the probe `key_value` or of text (arXiv:2307.03172)."""

    kind: ClassVar[str] = "retrieval"
    tasks: ClassVar[tuple[str, ...]] = ("key_value",)
    Options: ClassVar[type] = RetrievalOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: RetrievalOptions):
        super().__init__(model, data, options)
        require_options(options, {"queries": 2})
        if self.is_text:
            for name in self.data.keys() - {"task"}:
                raise InputError(f"data.{name}", "retrieval on text generates its pairs; set pairs")
            self.pairs = self._fit_pairs() if options.pairs is None else options.pairs
            if self.pairs < options.candidates:
                raise InputError("pairs", f"{self.pairs} is below candidates = {options.candidates}")
            model.require_positions(self._ask(0).length, "pairs")
            return
        if options.pairs is not None:
            raise InputError("pairs", "is for text; set data.probe.pairs")
        probe = self.config({"queries": 1}).probe
        assert isinstance(probe, KeyValue)
        model.require_positions(probe.length, "data.probe.pairs")
        self.pairs = probe.pairs

    def _fit_pairs(self) -> int:
        least, most = self.options.candidates, MAX_PAIRS
        lengths = [build_pairs(self.model, n, 0, 2, seed=0).length for n in (least, 2 * least)]
        fitting = least + (self.model.source.length - lengths[0]) * least // (lengths[1] - lengths[0])
        return max(least, min(fitting, most))

    def _ask(self, query: int, seed: int = 0) -> Question:
        return build_pairs(self.model, self.pairs, query, self.options.candidates, seed)

    @property
    def metric(self) -> str:
        return "exact_match" if self.is_text else "accuracy"

    @property
    def units(self) -> list[Unit]:
        return sorted({round(index) for index in np.linspace(0, self.pairs - 1, min(self.options.queries, self.pairs))})

    def measure(self, unit: Unit) -> dict[str, float]:
        """Returns the accuracy for one position of the pair."""
        if self.is_text:
            return self.ask(lambda seed: self._ask(unit, seed))
        return self.evaluate({"query": unit, "queries": 1}, "data.probe.pairs")

    def summarize(self, results: list[Any]) -> Findings:
        rows = [{"pair": pair} | result for pair, result in zip(self.units, results, strict=True)]
        accuracy = [row[self.metric] for row in rows]
        ends = (accuracy[0] + accuracy[-1]) / 2
        lines = [f"Accuracy {accuracy[0]:.3f} for the first pair, {accuracy[-1]:.3f} for the last."]
        if len(accuracy) > 2:
            lowest = 1 + int(np.argmin(accuracy[1:-1]))
            dip = ends - accuracy[lowest]
            lines.append(
                f"Lowest between them: {accuracy[lowest]:.3f} for pair {rows[lowest]['pair']}, a dip of {dip:.3f}."
            )
        chance = 1 / self.options.candidates if self.is_text else 1 / HEX
        unit = f"one of {self.options.candidates} values ranked by likelihood" if self.is_text else "per digit"
        caption = (
            f"Accuracy, {unit}, by the position of the queried pair among {self.pairs}. Grey: pairs outside of the"
            " receptive field. Dotted: chance."
        )
        picture = Picture("accuracy", caption, lambda: draw_retrieval(rows, self.metric, chance))
        return Findings("Key-value retrieval by position", {"accuracy": rows}, [picture], lines)


def draw_needle(rows: list[Row]) -> Figure:
    """A heat map of length and depth per number of needles, with the boundary of the receptive field."""
    numbers, lengths, depths = (
        list(dict.fromkeys(row.get(name) for row in rows)) for name in ("needles", "length", "depth")
    )
    width, height = 1.2 + 0.55 * len(lengths), 0.9 + 0.34 * len(depths)
    columns = max(1, min(len(numbers), int(MAX_WIDTH / width)))
    figure, axes = new_axes(-(-len(numbers) // columns), columns, width, height)
    figure.set_figwidth(width * columns + 1.0)
    for axis in axes[len(numbers) :]:
        axis.set_visible(False)
    for axis, number in zip(axes, numbers, strict=False):
        cells = {(row["depth"], row["length"]): row for row in rows if row.get("needles") == number}
        values, reachable = (
            np.array([[cells[depth, n][name] for n in lengths] for depth in depths])
            for name in ("exact_match", "reachable")
        )
        image = draw_cells(axis, values, [f"{depth:g}" for depth in depths], [f"{n:,}" for n in lengths])
        outline_reachable(axis, reachable >= 0.5)
        axis.set(xlabel="length (tokens)", ylabel="depth")
        field = "all inside" if reachable.min() >= 0.5 else "×: outside"
        title = "needles of data.probe" if number is None else f"{number} needle{'s' * (number > 1)}"
        note(axis, f"{title}, {field} of the receptive field")
    figure.colorbar(image, ax=axes, label="exact match", fraction=0.04, aspect=30)
    return figure


def draw_lengths(rows: list[Row]) -> Figure:
    """Exact match and the share of the evidence in the receptive field by length."""
    figure, (axis,) = new_axes(1, 1, width=5.2)
    lengths = [row["length"] for row in rows]
    reach: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "marker": "s", "markersize": 3.5, "linewidth": 1.1}
    axis.plot(lengths, [row["reachable"] for row in rows], label="evidence in the receptive field", **reach)
    for name, color in (("exact_match", SERIES[0]), ("accuracy", SERIES[1])):
        label = {"exact_match": "exact match", "accuracy": "accuracy per token"}[name]
        axis.plot(lengths, [row[name] for row in rows], color=color, marker="o", markersize=3.5, label=label)
    use_log(axis, "x")
    axis.set_xticks(thin(lengths), [f"{n:,}" for n in thin(lengths)])
    axis.set(xlabel="length (tokens)", ylabel="share", ylim=(-0.02, 1.04))
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure


def draw_retrieval(rows: list[Row], metric: str = "accuracy", chance: float = 1 / HEX) -> Figure:
    """Accuracy by pair, with the pairs that the receptive field does not reach in grey."""
    figure, (axis,) = new_axes(1, 1, width=5.8)
    pairs = [row["pair"] for row in rows]
    mark_unreachable(axis, pairs, [row["reachable"] >= 0.5 for row in rows])
    axis.plot(pairs, [row[metric] for row in rows], color=SERIES[0], marker="o", markersize=3.5, linewidth=1.3)
    axis.axhline(chance, color=GREY, linewidth=1, linestyle="dotted", label=f"chance: {chance:.3g}")
    axis.set_xticks(thin(pairs, 12), [f"{pair:,}" for pair in thin(pairs, 12)])
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    axis.set(
        xlabel="position of the pair (0: start)",
        ylabel="accuracy per digit" if metric == "accuracy" else "exact match",
        ylim=(-0.02, 1.04),
    )
    return figure
