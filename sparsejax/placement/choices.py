"""What the attention layers of a trained model can become, and what it costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsejax import patterns, schedule
from sparsejax.account import Account, account_model
from sparsejax.analysis.attention import Attention, AttentionOptions
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError, suggest
from sparsejax.loaded import LoadedModel
from sparsejax.model import restack
from sparsejax.placement.search import Costs, Placement

FULL, HEADS = "full", "heads:"
FORMS = "full, window:TOKENS, sinks:TOKENS:SINKS, heads:SHARE or a pattern"
QUANTITIES = {"kv": "cache_bytes", "pairs": "pairs", "flops": "flops"}  # field of the account by name of the budget
HEADS_KEY = re.compile(r"layers\.(.+)\.mixer\.pattern")
ROUNDING = 1e-9  # relative, in sums of costs


class Choice(NamedTuple):
    """What a layer becomes.

    Attributes:
      label: The choice as it was written, such as "window:512".
      pattern: Pattern of the layer.
      cost: Cost of the layer.
    """

    label: str
    pattern: str
    cost: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """The model with a name per layer, and the choices of each layer whose attention can change.

    Attributes:
      model: The model, in which the layer `i` of the name `full` has the name `full_i`.
      names: Name of each layer in the source.
      layers: Choices by the index of the layer, in ascending order of their cost.
      quantity: What the budget counts.
      fixed: Cost of the rest of the model.
      budget: Largest cost.
      length: Tokens per sequence of the account.
    """

    model: LoadedModel
    names: tuple[str, ...]
    layers: Mapping[int, Sequence[Choice]]
    quantity: str
    fixed: float
    budget: float
    length: int

    @property
    def costs(self) -> Costs:
        """The costs of the choices."""
        costs = [[choice.cost for choice in choices] for choices in self.layers.values()]
        return Costs(costs, self.budget * (1 + ROUNDING) - self.fixed)

    @property
    def source(self) -> Placement:
        """The placement in which every layer is as it is."""
        labels = ([choice.label for choice in choices] for choices in self.layers.values())
        return tuple(names.index(FULL) for names in labels)

    def cost(self, placement: Placement) -> float:
        """The quantity of the whole model under a placement."""
        return self.costs.total(placement) + self.fixed

    def label(self, placement: Placement) -> dict[int, str]:
        """The choice of each layer, by its index."""
        return {
            layer: choices[choice].label
            for (layer, choices), choice in zip(self.layers.items(), placement, strict=True)
        }

    def configure(self, placement: Placement) -> ModelConfig:
        """The model under a placement, with a name per layer."""
        layers = dict(self.model.config.layers)
        for (layer, choices), choice in zip(self.layers.items(), placement, strict=True):
            name = self.model.config.names[layer]
            layers[name] = with_pattern(layers[name], choices[choice].pattern)
        return dataclasses.replace(self.model.config, layers=layers)

    def write(self, placement: Placement) -> tuple[str, dict[str, Any]]:
        """The schedule of a placement, and its layers by name. Layers that stay as they are keep their names."""
        labels, config = self.label(placement), self.configure(placement)
        names: list[str] = []
        layers: dict[str, Any] = {}
        for index, name in enumerate(self.names):
            label = labels.get(index, FULL)
            section = config.layers[config.names[index]]
            base = name if label == FULL else f"{name}_{re.sub(r'[^A-Za-z0-9]+', '_', label).strip('_')}"
            variants = [base, *(f"{base}_{number}" for number in range(2, index + 2))]
            names.append(next(variant for variant in variants if layers.setdefault(variant, section) == section))
        return schedule.write(names), layers

    def account(self, placement: Placement) -> float:
        """The quantity of the whole model under a placement, as the account counts it."""
        layers, ends = account_model(self.configure(placement), self.length)
        return sum(read_quantity(account, self.quantity) for account in [*layers, ends])


def read_quantity(account: Account, quantity: str) -> float:
    """A quantity of an account."""
    return float(getattr(account, QUANTITIES[quantity]))


def read_budget(text: str) -> tuple[str, float]:
    """Parses `QUANTITY:TARGET`; a target of at most 1 is a fraction of the cost of the source."""
    quantity, _, target = text.partition(":")
    if quantity not in QUANTITIES:
        raise InputError("budget", f"{text!r}: expected QUANTITY:TARGET; {suggest(quantity, QUANTITIES, 'quantities')}")
    try:
        number = float(target)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError("budget", f"{text!r}: the target {target!r} is not a number above 0")
    return quantity, number


def split_labels(text: str) -> list[str]:
    """Splits choices at the commas outside of parentheses."""
    labels = [part.strip() for part in re.findall(r"(?:[^,(]|\((?:[^()]|\([^()]*\))*\))+", text)]
    labels = [label for label in labels if label]
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise InputError("layers", f"{text!r}: expected two or more different choices of {FORMS}")
    if FULL not in labels:
        raise InputError("layers", f"{text!r}: lacks {FULL}, the layer as it is, which the others are compared with")
    return labels


def name_layers(model: LoadedModel) -> LoadedModel:
    """The model with a name per layer, so that layers can differ."""
    config = model.config
    names = [f"{name}_{index}" for index, name in enumerate(config.names)]
    layers = {unique: config.layers[name] for unique, name in zip(names, config.names, strict=True)}
    named = dataclasses.replace(config, schedule=" ".join(names), layers=layers, scan=False)
    return LoadedModel(named, restack(model.parameters, config, named), model.source)


def plan_choices(
    model: LoadedModel, labels: Sequence[str], budget: str, length: int, data: Mapping[str, Any]
) -> Choices:
    """Plans the choices of the layers with attention.

    Args:
      model: A trained model.
      labels: The choices, see `FORMS`. A pattern applies within that of the layer.
      budget: `QUANTITY:TARGET`, see `read_budget`.
      length: Tokens per sequence, for the account.
      data: Keys of the section data, for the analysis of `heads:SHARE`.

    Raises:
      InputError: A choice or the budget is invalid, no layer has attention, or no placement meets the budget.
    """
    quantity, target = read_budget(budget)
    named = name_layers(model)
    options_by_layer = _find_patterns(named, labels, length, data)
    costs = _count_costs(named.config, options_by_layer, quantity, length)
    layers = {
        index: sorted(
            (Choice(label, pattern, costs[label][index]) for label, pattern in options.items()),
            key=lambda choice: choice.cost,
        )
        for index, options in options_by_layer.items()
    }
    source, ends = account_model(model.config, length)
    total = sum(read_quantity(account, quantity) for account in [*source, ends])
    fixed = total - sum(read_quantity(source[index], quantity) for index in layers)
    limit = target * total if target <= 1 else target
    choices = Choices(named, model.config.names, layers, quantity, fixed, limit, length)
    least = choices.cost((0,) * len(layers))
    if least > limit * (1 + ROUNDING):
        problem = f"{budget}: {limit:,.0f} is below {least:,.0f}, the cost of the cheapest placement"
        raise InputError("budget", f"{problem}, which is {least / total:.3g} of the source's {total:,.0f}")
    return choices


def _find_patterns(
    model: LoadedModel, labels: Sequence[str], length: int, data: Mapping[str, Any]
) -> dict[int, dict[str, str]]:
    """The pattern of each choice, by the index of each layer that has attention."""
    config = model.config
    attending = {index: name for index, name in enumerate(config.names) if _can_change(config.layers[name].mixer)}
    texts = {label: _read_pattern(label, config, length) for label in labels if not label.startswith(HEADS)}
    heads = _choose_heads(model, [label for label in labels if label.startswith(HEADS)], texts, data)
    choices = {}
    for index, name in attending.items():
        choices[index] = {FULL: str(config.layers[name].mixer.connectivity)}  # type: ignore[union-attr]
        for label in labels:
            pattern = heads[label].get(name) if label in heads else _restrict(config, name, texts[label], length)
            if pattern is not None and pattern not in choices[index].values():
                choices[index][label] = pattern
    choices = {index: patterns_by_label for index, patterns_by_label in choices.items() if len(patterns_by_label) > 1}
    if not choices:
        problem = "no layer can change: shared blocks and mixers that select their keys stay as they are"
        raise InputError("layers", f"{', '.join(labels)}: {problem}")
    return choices


def _can_change(mixer: Any) -> bool:
    return hasattr(mixer, "pattern") and not mixer.selects


def with_pattern(layer: Any, pattern: str) -> Any:
    """A copy of the section of a layer with another pattern."""
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, pattern=pattern))


def _read_pattern(label: str, config: ModelConfig, length: int) -> patterns.Pattern | None:
    """The pattern of a choice for one head; None for that of the layer."""
    if label == FULL:
        return None
    kind, *numbers = label.split(":")
    if kind in ("window", "sinks"):
        if len(numbers) != (1 if kind == "window" else 2) or not all(number.isdecimal() for number in numbers):
            raise InputError("layers", f"{label!r}: expected {FORMS}")
        keys = int(numbers[0])
        if keys < 1:
            raise InputError("layers", f"{label!r}: {keys} tokens are below 1")
        window = f"window({keys - 1})" if config.causal else f"window({keys // 2}, {keys // 2})"
        label = window if kind == "window" else f"{window} | sink({numbers[1]})"
    try:
        pattern = patterns.parse(label, length)
    except patterns.PatternError as error:
        raise InputError("layers", f"{error.problem}; expected {FORMS}") from None
    return patterns.And.of(patterns.Causal(), pattern) if config.causal and pattern.lookahead() > 0 else pattern


def _restrict(config: ModelConfig, name: str, pattern: patterns.Pattern | None, length: int) -> str:
    """The pattern of a layer within another one."""
    current = config.layers[name].mixer.connectivity  # type: ignore[union-attr]
    if pattern is None or not (current - pattern).pairs(length):
        return str(current)
    return str(pattern if not (pattern - current).pairs(length) else patterns.And.of(current, pattern))


def _choose_heads(
    model: LoadedModel, labels: Sequence[str], texts: Mapping[str, patterns.Pattern | None], data: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Per choice `heads:SHARE`, the pattern of each layer whose heads keep that share of their attention."""
    candidates = [str(pattern) for pattern in texts.values() if pattern is not None]
    lines: dict[str, dict[str, str]] = {}
    for label in labels:
        try:
            share = float(label.removeprefix(HEADS))
        except ValueError:
            raise InputError("layers", f"{label!r}: expected {FORMS}") from None
        if not candidates:
            raise InputError("layers", f"{label!r}: the heads choose from the patterns of the other choices; add one")
        options = AttentionOptions(patterns="; ".join(candidates), tau=share)
        analysis = Attention(model, data, options)
        chosen = analysis.choose([analysis.measure(unit) for unit in analysis.units])
        lines[label] = {match[1]: line for key, line in chosen.items() if (match := HEADS_KEY.fullmatch(key))}
    return lines


def _count_costs(
    config: ModelConfig, options_by_layer: Mapping[int, Mapping[str, str]], quantity: str, length: int
) -> dict[str, dict[int, float]]:
    """The cost of each layer by choice: one account per choice, of the model in which all layers have it."""
    costs: dict[str, dict[int, float]] = {}
    for label in dict.fromkeys(label for options in options_by_layer.values() for label in options):
        chosen = {index: options[label] for index, options in options_by_layer.items() if label in options}
        names = {config.names[index]: pattern for index, pattern in chosen.items()}
        layers = {
            name: with_pattern(layer, names[name]) if name in names else layer for name, layer in config.layers.items()
        }
        accounts, _ = account_model(dataclasses.replace(config, layers=layers), length)
        costs[label] = {index: read_quantity(accounts[index], quantity) for index in chosen}
    return costs
