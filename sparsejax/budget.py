"""Runs of equal cost: one setting of each run is adjusted until its account meets a budget.

A budget is `QUANTITY:TARGET`, or `QUANTITY:TARGET:KEY`, where KEY is the setting to adjust: an integer, or a text with
`{}` in place of an integer, such as a pattern "causal & window({})". The quantity must increase with the integer.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import schedule
from sparsejax.account import AccountCache
from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.overrides import LABEL, SEED, Overrides, name_runs, write_overrides, write_value
from sparsejax.runs import Phase, plan_phases


def count_training(phases: Sequence[Phase], accounts: AccountCache) -> float:
    """FLOPs of a training, with those of its teacher.

    Raises:
      InputError: There is no such teacher.
    """
    total = 0.0
    for phase in phases:
        teacher = None
        if phase.config.train.active_teacher:
            from sparsejax.loading import read_teacher  # imports grain and Orbax

            teacher = read_teacher(phase.config)
        total += accounts.training_flops(phase.config, phase.stop - phase.start, teacher)
    return total


# The cost of a run. A model that phases change counts as in the last phase.
QUANTITIES: dict[str, Callable[[Sequence[Phase], AccountCache], float]] = {
    "flops": count_training,
    "flops_per_token": lambda phases, accounts: accounts(phases[-1].config).flops,  # forward
    "parameters": lambda phases, accounts: accounts(phases[-1].config).parameters,
    "active_parameters": lambda phases, accounts: accounts(phases[-1].config).active_parameters,
    "kv": lambda phases, accounts: accounts(phases[-1].config).cache_bytes,  # to decode one sequence
}
MLP_WIDTHS = "MLP widths"  # of all layers, by a common factor
DEFAULT_KEYS = {"flops": "train.steps", "parameters": MLP_WIDTHS, "active_parameters": MLP_WIDTHS}
MULTIPLE = 8  # of MLP widths
FIRST = "first"  # as a target: the cost of the first run
PLACEHOLDER = "{}"
TOLERANCE = 0.05  # largest relative deviation from the target


class BudgetError(InputError):
    """An invalid budget, or one that a run cannot meet."""


class Budget(NamedTuple):
    """A common cost of runs."""

    quantity: str  # a key of QUANTITIES
    target: float | None  # None: the cost of the first run
    key: str | None  # the setting to adjust; None: the MLP widths


class Matched(NamedTuple):
    """A run that meets a budget."""

    overrides: Overrides  # of the run, with the adjusted ones and the label that it has without them
    adjusted: Overrides
    cost: float
    target: float
    quantity: str

    @property
    def deviation(self) -> float:
        """Relative deviation from the target."""
        return self.cost / self.target - 1

    def __str__(self) -> str:
        deviation = f" ({100 * self.deviation:+.2f} %)" if self.deviation else ""
        return f"{self.overrides[LABEL]}: {self.quantity} = {self.cost:.5g}{deviation} with {_write(self.adjusted)}"


def read_match(text: str) -> Budget:
    """Parses `QUANTITY:TARGET[:KEY]`, where the target is a number or `first`."""
    quantity, _, tail = text.partition(":")
    target, _, key = tail.partition(":")
    if quantity not in QUANTITIES:
        raise BudgetError("match", f"write QUANTITY:TARGET[:KEY] with one of {', '.join(QUANTITIES)}, got {text!r}")
    if not key and quantity not in DEFAULT_KEYS:
        raise BudgetError("match", f"{quantity} needs a key to adjust: {quantity}:TARGET:KEY")
    try:
        number = None if target == FIRST else float(target)
    except ValueError:
        number = math.nan
    if number is not None and not (math.isfinite(number) and number > 0):
        raise BudgetError("match", f"the target must be a number above 0 or {FIRST!r}, got {target!r}")
    key = key or DEFAULT_KEYS[quantity]
    return Budget(quantity, number, None if key == MLP_WIDTHS else key)


def match_runs(
    config: str, sweep: Iterable[Overrides], budget: Budget, common: Overrides | None = None
) -> list[Matched]:
    """Adjusts each run of a sweep to a budget, as closely as an integer allows.

    Args:
      config: Source of the configuration, see `config.load`.
      sweep: Overrides per run.
      budget: The common cost.
      common: Overrides of all runs; those of a run take precedence.

    Raises:
      BudgetError: A run stays more than 5 % off, or its configuration is invalid.
      ConfigError: There is no such file or key.
    """
    sweep, common, accounts = list(sweep), common or {}, AccountCache()

    def cost(overrides: Overrides) -> float:
        return QUANTITIES[budget.quantity](plan_phases(_load(config, overrides)), accounts)

    names, labels = name_runs(sweep), name_runs(sweep, {SEED})
    target = budget.target
    if target is None:
        try:
            target = cost({**common, **sweep[0]})
        except ConfigError as error:
            raise BudgetError("match", f"{FIRST}: {names[0]}: {error}") from None
    matched = []
    for overrides, name, label in zip(sweep, names, labels, strict=True):
        adjusted, reached = _match_run(config, {**common, **overrides}, name, budget, target, cost)
        complete = {**overrides, LABEL: overrides.get(LABEL, label), **adjusted}
        matched.append(Matched(complete, adjusted, reached, target, budget.quantity))
    return matched


class _Knob(NamedTuple):
    """An integer of at least 1 to adjust: its first value, and the overrides that set it."""

    start: int
    apply: Callable[[int], Overrides]


def _load(config: str, overrides: Overrides) -> ConfigDict:
    return configs.load(config, {key: value for key, value in overrides.items() if key != LABEL})


def _match_run(
    config: str, overrides: Overrides, name: str, budget: Budget, target: float, cost: Callable[[Overrides], float]
) -> tuple[Overrides, float]:
    """The adjusted overrides of a run, and its cost with them."""
    settings = _load(config, overrides)
    knob = _widths_knob(settings, name) if budget.key is None else _key_knob(settings, budget.key, name)

    @functools.cache
    def value(number: int) -> float:
        adjusted = knob.apply(number)
        try:
            return cost({**overrides, **adjusted})
        except ConfigError as error:
            raise BudgetError("match", f"{name}: with {_write(adjusted)}: {error}") from None

    number = find_nearest(value, knob.start, target)
    adjusted, reached = knob.apply(number), value(number)
    if abs(reached / target - 1) > TOLERANCE:
        problem = f"{name}: cannot reach {budget.quantity} = {target:.5g}; the nearest is {reached:.5g}"
        raise BudgetError("match", f"{problem} with {_write(adjusted)}")
    return adjusted, reached


def _write(overrides: Overrides) -> str:
    return ", ".join(write_overrides(overrides))


def _widths_knob(settings: ConfigDict, name: str) -> _Knob:
    """All MLP widths of the schedule's layers, by a common factor; the integer is the largest width over MULTIPLE."""
    layers = settings.model.layers
    widths: dict[str, int] = {}
    for layer in dict.fromkeys(schedule.parse(settings.model.schedule)):
        mlp = layers[layer].mlp or {}
        widths |= {f"model.layers.{layer}.mlp.{key}": mlp[key] for key in ("width", "shared_width") if mlp.get(key)}
    if not widths:
        raise BudgetError("match", f"{name}: no layer has an MLP; name a key to adjust")
    largest = max(widths.values())
    return _Knob(
        max(1, round(largest / MULTIPLE)),
        lambda number: {key: MULTIPLE * max(1, round(number * width / largest)) for key, width in widths.items()},
    )


def _key_knob(settings: ConfigDict, key: str, name: str) -> _Knob:
    """A key that holds an integer, or a text with a placeholder."""
    configs.override(ConfigDict(settings.to_dict()), {key: "0"})  # rejects an unknown key
    value: Any = functools.reduce(operator.getitem, key.split("."), settings)
    if type(value) is int:
        return _Knob(max(1, value), lambda number: {key: number})
    if isinstance(value, str) and PLACEHOLDER in value:
        return _Knob(1, lambda number: {key: value.replace(PLACEHOLDER, str(number))})
    problem = f"{key} is {write_value(value)!r}; only an integer or a text with {PLACEHOLDER} can be adjusted"
    raise BudgetError("match", f"{name}: {problem}")


def find_nearest(value: Callable[[int], float], start: int, target: float) -> int:
    """Returns the integer, at least 1, at which an increasing function is nearest to the target; the first of several.

    Beyond a plateau the search does not look further. After the target is bracketed, steps alternate between the secant
    and the middle of the bracket, because `value` is expensive and often linear.

    Raises:
      BudgetError: The function decreases.
    """
    low = high = start
    while value(high) < target:
        low, high = high, 2 * high
        _require_increase(value, low, high)
        if value(high) == value(low):
            high = low
            break
    while low > 1 and value(low) > target:
        low, high = low // 2, low
        _require_increase(value, low, high)
    secant = True
    while high - low > 1 and value(low) < target:
        share = (target - value(low)) / (value(high) - value(low)) if secant else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if value(middle) < target else (low, middle)
        secant = not secant
    return min((low, high), key=lambda number: abs(value(number) - target))


def _require_increase(value: Callable[[int], float], low: int, high: int) -> None:
    if value(high) < value(low):
        problem = f"the quantity falls from {value(low):.5g} to {value(high):.5g} while the key increases"
        raise BudgetError("match", problem)
