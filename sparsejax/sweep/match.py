"""Runs matched by a budget: the account counts what they take, and one of their settings is turned until it fits.

A budget is `QUANTITY:TARGET`, or `QUANTITY:TARGET:KEY` where KEY is what is turned: a whole number, or a text with `{}`
in it, such as a pattern "causal & window({})", where the number is put. The quantity must rise with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import schedule
from sparsejax.account import Account, account_model
from sparsejax.config import Config, ConfigError
from sparsejax.sweep.axes import LABEL, SEED, Overrides, SweepError
from sparsejax.sweep.runs import Run, describe_runs, write_settings, write_value
from sparsejax.train import Phase

Count = Callable[[Config], Account]  # the account of a config's model over one sequence of `data.length` tokens


def count_training_flops(phases: Sequence[Phase], count: Count, steps: int) -> float:
    """FLOPs of the first steps of a run, phase by phase."""
    flops = 0.0
    for phase in phases:
        own = min(max(steps - phase.start, 0), phase.stop - phase.start)
        flops += own * phase.config.train.batch * phase.config.data.length * count(phase.config).training_flops
    return flops


# What a run takes; of a model that phases change, what it takes as the last phase has it.
QUANTITIES: dict[str, Callable[[Sequence[Phase], Count], float]] = {
    "flops": lambda phases, count: count_training_flops(phases, count, phases[-1].stop),  # of the whole training
    "flops_per_token": lambda phases, count: count(phases[-1].config).flops,  # forward
    "parameters": lambda phases, count: count(phases[-1].config).parameters,
    "active_parameters": lambda phases, count: count(phases[-1].config).active_parameters,
    "kv": lambda phases, count: count(phases[-1].config).cache_bytes,  # to decode one sequence
}
WIDTHS = "feed-forward widths"  # of all layers, by one factor
TURNED = {"flops": "train.steps", "parameters": WIDTHS, "active_parameters": WIDTHS}  # where no key is given
MULTIPLE = 8  # of feed-forward widths
FIRST = "first"  # as a target: what the first run takes as it is
HOLE = "{}"  # where a text is turned
REACH = 0.05  # how far off, as a share of the target, a run may stay


@dataclasses.dataclass(frozen=True)
class Match:
    """What all runs are to take the same of.

    Attributes:
      quantity: One of QUANTITIES.
      target: How much; None for what the first run takes.
      key: What is turned; None for the feed-forward widths.
    """

    quantity: str
    target: float | None
    key: str | None


class Matched(NamedTuple):
    """A run that was matched.

    Attributes:
      overrides: Its own and what was turned; its label is what it would be without.
      turned: What was turned, alone.
      reached: What it takes.
      target: What it was to take.
      quantity: Of what.
    """

    overrides: Overrides
    turned: Overrides
    reached: float
    target: float
    quantity: str

    @property
    def off(self) -> float:
        """How far off it stays, as a share of the target."""
        return self.reached / self.target - 1

    def __str__(self) -> str:
        how_far = f"{100 * self.off:+.2f} % off" if self.off else "exactly"
        return f"{self.overrides[LABEL]}: {self.reached:.5g} {self.quantity}, {how_far}, with {_write(self.turned)}"


def read_match(text: str) -> Match:
    """Reads `QUANTITY:TARGET[:KEY]`; the target is a number, or `first`.

    Raises:
      SweepError: it cannot be read.
    """
    quantity, _, rest = text.partition(":")
    target, _, key = rest.partition(":")
    if quantity not in QUANTITIES:
        raise SweepError(f"--match: QUANTITY:TARGET[:KEY], of {', '.join(QUANTITIES)}, got {text!r}")
    if not key and quantity not in TURNED:
        raise SweepError(f"--match: {quantity} needs a key that is turned: {quantity}:TARGET:KEY")
    try:
        number = None if target == FIRST else float(target)
    except ValueError:
        number = math.nan
    if number is not None and not (math.isfinite(number) and number > 0):
        raise SweepError(f"--match: the target is a number above 0, or {FIRST}, got {target!r}")
    key = key or TURNED[quantity]
    return Match(quantity, number, None if key == WIDTHS else key)


def match_runs(config: str, sweep: Iterable[Overrides], match: Match, given: Overrides | None = None) -> list[Matched]:
    """Each run of a sweep turned until it takes what the budget says, as nearly as a whole number allows.

    Args:
      config: the config's place, `FILE` or `FILE:ARGUMENT`.
      sweep: the overrides of each run.
      match: the budget.
      given: overrides of all runs, which a run may set anew.

    Raises:
      SweepError: a run that stays more than 5 % off, or one that its config refuses.
      ConfigError: no such config or key.
    """
    sweep, given, count = list(sweep), given or {}, remember_accounts()

    def take(overrides: Overrides) -> float:
        return QUANTITIES[match.quantity](_make_run(config, overrides).phases, count)

    names, labels = describe_runs(sweep), describe_runs(sweep, {SEED})
    if match.target is None and sweep:
        try:
            match = dataclasses.replace(match, target=take({**given, **sweep[0]}))
        except ConfigError as error:
            raise SweepError(f"--match: {FIRST}: {names[0]}: {error}") from None
    found = []
    for one, name, label in zip(sweep, names, labels, strict=True):
        turned, reached = _match_run(_make_run(config, {**given, **one}), name, match, take)
        overrides = {**one, LABEL: one.get(LABEL, label), **turned}
        found.append(Matched(overrides, turned, reached, match.target, match.quantity))
    return found


def remember_accounts() -> Count:
    """A function that gives the account of a config's model over `data.length` tokens, and counts each model once."""
    known: dict[str, Account] = {}

    def count(config: Config) -> Account:
        key = repr((config.model, config.data.length))
        if key not in known:
            layers, rest = account_model(config.model, config.data.length)
            known[key] = functools.reduce(operator.add, layers, rest)
        return known[key]

    return count


class _Knob(NamedTuple):
    """The whole number, of at least 1, that a run is turned by: where it stands, and the overrides that set it."""

    start: int
    turn: Callable[[int], Overrides]


def _make_run(config: str, overrides: Overrides) -> Run:
    return Run(config, tuple(sorted((key, value) for key, value in overrides.items() if key != LABEL)), "")


def _match_run(run: Run, name: str, match: Match, take: Callable[[Overrides], float]) -> tuple[Overrides, float]:
    """What is turned of a run, and what it takes then."""
    knob = _widths(run.settings, name) if match.key is None else _key(run.settings, match.key, name)

    @functools.cache
    def value(number: int) -> float:
        turned = knob.turn(number)
        try:
            return take({**dict(run.overrides), **turned})
        except ConfigError as error:
            raise SweepError(f"--match: {name}: with {_write(turned)}: {error}") from None

    number = find_nearest(value, knob.start, match.target)
    turned, reached = knob.turn(number), value(number)
    if abs(reached / match.target - 1) > REACH:
        raise SweepError(
            f"--match: {name}: cannot take {match.target:.5g} {match.quantity}; the nearest is {reached:.5g}, with"
            f" {_write(turned)}"
        )
    return turned, reached


def _write(turned: Overrides) -> str:
    return ", ".join(write_settings(turned.items()))


def _widths(settings: ConfigDict, name: str) -> _Knob:
    """All feed-forward widths of the schedule's layers by one factor; the number is the widest, in multiples."""
    layers, widths = settings.model.layers, {}
    for layer in dict.fromkeys(schedule.parse(settings.model.schedule)):
        mlp = layers[layer].mlp or {}
        widths |= {f"model.layers.{layer}.mlp.{key}": mlp[key] for key in ("width", "shared_width") if mlp.get(key)}
    if not widths:
        raise SweepError(f"--match: {name}: no layer has a feed-forward part; name a KEY to turn")
    widest = max(widths.values())
    return _Knob(
        max(1, round(widest / MULTIPLE)),
        lambda number: {key: MULTIPLE * max(1, round(number * width / widest)) for key, width in widths.items()},
    )


def _key(settings: ConfigDict, key: str, name: str) -> _Knob:
    """A key that is a whole number, or a text with a hole."""
    configs.override(ConfigDict(settings.to_dict()), key, "0")  # complains of a key that is none
    value: Any = functools.reduce(operator.getitem, key.split("."), settings)
    if type(value) is int:
        return _Knob(max(1, value), lambda number: {key: number})
    if isinstance(value, str) and HOLE in value:
        return _Knob(1, lambda number: {key: value.replace(HOLE, str(number))})
    raise SweepError(
        f"--match: {name}: {key}: is {write_value(value)!r}; only a whole number, or a text with {HOLE}, can be turned"
    )


def find_nearest(value: Callable[[int], float], start: int, target: float) -> int:
    """The whole number, of at least 1, at which a rising `value` is nearest to the target; the first of several.

    Where `value` no longer rises, that is the last number considered. Each step takes the middle of what is left, or
    where a straight line between its ends hits the target, in turn: `value` takes its time, and is often straight.

    Raises:
      SweepError: it falls.
    """
    low = high = start
    while value(high) < target:
        low, high = high, 2 * high
        _require_rise(value, low, high)
        if value(high) == value(low):
            high = low
            break
    while low > 1 and value(low) > target:
        low, high = low // 2, low
        _require_rise(value, low, high)
    straight = True
    while high - low > 1 and value(low) < target:
        share = (target - value(low)) / (value(high) - value(low)) if straight else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if value(middle) < target else (low, middle)
        straight = not straight
    return min((low, high), key=lambda number: abs(value(number) - target))


def _require_rise(value: Callable[[int], float], low: int, high: int) -> None:
    if value(high) < value(low):
        raise SweepError(f"--match: the quantity falls from {value(low):.5g} to {value(high):.5g} as the key rises")
