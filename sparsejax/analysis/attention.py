"""Where the heads of softmax attention attend on real text, and the cheapest patterns that keep it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.analysis.figures import color_depths, draw_cells, new_axes, note, thin, use_log
from sparsejax.analysis.kind import Analysis, Findings, Picture, Row, Unit, to_json
from sparsejax.analysis.subject import Subject, choose_windows, require_options, take_inputs
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch
from sparsejax.loaded import LoadedModel
from sparsejax.ops import AttentionCall, add_alibi, log_multiplicity
from sparsejax.ops.call import SelectedCall
from sparsejax.ops.softmax import masked_softmax, softcap
from sparsejax.palette import GREY, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = 1 << 22  # scores of a tile: heads x queries x keys
TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
WINDOWS = (16, 64, 256, 1024)  # of the default patterns
ROUNDING = 1e-5  # of a share, in sums of float32
PANELS_IN_A_ROW = 4
MAX_PANELS = 12
TEXT_ROWS = 24  # layers above which the cells of a heat map have no numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options of `attention`."""

    windows: int = dataclasses.field(default=4, metadata={"help": "largest number of windows of the text"})
    patterns: str = dataclasses.field(
        default="",
        metadata={"help": "candidate patterns, separated by semicolons; by default windows with and without sinks"},
    )
    tau: float = dataclasses.field(default=0.95, metadata={"help": "share of the attention that a pattern must keep"})
    sinks: int = dataclasses.field(default=4, metadata={"help": "number of first tokens that count as sinks"})

    def __post_init__(self) -> None:
        require_options(self, {"sinks": 1})
        if not 0 < self.tau <= 1:
            raise InputError("tau", f"{self.tau} is not in (0, 1]")


class Attention(Analysis):
    """The probabilities of every head, computed in tiles of queries.

    Per head, as means over the queries of the windows: the mass inside of each candidate, on the first tokens and on a
    learned sink; the mean distance, the entropy, and the least number of keys that hold a share p of the mass. Per
    section of the config, the candidate with the fewest pairs that keeps a share `tau` of the mass of a head in every
    layer of the section; a head for which no candidate does keeps its own pattern.
    """

    kind: ClassVar[str] = "attention"
    Options: ClassVar[type] = AttentionOptions

    def __init__(self, model: LoadedModel, data: Mapping[str, Any], options: AttentionOptions):
        super().__init__(model, data, options)
        self.dataset = model.load_data(data)
        self.subject = Subject(model, self.dataset.held_out.length)
        self.windows = choose_windows(self.dataset, options.windows)
        self.candidates = parse_candidates(options.patterns, self.subject.config, self.subject.length)
        batch = take_inputs(self.dataset, [int(self.windows[0])])
        shapes = jax.eval_shape(self._measure, self.subject.parameters, batch)
        self.sections = [(layer, path) for layer, paths in enumerate(shapes) for path in paths]
        if not self.sections:
            raise InputError("kind", "the model has no softmax attention; erf and position fit every mixer")

    @property
    def units(self) -> list[Unit]:
        return list(range(len(self.windows)))

    @property
    def source(self) -> str:
        return self.dataset.digest

    def measure(self, unit: Unit) -> list[dict[str, Any]]:
        """Returns sums over the queries of a window, per section."""
        batch = take_inputs(self.dataset, [int(self.windows[unit])])
        layers = self._measure(self.subject.parameters, batch)
        return [{name: to_json(sums) for name, sums in layers[layer][path].items()} for layer, path in self.sections]

    @functools.cached_property
    def _measure(self) -> Any:
        known = tuple(self.candidates), self.options.sinks
        return jax.jit(functools.partial(measure_layers, self.subject, *known))

    def summarize(self, results: list[Any]) -> Findings:
        heads, coverage, means = [], [], self._average(results)
        for (layer, path), mean in zip(self.sections, means, strict=True):
            where = {"layer": layer, "section": self._section(layer, path)}
            for head in range(len(mean["mass"])):
                heads.append(where | {"head": head} | _describe_head(mean, head))
                coverage += [
                    where | {"head": head, "pattern": str(pattern), "pairs": pattern.pairs(self.subject.length),
                             "mass": float(inside[head]), "share": float(inside[head] / max(mean["mass"][head], 1e-30))}
                    for pattern, inside in zip(self.candidates, mean["inside"], strict=True)
                ]  # fmt: skip
        choices = self._choose(means)
        tables = {"heads": heads, "coverage": coverage} | ({"choice": choices} if choices else {})
        return Findings("Attention", tables, self._draw(means), self._describe(choices))

    def choose(self, results: list[Any]) -> dict[str, str]:
        """Returns the chosen pattern of all heads by key of the config, see `lines`."""
        return self.lines(self._choose(self._average(results)))

    def _average(self, results: list[Any]) -> list[dict[str, np.ndarray]]:
        """The means over the queries of all windows, per section."""
        means = []
        for index in range(len(self.sections)):
            entries = [result[index] for result in results]
            sums = {name: np.sum([entry[name] for entry in entries], axis=0) for name in entries[0]}
            means.append({name: value / sums["queries"] for name, value in sums.items()})
        return means

    def _section(self, layer: int, path: str) -> str:
        """The section of the config in which the pattern is."""
        name = self.subject.config.names[layer]
        if path != "side":
            return f"layers.{name}.{path}"
        side = self.subject.config.layers[name].side
        assert side is not None
        return f"shared.{side.shared}.mixer"

    def _has_pattern(self, section: str) -> bool:
        """Whether the config of a mixer sets its pattern, from all of whose keys it reads."""
        mixer = _walk(self.subject.config, section.split("."))
        return hasattr(mixer, "pattern") and not mixer.selects

    def _pattern(self, section: str) -> patterns.Pattern:
        return patterns.parse(_walk(self.subject.config, section.split(".")).pattern)

    def _choose(self, means: list[dict[str, np.ndarray]]) -> list[Row]:
        """The chosen pattern of each head of each section."""
        shares: dict[str, np.ndarray] = {}  # least over the layers of a section, [candidates, h]
        for (layer, path), mean in zip(self.sections, means, strict=True):
            section, share = self._section(layer, path), mean["inside"] / np.maximum(mean["mass"], 1e-30)
            shares[section] = np.minimum(shares.get(section, 1.0), share)
        rows = []
        for section, share in shares.items():
            if not self._has_pattern(section):
                continue
            for head in range(share.shape[1]):
                current = self._pattern(section).for_head(head)
                options = [(current, 1.0), *zip(self.candidates, share[:, head], strict=True)]
                pattern, kept = choose_pattern(options, self.options.tau, self.subject.length)
                pairs, before = (chosen.pairs(self.subject.length) for chosen in (pattern, current))
                rows.append(
                    {"section": section, "head": head, "pattern": str(pattern), "share": float(kept), "pairs": pairs,
                     "pairs_before": before}
                )  # fmt: skip
        return rows

    def lines(self, choices: list[Row]) -> dict[str, str]:
        """Returns the chosen pattern by key of the config, after a check that the model can be built with it."""
        chosen: dict[str, list[str]] = {}
        for row in choices:
            chosen.setdefault(f"{row['section']}.pattern", []).append(row["pattern"])
        lines = {key: f"per_head({', '.join(heads)})" for key, heads in chosen.items()}
        config = self.subject.config
        for key, line in lines.items():
            config = _replace(config, key.split("."), line)
        config.check(self.subject.length)
        return lines

    def _describe(self, choices: list[Row]) -> list[str]:
        lines = []
        if choices:
            after, before = (sum(row[name] for row in choices) for name in ("pairs", "pairs_before"))
            kept = (
                f"Per head, the cheapest pattern that keeps a share of {self.options.tau:g} of the attention on average"
            )
            lines.append(f"{kept}; together {after / before:.1%} of the pairs at {self.subject.length:,} tokens:")
            lines += [
                f"model.{key}={line!r}" + " of a shared block" * key.startswith("shared.")
                for key, line in self.lines(choices).items()
            ]
        names, scored = self.subject.config.names, {layer for layer, _ in self.sections}
        silent = [f"{layer} {name}" for layer, name in enumerate(names) if layer not in scored]
        if silent:
            lines.append(f"Without scores of softmax attention: layers {', '.join(silent)}.")
        selecting = sorted(
            {self._section(*where) for where in self.sections if not self._has_pattern(self._section(*where))}
        )
        lines += [f"{section} selects its keys; the selected keys count as its pattern." for section in selecting]
        return lines

    def _draw(self, means: list[dict[str, np.ndarray]]) -> list[Picture]:
        n, names = self.subject.length, self.subject.config.names
        numbers = [layer for layer, _ in self.sections]
        reach = [self.subject.reach(layer + 1) for layer in numbers]
        labels = [
            f"{layer} {names[layer]}{path.removeprefix('mixer')}, "
            + (f"reach {r:,}" if r < n - 1 else "the whole past")
            for (layer, path), r in zip(self.sections, reach, strict=True)
        ]
        shown = [str(pattern) for pattern in self.candidates][:MAX_PANELS]
        field = "the reach of the receptive field of the layers up to it"
        return [
            Picture(
                "coverage",
                f"Mean mass inside of each pattern, by layer and head. After the name of a layer: {field}.",
                lambda: draw_coverage(labels, shown, means),
            ),
            Picture(
                "distance",
                f"Mean distance of the keys per head, the mean distance if all keys of its pattern had equal mass, and"
                f" {field}; entropy per head, and that of equal masses.",
                lambda: draw_distance(numbers, means, reach),
            ),
            Picture(
                "keys",
                "Mean over heads and queries of the least number of keys that hold a share p of the mass, per layer;"
                " dashed: keys in the pattern per query.",
                lambda: draw_keys(labels, means, n),
            ),
        ]


def parse_candidates(text: str, config: ModelConfig, n: int) -> list[patterns.Pattern]:
    """Returns the candidate patterns, in a causal model within `causal`.

    Raises:
      InputError: A pattern does not parse, does not fit `n` tokens, or differs between heads.
    """
    widths = [width for width in WINDOWS if width < n] or [max(n // 2, 1)]
    windows = [f"window({w - 1})" if config.causal else f"window({w // 2}, {w // 2})" for w in widths]
    texts = [part.strip() for part in text.split(";")] if text else windows + [f"{w} | sink(4)" for w in windows]
    candidates = []
    for part in texts:
        try:
            pattern = patterns.parse(part, n)
        except patterns.PatternError as error:
            raise InputError("patterns", error.problem) from error
        if pattern.heads is not None:
            raise InputError("patterns", f"{part!r} differs between heads; a candidate is for one head")
        if config.causal and pattern.lookahead() > 0:
            pattern = patterns.And.of(patterns.Causal(), pattern)
        candidates.append(pattern)
    return list(dict.fromkeys(candidates))


def choose_pattern(
    options: Sequence[tuple[patterns.Pattern, float]], tau: float, n: int
) -> tuple[patterns.Pattern, float]:
    """Returns the pattern of the fewest pairs whose share is at least `tau`, and its share; the first of equal ones."""
    kept = [(pattern, share) for pattern, share in options if share >= tau - ROUNDING]
    return min(kept, key=lambda option: option[0].pairs(n))


def measure_layers(
    subject: Subject, candidates: tuple[patterns.Pattern, ...], sinks: int, parameters: Any, batch: DeviceBatch
) -> list[dict[str, dict[str, Array]]]:
    """Returns the sums of `measure_attention` per layer and path."""
    model = subject.functional.bind(parameters)
    x, context = model.embed(batch["inputs"], subject.context(batch))
    layers = []
    for index, layer in enumerate(model.unroll()):
        known = context.with_extras(layer=jnp.asarray(index))
        calls = layer.attention_calls(x, known)
        layers.append({path: measure_attention(call, candidates, sinks) for path, call in calls.items()})
        x, added = layer(x, known)
        context = context.pass_on(added.selection)
    return layers


def measure_attention(
    attention: AttentionCall | SelectedCall,
    candidates: tuple[patterns.Pattern, ...],
    sinks: int,
    scores: int = SCORES,
) -> dict[str, Array]:
    """Returns sums over the queries of one row, from tiles of at most `scores` scores.

    Args:
      attention: The arguments of attention, with a batch of one.
      candidates: Patterns without heads.
      sinks: Number of first tokens.
      scores: Largest number of scores in memory.

    Returns:
      `inside` [candidates, h], `sinks` [h], `mass` [h] on keys, `distance` [h], `entropy` [h] in nats, `keys`
      [TOP_P, h], `uniform_distance`, `uniform_entropy` and `uniform_keys` [h] of equal masses, and `queries`.
    """
    call = attention.call if isinstance(attention, SelectedCall) else attention
    (_, t, h, _), s = call.q.shape, call.k.shape[1]
    size = max(1, min(t, scores // (h * s)))
    keys = jnp.arange(s)
    real = jnp.ones(t, bool) if call.segments is None else call.segments[0][0] >= 0

    def measure(start: Array) -> dict[str, Array]:
        positions = start + jnp.arange(size)
        queries = jnp.minimum(positions, t - 1)
        counted = (positions < t) & real[queries]
        p, mask = probabilities(attention, queries)
        distance = abs(queries[:, None] - keys)
        mass = p.sum(axis=-1)
        share = jnp.cumsum(jnp.sort(p, axis=-1, descending=True), axis=-1) / jnp.maximum(mass, 1e-30)[..., None]
        allowed = jnp.maximum(mask.sum(axis=-1), 1)
        values = {
            "inside": jnp.stack([(p * c.allows(queries[:, None], keys, t, s)).sum(axis=-1) for c in candidates]),
            "sinks": p[..., :sinks].sum(axis=-1),
            "mass": mass,
            "distance": (p * distance).sum(axis=-1),
            "entropy": -jax.scipy.special.xlogy(p, p).sum(axis=-1),
            "keys": jnp.stack([1 + (share < top - 1e-6).sum(axis=-1) for top in TOP_P]).astype(jnp.float32),
            "uniform_distance": (mask * distance).sum(axis=-1) / allowed,
            "uniform_entropy": jnp.log(allowed),
            "uniform_keys": allowed.astype(jnp.float32),
        }
        return {name: (value * counted).sum(axis=-1) for name, value in values.items()}

    tiles = jax.lax.map(measure, jnp.arange(0, t, size))
    return {name: value.sum(axis=0) for name, value in tiles.items()} | {"queries": real.sum()}


def probabilities(
    attention: AttentionCall | SelectedCall, queries: Int[Array, " c"]
) -> tuple[Float[Array, "h c s"], Float[Array, "h c s"]]:
    """Returns the probabilities of some queries of a batch of one, and the keys to which they may attend."""
    selected = attention if isinstance(attention, SelectedCall) else None
    call = attention.call if isinstance(attention, SelectedCall) else attention
    (_, t, h, d), (_, s, g, _) = call.q.shape, call.k.shape
    q, k = call.q[0, queries].astype(call.dtype).reshape(-1, g, h // g, d), call.k[0].astype(call.dtype)
    scores = jnp.einsum("cgrd,sgd->grcs", q, k, precision=jax.lax.Precision.HIGHEST).reshape(h, -1, s) * call.scale
    at, keys = queries[:, None], jnp.arange(s)
    slopes = None if call.alibi_slopes is None else call.alibi_slopes[:, None, None]
    scores = add_alibi(softcap(scores, call.softcap), slopes, at - keys)
    scores = scores + log_multiplicity(call.pattern, at, keys, t, s)
    mask = jnp.broadcast_to(call.pattern.allows(at, keys, t, s), scores.shape)
    if call.segments is not None:
        q_ids, k_ids = call.segments
        mask = mask & (q_ids[0, queries][:, None] == k_ids[0])
    if selected is not None:
        counts = selected.count(queries)
        scores = scores if selected.self_score is None else jnp.where(at == keys, selected.self_score, scores)
        scores, mask = scores + jnp.log(jnp.maximum(counts, 1)), mask & (counts > 0)
    sinks = None if call.sink_logits is None else call.sink_logits.astype(call.dtype)[:, None, None]
    return masked_softmax(scores, mask, sinks)[0], mask


def _describe_head(mean: dict[str, np.ndarray], head: int) -> Row:
    row = {
        "sinks": float(mean["sinks"][head]),
        "learned_sink": max(float(1 - mean["mass"][head]), 0.0),
        "distance": float(mean["distance"][head]),
        "uniform_distance": float(mean["uniform_distance"][head]),
        "entropy": float(mean["entropy"][head]),
        "uniform_entropy": float(mean["uniform_entropy"][head]),
    }
    row |= {f"keys_{top:g}": float(mean["keys"][index, head]) for index, top in enumerate(TOP_P)}
    return row | {"uniform_keys": float(mean["uniform_keys"][head])}


def _walk(section: Any, path: Sequence[str]) -> Any:
    for name in path:
        section = section[name] if isinstance(section, Mapping) else getattr(section, name)
    return section


def _replace(section: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of a section in which the key at a path has a value; dataclasses check themselves."""
    if not path:
        return value
    name, *others = path
    changed = {name: _replace(_walk(section, [name]), others, value)}
    return {**section, **changed} if isinstance(section, Mapping) else dataclasses.replace(section, **changed)


def draw_coverage(labels: Sequence[str], shown: Sequence[str], means: Sequence[dict[str, np.ndarray]]) -> Figure:
    """A heat map of layers and heads per candidate."""
    heads = max(len(mean["mass"]) for mean in means)
    is_wide = max(heads, len(labels)) > TEXT_ROWS  # cells without numbers
    width, height = (
        max(1.9, (0.15 if is_wide else 0.3) * heads),
        max(1.4, (0.15 if is_wide else 0.2) * len(labels)) + 0.7,
    )
    columns = max(1, min(len(shown), PANELS_IN_A_ROW, int(12 / width)))
    figure, axes = new_axes(-(-len(shown) // columns), columns, width, height)
    figure.set_figwidth(width * columns + 1.6)
    form = "" if is_wide else "{:.2f}"
    for index, axis in enumerate(axes):
        axis.set_visible(index < len(shown))
        if index < len(shown):
            values = np.full((len(labels), heads), np.nan)
            for row, mean in enumerate(means):
                values[row, : len(mean["mass"])] = mean["inside"][index]
            names = labels if index % columns == 0 else [""] * len(labels)
            image = draw_cells(axis, values, names, [str(head) for head in range(heads)], form, fontsize=5)
            axis.set_xlabel("head")
            note(axis, shown[index])
    figure.colorbar(image, ax=axes, label="mass inside", fraction=0.03)
    return figure


def draw_distance(layers: Sequence[int], means: Sequence[dict[str, np.ndarray]], reach: Sequence[int]) -> Figure:
    """Distance and entropy per layer, a dot per head."""
    figure, (left, right) = new_axes(1, 2, width=4.2)
    for axis, name, label in ((left, "distance", "mean distance (tokens)"), (right, "entropy", "entropy (nats)")):
        for layer, mean in zip(layers, means, strict=True):
            axis.plot([layer] * len(mean[name]), mean[name], "o", color=SERIES[0], markersize=3.5, alpha=0.7)
        uniform = [float(mean[f"uniform_{name}"].mean()) for mean in means]
        axis.plot(layers, uniform, "_", color=SERIES[1], markersize=14, markeredgewidth=1.6, label="equal masses")
        axis.plot([], [], "o", color=SERIES[0], markersize=3.5, label="head")
        axis.set(xlabel="layer", ylabel=label, xticks=thin(sorted(set(layers)), 12))
    left.plot(layers, reach, "_", color=INK, markersize=14, markeredgewidth=1.6, label="reach of the receptive field")
    left.set_yscale("symlog", linthresh=1)  # a head may attend to its own position only
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    left.set_ylim(0, 30 * max(*reach, 1))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=7, loc="upper left")
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    return figure


def draw_keys(labels: Sequence[str], means: Sequence[dict[str, np.ndarray]], n: int) -> Figure:
    """The top-p curve of each layer."""
    figure, (axis,) = new_axes(1, 1, width=6.4)
    named = set(thin(labels, MAX_PANELS))
    for label, mean, color in zip(labels, means, color_depths(len(means)), strict=True):
        style: dict[str, Any] = {"color": color, "label": label if label in named else None}
        axis.plot(TOP_P, mean["keys"].mean(axis=1), marker="o", markersize=3, linewidth=1.2, **style)
        axis.axhline(float(mean["uniform_keys"].mean()), color=color, linestyle=(0, (4, 2)), linewidth=0.9)
    axis.plot([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, label="keys of the pattern")
    use_log(axis, "y")
    axis.set(xlabel="share p of the mass", ylabel="keys per query", ylim=(0.9, 1.3 * n))
    axis.set_yticks([2**power for power in range(0, math.ceil(math.log2(n)) + 1, 2)])
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure
