"""Retrieval from a long context: of a needle by length and depth, and of a value by the position of its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsejax.analysis.figures import draw_cells, mark_unreachable, new_axes, note, outline_reachable
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit
from sparsejax.analysis.subject import Subject, require_options, require_positions
from sparsejax.data import DataConfig
from sparsejax.data.probes import KeyValue, Passkey, Probe
from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel
from sparsejax.palette import SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 8  # examples per call of the model
FACTORS = (0.25, 0.5, 1, 2)  # of the trained length, by default
TRACED = 4  # examples from which the receptive field is predicted


class ProbeAnalysis(Analysis):
    """Accuracy on variants of a probe: of that of the run, or of `data.task`."""

    task: ClassVar[str]

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: Any):
        super().__init__(model, {"task": self.task} | dict(data), options)
        require_options(options, {"examples": 1})
        if not model.config.causal:
            raise InputError("kind", f"{self.kind} needs a causal model; {model.source.kind} is an encoder")
        task = (dict(model.source.data) | dict(data)).get("task", "text")
        if task != self.task:
            problem = f"{task!r}: {self.kind} measures the probe {self.task}; set data.task={self.task}"
            raise InputError("data.task", problem)
        self.subjects: dict[int, Subject] = {}

    def config(self, changes: Mapping[str, Any]) -> DataConfig:
        """Returns the section `data` with changes of the probe."""
        return self.model.load_data(self.data | {f"probe.{key}": value for key, value in changes.items()}).config

    def evaluate(self, changes: Mapping[str, Any], argument: str) -> dict[str, float]:
        """Returns the accuracy of a variant, and the share of its answers that the receptive field reaches."""
        probe = self.config(changes).probe
        assert probe is not None
        require_positions(self.model, probe.length, argument)
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

    def _reachable(self, probe: Probe) -> float:
        """Share of the answers that are inside of the receptive field of the position that predicts them."""
        subject = self.subjects.setdefault(probe.length, Subject(self.model, probe.length))
        inside = []
        for index in range(TRACED):
            example = probe.example(0, index, validation=True)
            for position in np.flatnonzero(example["weights"]):
                inside.append(subject.field(int(position))[position - example["distance"][position] + 1])
        return float(np.mean(inside))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """Options of `needle`."""

    lengths: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"help": "lengths; by default multiples of the trained length"}
    )
    depths: tuple[float, ...] = dataclasses.field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata={"help": "fractions of the haystack before the needle"}
    )
    needles: tuple[int, ...] = dataclasses.field(default=(1,), metadata={"help": "needles, all but one distractors"})
    examples: int = dataclasses.field(default=32, metadata={"help": "examples per cell"})


class Needle(ProbeAnalysis):
    """Accuracy of the probe `passkey` by length, depth and number of needles."""

    kind: ClassVar[str] = "needle"
    task: ClassVar[str] = "passkey"
    Options: ClassVar[type] = NeedleOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: NeedleOptions):
        super().__init__(model, data, options)
        probe = self.config({}).probe
        assert isinstance(probe, Passkey)
        longest = model.config.embedding.max_length or probe.length * 2
        least = (1 + max(options.needles)) * (1 + probe.digits)  # the needles and the question
        default = tuple(n for n in (int(probe.length * factor) for factor in FACTORS) if least <= n <= longest)
        self.lengths = options.lengths or default
        for n in self.lengths:
            require_positions(model, n, "lengths")
            if n < least:
                raise InputError("lengths", f"{n} is below the {least} tokens of the needles and the question")
        for depth in options.depths:
            if not 0 <= depth <= 1:
                raise InputError("depths", f"{depth} is not in [0, 1]")
        for needles in options.needles:
            dataclasses.replace(probe, length=max(self.lengths), needles=needles)

    @property
    def units(self) -> list[Unit]:
        return [
            [needles, n, depth]
            for needles in self.options.needles
            for n in self.lengths
            for depth in self.options.depths
        ]

    def measure(self, unit: Unit) -> dict[str, float]:
        """Returns the accuracy of a cell."""
        needles, n, depth = unit
        return self.evaluate({"needles": needles, "length": n, "depth": depth}, "lengths")

    def summarize(self, results: list[Any]) -> Findings:
        rows = [
            {"needles": needles, "length": n, "depth": depth} | {key: result[key] for key in result if key != "length"}
            for (needles, n, depth), result in zip(self.units, results, strict=True)
        ]
        lines = []
        for name, cells in (("inside", [r for r in rows if r["reachable"] == 1]),
                            ("outside", [r for r in rows if r["reachable"] == 0])):  # fmt: skip
            if cells:
                mean = np.mean([row["exact_match"] for row in cells])
                lines.append(f"{len(cells)} cells {name} of the receptive field: exact match {mean:.3f} on average.")
        caption = (
            "Exact match by length and depth of the needle (0: start). Orange: boundary of the receptive field; cells"
            " marked with a cross are outside of it."
        )
        picture = Picture("accuracy", caption, lambda: draw_needle(rows))
        return Findings("Needle in a haystack", {"accuracy": rows}, [picture], lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Options of `retrieval`."""

    queries: int = dataclasses.field(default=11, metadata={"help": "positions of the pair, evenly spaced"})
    examples: int = dataclasses.field(default=32, metadata={"help": "examples per cell"})


class Retrieval(ProbeAnalysis):
    """Accuracy of the probe `key_value` by the position of the queried pair (arXiv:2307.03172)."""

    kind: ClassVar[str] = "retrieval"
    task: ClassVar[str] = "key_value"
    Options: ClassVar[type] = RetrievalOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: RetrievalOptions):
        super().__init__(model, data, options)
        require_options(options, {"queries": 2})
        probe = self.config({}).probe
        assert isinstance(probe, KeyValue)
        require_positions(model, probe.length, "data.probe.pairs")
        self.pairs = probe.pairs

    @property
    def units(self) -> list[Unit]:
        return sorted({round(index) for index in np.linspace(0, self.pairs - 1, min(self.options.queries, self.pairs))})

    def measure(self, unit: Unit) -> dict[str, float]:
        """Returns the accuracy for one position of the pair."""
        return self.evaluate({"query": unit}, "data.probe.pairs")

    def summarize(self, results: list[Any]) -> Findings:
        rows = [{"pair": pair} | result for pair, result in zip(self.units, results, strict=True)]
        accuracy = [row["accuracy"] for row in rows]
        ends = (accuracy[0] + accuracy[-1]) / 2
        lines = [f"Accuracy {accuracy[0]:.3f} for the first pair, {accuracy[-1]:.3f} for the last."]
        if len(accuracy) > 2:
            lowest = 1 + int(np.argmin(accuracy[1:-1]))
            dip = ends - accuracy[lowest]
            lines.append(
                f"Lowest between them: {accuracy[lowest]:.3f} for pair {rows[lowest]['pair']}, a dip of {dip:.3f}."
            )
        caption = (
            f"Accuracy per digit by the position of the queried pair among {self.pairs}. Grey: pairs outside of the"
            " receptive field. Dotted: chance."
        )
        picture = Picture("accuracy", caption, lambda: draw_retrieval(rows))
        return Findings("Key-value retrieval by position", {"accuracy": rows}, [picture], lines)


def draw_needle(rows: list[Row]) -> Figure:
    """A heat map of length and depth per number of needles, with the boundary of the receptive field."""
    numbers, lengths, depths = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("needles", "length", "depth")
    )
    width = 1.2 + 0.55 * len(lengths)
    figure, axes = new_axes(1, len(numbers), width, 0.9 + 0.34 * len(depths))
    figure.set_figwidth(width * len(numbers) + 1.0)
    for axis, number in zip(axes, numbers, strict=True):
        cells = {(row["depth"], row["length"]): row for row in rows if row["needles"] == number}
        values, reachable = (
            np.array([[cells[depth, n][name] for n in lengths] for depth in depths])
            for name in ("exact_match", "reachable")
        )
        image = draw_cells(axis, values, [f"{depth:g}" for depth in depths], [f"{n:,}" for n in lengths])
        outline_reachable(axis, reachable >= 0.5)
        axis.set(xlabel="length (tokens)", ylabel="depth")
        note(axis, f"{number} needle{'s' * (number > 1)}")
    figure.colorbar(image, ax=axes, label="exact match")
    return figure


def draw_retrieval(rows: list[Row]) -> Figure:
    """Accuracy by pair, with the pairs that the receptive field does not reach in grey."""
    figure, (axis,) = new_axes(1, 1, width=5.2)
    pairs = [row["pair"] for row in rows]
    mark_unreachable(axis, pairs, [row["reachable"] >= 0.5 for row in rows])
    axis.plot(pairs, [row["accuracy"] for row in rows], color=SERIES[0], marker="o", markersize=3.5, linewidth=1.3)
    axis.axhline(1 / 16, color="#666666", linewidth=1, linestyle="dotted")
    axis.set(xlabel="position of the pair (0: start)", ylabel="accuracy per digit", ylim=(-0.02, 1.04))
    return figure
