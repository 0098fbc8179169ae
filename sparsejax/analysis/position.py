"""Loss by position, within and beyond the trained length."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsejax.analysis.figures import mark_reach, new_axes
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit, to_json
from sparsejax.analysis.subject import Subject, choose_windows, require_options, require_single_text
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch, token_losses
from sparsejax.loaded import LoadedModel
from sparsejax.palette import GREY, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 4  # windows per call of the model
FACTORS = (1, 2, 4)  # of the trained length, by default
BINS = 2  # per octave of positions
STATISTICS = ("loss", "standard_error", "tokens", "windows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Options of `position`."""

    lengths: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"help": "tokens per sequence; by default multiples of the trained length"}
    )
    windows: int = dataclasses.field(default=256, metadata={"help": "largest number of windows of the text"})


class Position(Analysis):
    """Mean loss at each position of windows of several lengths, with its standard error over windows."""

    kind: ClassVar[str] = "position"
    Options: ClassVar[type] = PositionOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: PositionOptions):
        super().__init__(model, data, options)
        if "length" in data:
            raise InputError("data.length", "is set by lengths")
        dataset = model.load_data(data)
        self.digest, trained = dataset.digest, model.source.length
        require_single_text(dataset)
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
        """Returns means, standard errors and counts of the windows, by position and by bin."""
        dataset = self.model.load_data(self.data | {"length": unit})
        subject, losses, weights = self.subjects[unit], [], []
        count = self.options.windows
        rows = next(rows for rows in range(BATCH, 0, -1) if count % rows == 0)  # exactly `count` windows, spread evenly
        for batch in dataset.validation_batches(rows, limit=count // rows):
            losses.append(np.asarray(_losses(subject, subject.parameters, batch), np.float64))
            weights.append(batch["weights"])
        loss, weight = np.concatenate(losses), np.concatenate(weights)
        edges = bin_edges(unit)
        sums, counts = (np.add.reduceat(x, edges, axis=1) for x in (loss * weight, weight))
        middles = np.add.reduceat(np.arange(1, unit + 1) * weight.sum(axis=0), edges) / np.maximum(
            counts.sum(axis=0), 1
        )
        position = dict(zip(STATISTICS, map(to_json, average_windows(loss * weight, weight)), strict=True))
        binned = dict(zip(STATISTICS, map(to_json, average_windows(sums, counts)), strict=True))
        return {"position": position, "bin": binned | {"at": to_json(middles)}}

    def summarize(self, results: list[Any]) -> Findings:
        rows: list[Row] = []
        bins: list[Row] = []
        means, trained = [], self.model.source.length
        for n, result in zip(self.lengths, results, strict=True):
            rows += [{"length": n, "position": at} | row for at, row in enumerate(_rows(result["position"])) if row]
            starts = bin_edges(n)
            bins += [
                {"length": n, "start": int(start), "stop": int(stop), "mean_position": at - 1} | row
                for start, stop, at, row in zip(
                    starts, [*starts[1:], n], result["bin"]["at"], _rows(result["bin"]), strict=True
                )
                if row
            ]
            loss, tokens = (np.array(result["position"][name]) for name in ("loss", "tokens"))
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
            f"Mean loss by position per length, in {BINS} bins per octave, with a band of one standard error over"
            " windows. Dashed: reach of the receptive field, beyond which a position has no more context. Dotted: the"
            " trained length."
        )
        reach, longest = self.subjects[max(self.lengths)].reach(), max(self.lengths)
        picture = Picture("loss", caption, lambda: draw_position(bins, trained, reach, longest))
        return Findings("Loss by position", {"mean": means, "bin": bins, "loss": rows}, [picture], lines)


@functools.partial(jax.jit, static_argnums=0)
def _losses(subject: Subject, parameters: Any, batch: DeviceBatch) -> Float[Array, "b t"]:
    logits = subject.functional.bind(parameters)(batch["inputs"], subject.context(batch))
    return token_losses(logits, batch["targets"], batch["weights"])


def average_windows(
    sums: Float[np.ndarray, "w n"], counts: Float[np.ndarray, "w n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns per column the mean loss of a token, its standard error over windows, and numbers of tokens and windows.

    The error is that of a mean of independent windows, whose tokens may depend on each other:
    sqrt(sum of (sum_w - count_w * mean) ** 2 * w / (w - 1)) / tokens; 0 for a single window.
    """
    tokens, windows = counts.sum(axis=0), (counts > 0).sum(axis=0)
    mean = sums.sum(axis=0) / np.maximum(tokens, 1)
    squares = ((sums - counts * mean) ** 2).sum(axis=0)
    error = np.sqrt(squares * windows / np.maximum(windows - 1, 1)) / np.maximum(tokens, 1)
    return mean, error, tokens, windows


def _rows(statistics: dict[str, list[float]]) -> list[Row]:
    """Returns a row per column of `average_windows`, empty where there are no tokens."""
    return [
        {"loss": loss, "standard_error": error, "tokens": int(tokens), "windows": int(windows)} if tokens else {}
        for loss, error, tokens, windows in zip(*(statistics[name] for name in STATISTICS), strict=True)
    ]


def _mean(loss: np.ndarray, tokens: np.ndarray) -> float | None:
    total = tokens.sum()
    return float((loss * tokens).sum() / total) if total else None


def bin_edges(n: int) -> np.ndarray:
    """Returns the first positions of bins of equal width in octaves of positions from 1."""
    bins = np.floor(BINS * np.log2(np.arange(1, n + 1))).astype(int)
    return np.flatnonzero(np.diff(bins, prepend=-1))


def draw_position(bins: list[Row], trained: int, reach: int, longest: int) -> Figure:
    """Loss by position, a line with a band per length."""
    figure, (axis,) = new_axes(1, 1, width=5.6, height=3.2)
    for index, n in enumerate(dict.fromkeys(row["length"] for row in bins)):
        names = ("mean_position", "loss", "standard_error")
        at, loss, error = (np.array([row[name] for row in bins if row["length"] == n]) for name in names)
        color = SERIES[index % len(SERIES)]
        axis.fill_between(at + 1, loss - error, loss + error, color=color, alpha=0.2, linewidth=0)
        axis.plot(at + 1, loss, color=color, marker="o", markersize=2.5, linewidth=1.2, label=f"length {n:,}")
    axis.axvline(trained, color=GREY, linewidth=1, linestyle="dotted", label=f"trained length: {trained:,}")
    mark_reach(axis, reach, longest)
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(0, int(math.log2(longest)) + 1, 2)]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set(xlabel="position (tokens, from 1)", ylabel="loss (nats per token)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure
