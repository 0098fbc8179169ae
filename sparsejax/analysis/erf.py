"""The effective receptive field: how strongly an output depends on the inputs around it, by distance."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.analysis.figures import color_depths, new_axes, note, use_log
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit, to_json
from sparsejax.analysis.subject import Subject, choose_windows, spread, take_inputs
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch
from sparsejax.loaded import LoadedModel
from sparsejax.palette import CELLS, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.95  # of the gradient's norm, which the radius holds
BATCH = 4  # windows per unit
MAX_DEPTHS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErfOptions:
    """Options of `erf`."""

    windows: int = dataclasses.field(default=32, metadata={"help": "largest number of windows of the text"})


class Erf(Analysis):
    """Gradients of outputs with respect to the embeddings (arXiv:1701.04128).

    The output after l layers is read as the model reads the last one: the logit of the most likely token, less the mean
    of the logits. Its gradient has a norm at each input. The profile is the mean norm by distance over one output per
    window, at positions spread over the second half of the window. The radius is the least distance within which the
    profile has 95 % of its sum.
    """

    kind: ClassVar[str] = "erf"
    Options: ClassVar[type] = ErfOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: ErfOptions):
        super().__init__(model, data, options)
        if model.config.head.pool != "none":
            raise InputError("kind", f"erf needs outputs per position, but head.pool is {model.config.head.pool!r}")
        self.dataset = model.load_data(data)
        self.subject = Subject(model, self.dataset.held_out.length)
        self.windows = choose_windows(self.dataset, options.windows)
        self.depths = spread(len(self.subject.config.names), MAX_DEPTHS)

    @property
    def units(self) -> list[Unit]:
        numbers = range(len(self.windows))
        return [list(numbers[start : start + BATCH]) for start in numbers[::BATCH]]

    @property
    def source(self) -> str:
        return self.dataset.digest

    def position(self, number: int) -> int:
        """Returns the position of the output of a window."""
        n = self.subject.length
        return n - 1 - number * (n // 2) // len(self.windows)

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Returns sums of norms by depth and offset, and by depth those outside the receptive field."""
        numbers = unit + [unit[-1]] * (BATCH - len(unit))  # one shape
        positions = np.array([self.position(number) for number in numbers])
        batch = take_inputs(self.dataset, self.windows[numbers].tolist())
        norms = np.asarray(self._norms(self.subject.parameters, batch, positions), np.float64)[:, : len(unit)]
        n = self.subject.length
        sums, outside = np.zeros((len(self.depths), 2 * n - 1)), np.zeros(len(self.depths))
        for row, position in enumerate(positions[: len(unit)]):
            sums[:, position : position + n] += norms[:, row, ::-1]  # offset 0 is at n - 1
            for index, depth in enumerate(self.depths):
                outside[index] += norms[index, row, ~self.subject.field(position, depth)].sum()
        return {"sums": to_json(sums[:, self._first :]), "outside": to_json(outside)}

    @property
    def _first(self) -> int:
        """Index of the first offset: later inputs do not influence a causal model."""
        return self.subject.length - 1 if self.subject.config.causal else 0

    @functools.cached_property
    def _norms(self) -> Any:
        return jax.jit(functools.partial(gradient_norms, self.subject, tuple(self.depths)))

    def summarize(self, results: list[Any]) -> Findings:
        n, first, depths = self.subject.length, self._first, self.depths
        sums = np.sum([result["sums"] for result in results], axis=0)
        outside = np.sum([result["outside"] for result in results], axis=0) / np.maximum(sums.sum(axis=1), 1e-300)
        positions = [self.position(number) for number in range(len(self.windows))]
        counts, fields = np.zeros(2 * n - 1), np.zeros((len(depths), 2 * n - 1), bool)
        for position in positions:
            counts[position : position + n] += 1
            for index, depth in enumerate(depths):
                fields[index, position : position + n] |= self.subject.field(position, depth)[::-1]
        profile = np.where(counts[first:] > 0, sums / np.maximum(counts[first:], 1), 0)
        offsets, fields = np.arange(first, 2 * n - 1) - (n - 1), fields[:, first:]
        profile_rows, radius_rows = [], []
        for index, depth in enumerate(depths):
            name, norms = self.subject.config.names[depth - 1], profile[index]
            radius, inside = find_radius(norms, offsets), fields[index]
            shares = norms / max(norms.sum(), 1e-300)
            profile_rows += [
                {"depth": depth, "layer": name, "distance": int(offset), "norm": float(norm), "share": float(share),
                 "inside": int(is_inside)}
                for offset, norm, share, is_inside in zip(offsets, norms, shares, inside, strict=True)
            ]  # fmt: skip
            exact = int(abs(offsets[inside]).max())
            radius_rows.append(
                {"depth": depth, "layer": name, "radius": radius, "exact": exact, "inputs": int(inside.sum()),
                 "outside": float(outside[index]), "length": n, "outputs": len(positions)}
            )  # fmt: skip
        return self._describe(profile_rows, radius_rows)

    def _describe(self, profile: list[Row], radii: list[Row]) -> Findings:
        last, n = radii[-1], self.subject.length
        reach = "the whole past" if last["exact"] == n - 1 else f"{last['exact']:,} tokens"
        lines = [
            f"Of the gradient, {SHARE:.0%} is within {last['radius']:,} tokens; the receptive field reaches {reach}.",
            f"Mean over {last['outputs']} outputs in the second half of windows of {n:,} tokens.",
        ]
        if last["outside"]:
            lines.append(f"Outside of the receptive field is a share of {last['outside']:.2g} of the gradient.")
        caption = (
            "Mean norm of the gradient by distance, as a share of its sum, and the distance that holds 95 % of it"
            " beside the reach of the receptive field, by depth. Grey: distances outside of the receptive field."
        )
        picture = Picture("profile", caption, lambda: draw_erf(profile, radii))
        return Findings("Effective receptive field", {"profile": profile, "radius": radii}, [picture], lines)


def gradient_norms(
    subject: Subject, depths: tuple[int, ...], parameters: Any, batch: DeviceBatch, positions: Int[Array, " b"]
) -> Float[Array, "depths b t"]:
    """Returns the norm of the gradient of the output at `positions`, after each of `depths`, at each embedding."""
    model = subject.functional.bind(parameters)
    start, context = model.embed(batch["inputs"], subject.context(batch))

    def run(x: Array) -> Array:
        outputs, known = [], context.with_extras(embeddings=x)
        for index, layer in enumerate(itertools.islice(model.unroll(), depths[-1])):
            x, added = layer(x, known.with_extras(layer=jnp.asarray(index)))
            known = known.pass_on(added.selection)
            if index + 1 in depths:
                logits = model.read_out(x[jnp.arange(len(x)), positions][:, None], known)[:, 0]
                outputs.append(logits.max(axis=-1) - logits.mean(axis=-1))
        return jnp.stack(outputs)

    outputs, pull_back = jax.vjp(run, start)

    def norms(depth: Array) -> Array:
        (gradient,) = pull_back(jnp.zeros_like(outputs).at[depth].set(1))
        gradient = gradient.astype(jnp.float32) if gradient.dtype == jnp.bfloat16 else gradient
        if subject.config.streams > 1:  # every stream begins with the embeddings
            gradient = sum(jnp.split(gradient, subject.config.streams, axis=-1))
        return jnp.linalg.norm(gradient, axis=-1)

    return jax.lax.map(norms, jnp.arange(len(depths)))


def find_radius(norms: Float[np.ndarray, " n"], offsets: Int[np.ndarray, " n"], share: float = SHARE) -> int:
    """Returns the least distance within which the norms have a share of their sum."""
    by_distance = np.bincount(abs(offsets), norms)
    total = by_distance.sum()
    return int(np.searchsorted(np.cumsum(by_distance), share * total * (1 - 1e-12))) if total else 0


def draw_erf(profile: list[Row], radii: list[Row]) -> Figure:
    """The profile by distance, and radius and reach by depth."""
    figure, (left, right) = new_axes(1, 2, width=4.2)
    last, colors = radii[-1], color_depths(len(radii))
    for row, color in zip(radii, colors, strict=True):
        rows = [entry for entry in profile if entry["depth"] == row["depth"]]
        distances, shares = (np.array([entry[key] for entry in rows]) for key in ("distance", "share"))
        is_last = row is last
        left.plot(distances, np.where(shares > 0, shares, np.nan), color=color, linewidth=1.4 if is_last else 0.8)
        if is_last:
            outside = np.array([not entry["inside"] for entry in rows])
            left.fill_between(
                distances, 0, 1, where=outside, step="mid", transform=left.get_xaxis_transform(), color=CELLS[0]
            )
    use_log(left, "y")
    left.axvline(last["radius"], color=SERIES[1], linewidth=1.2, label=f"95 % radius: {last['radius']:,} tokens")
    left.axvline(
        last["exact"], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"reach: {last['exact']:,} tokens"
    )
    left.set(xlabel="distance from the output (tokens)", ylabel="share of the gradient norm")
    left.legend(frameon=False, fontsize=7)
    depths = [row["depth"] for row in radii]
    reach: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "marker": "s", "markersize": 4}
    right.plot(depths, [row["exact"] for row in radii], label="reach of the receptive field", **reach)
    radius: dict[str, Any] = {"color": SERIES[1], "marker": "o", "markersize": 3}
    right.plot(depths, [row["radius"] for row in radii], label="95 % radius", **radius)
    right.legend(frameon=False, fontsize=7, loc="lower right")
    right.set(xlabel="layers", ylabel="distance (tokens)", ylim=(0, 1.08 * max(last["exact"], 1)), xticks=depths)
    note(left, "one line per depth, from light to dark")
    return figure
