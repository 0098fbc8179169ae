"""Loss by position, within and beyond the trained length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsejax.analysis.figures import mark_reach, new_axes
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit, to_json
from sparsejax.analysis.subject import Subject, choose_windows, require_options
from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel
from sparsejax.palette import GREY, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 4  # windows per call of the model
FACTORS = (1, 2, 4)  # of the trained length, by default
BINS = 2  # per octave of positions, in the figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Options of `position`."""

    lengths: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"help": "lengths; by default multiples of the trained length"}
    )
    windows: int = dataclasses.field(default=256, metadata={"help": "most windows of the text"})


class Position(Analysis):
    """Mean loss at each position of windows of several lengths."""

    kind: ClassVar[str] = "position"
    Options: ClassVar[type] = PositionOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: PositionOptions):
        super().__init__(model, data, options)
        if "length" in data:
            raise InputError("data.length", "is set by lengths")
        dataset = model.load_data(data)
        self.digest, trained = dataset.digest, model.source.length
        if dataset.corpus is None:
            raise InputError("kind", f"position needs text, but data.task is {dataset.config.task!r}")
        tokens, longest = len(dataset.corpus.held_out.tokens), model.config.embedding.max_length or math.inf
        self.lengths = options.lengths or tuple(
            n for n in (trained * factor for factor in FACTORS) if n < tokens and n <= longest
        )
        require_options(dataclasses.replace(options, lengths=self.lengths), {"lengths": 2, "windows": 1})
        for n in self.lengths:
            if n >= tokens:
                raise InputError("lengths", f"{n} is not below the {tokens} tokens of the text")
        self.subjects = {n: Subject(model, n, "lengths") for n in self.lengths}
        if not self.lengths:
            choose_windows(dataset, options.windows)  # raises: the text is shorter than a window

    @property
    def units(self) -> list[Unit]:
        return list(self.lengths)

    @property
    def source(self) -> str:
        return self.digest

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Returns the mean loss and the number of scored tokens at each position."""
        batch = min(BATCH, self.options.windows)
        evaluated = self.model.evaluate(
            self.data | {"length": unit}, stride=0, batch=batch, limit=-(-self.options.windows // batch)
        )
        return {"loss": to_json(evaluated.evaluation.by_position), "tokens": to_json(evaluated.evaluation.scored)}

    def summarize(self, results: list[Any]) -> Findings:
        rows: list[Row] = []
        means, trained = [], self.model.source.length
        for n, result in zip(self.lengths, results, strict=True):
            loss, tokens = (np.array(result[name]) for name in ("loss", "tokens"))
            rows += [
                {"length": n, "position": position, "loss": float(value), "tokens": int(count)}
                for position, (value, count) in enumerate(zip(loss, tokens, strict=True))
                if count
            ]
            inside, reach = np.arange(n) < trained, self.subjects[n].reach()
            mean = {"length": n, "loss": _mean(loss, tokens), "within_trained": _mean(loss, tokens * inside)}
            mean |= {"beyond_trained": _mean(loss, tokens * ~inside), "reach": reach}
            means.append(mean)
        lines = [
            f"Length {mean['length']:,}: {mean['loss']:.4f} nats per token"
            + (f", {mean['beyond_trained']:.4f} beyond {trained:,} tokens." if mean["beyond_trained"] else ".")
            for mean in means
        ]
        caption = (
            f"Mean loss by position per length, in {BINS} bins per octave. Dashed: reach of the receptive field, beyond"
            " which a position has no more context. Dotted: the trained length."
        )
        reach, longest = self.subjects[max(self.lengths)].reach(), max(self.lengths)
        picture = Picture("loss", caption, lambda: draw_position(rows, trained, reach, longest))
        return Findings("Loss by position", {"loss": rows, "mean": means}, [picture], lines)


def _mean(loss: np.ndarray, tokens: np.ndarray) -> float | None:
    total = tokens.sum()
    return float((loss * tokens).sum() / total) if total else None


def bin_positions(positions: np.ndarray, losses: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean position and the mean loss in bins of positions from 1, of equal width in octaves."""
    bins = np.floor(BINS * np.log2(positions + 1)).astype(int)
    total = np.bincount(bins, tokens)
    kept = total > 0
    means = (np.bincount(bins, tokens * values)[kept] / total[kept] for values in (positions + 1, losses))
    return tuple(means)  # type: ignore[return-value]


def draw_position(rows: list[Row], trained: int, reach: int, longest: int) -> Figure:
    """Loss by position, a line per length."""
    figure, (axis,) = new_axes(1, 1, width=5.6, height=3.2)
    for index, n in enumerate(dict.fromkeys(row["length"] for row in rows)):
        columns = ([row[name] for row in rows if row["length"] == n] for name in ("position", "loss", "tokens"))
        axis.plot(
            *bin_positions(*map(np.array, columns)), color=SERIES[index % len(SERIES)], marker="o", markersize=2.5,
            linewidth=1.2, label=f"length {n:,}",
        )  # fmt: skip
    axis.axvline(trained, color=GREY, linewidth=1, linestyle="dotted", label=f"trained length: {trained:,}")
    mark_reach(axis, reach, longest)
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(0, int(math.log2(longest)) + 1, 2)]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set(xlabel="position (tokens)", ylabel="loss (nats per token)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure
