"""Groups of parameters by the patterns of their paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from sparsejax.config import GroupConfig, OptimizerConfig
from sparsejax.errors import InputError
from sparsejax.model import path_of

LORA = "lora"  # key of the factors of low-rank updates in the tree of parameters
FROZEN, OTHERS = "frozen", "others"  # labels of parameters that are not trained, and of those in no group


def assign_groups(config: OptimizerConfig, parameters: PyTree) -> PyTree[str] | None:
    """Returns the label of the group of each parameter: its index in `config.groups`, `FROZEN` or `OTHERS`.

    With `config.lora`, parameters other than the factors are frozen, unless `config.lora.also` matches them.

    Args:
      config: The groups.
      parameters: A tree with a leaf per parameter.

    Returns:
      A tree of labels; None without groups.

    Raises:
      InputError: A pattern matches no parameter, or every parameter is frozen.
    """
    frozen = [("freeze", pattern, FROZEN) for pattern in split_patterns(config.freeze)]
    rules = frozen + [
        (f"groups[{index}].match", pattern, FROZEN if group.freeze else str(index))
        for index, group in enumerate(config.groups)
        for pattern in split_patterns(group.match)
    ]
    if not rules and config.lora is None:
        return None
    also = [] if config.lora is None else split_patterns(config.lora.also)
    paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(parameters)]
    for argument, pattern, _ in [*rules, *(("lora.also", pattern, OTHERS) for pattern in also)]:
        if not fnmatch.filter(paths, pattern):
            raise InputError(f"optimizer.{argument}", f"{pattern!r} matches no parameter, such as {paths[0]}")

    def find_label(path: str) -> str:
        is_trained = config.lora is None or path.startswith(f"{LORA}.") or _matches(path, also)
        return _find_label(rules, path) if is_trained else FROZEN

    labels = jax.tree.map_with_path(lambda path, _: find_label(path_of(path)), parameters)
    if set(jax.tree.leaves(labels)) == {FROZEN}:
        raise InputError("optimizer.freeze", "every parameter is frozen")
    return labels


def group_of(config: OptimizerConfig, label: str) -> GroupConfig:
    """Returns the group of a label other than `FROZEN`."""
    return GroupConfig("*") if label == OTHERS else config.groups[int(label)]


def find_frozen(config: OptimizerConfig, parameters: PyTree) -> PyTree[bool]:
    """Returns whether each parameter is frozen."""
    labels = assign_groups(config, parameters)
    return jax.tree.map(lambda _: False, parameters) if labels is None else jax.tree.map(FROZEN.__eq__, labels)


def map_parameters(
    function: Callable[[Any, Any], Any], state: PyTree, parameters: PyTree, others: Callable[[Any], Any]
) -> PyTree:
    """Maps the leaves of an optimizer's state.

    Args:
      function: Applied to a leaf that belongs to a parameter, as its path ends in the path of that parameter, and to
        the leaf of the parameter.
      state: State of the optimizer, in which statistics of parameters are trees like the parameters, also with parts
        masked.
      parameters: Any tree like the parameters.
      others: Applied to the other leaves, such as counters.
    """
    leaves = dict(jax.tree.leaves_with_path(parameters))

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        for start in range(len(path)):
            if path[start:] in leaves:
                return function(leaf, leaves[path[start:]])
        return others(leaf)

    return jax.tree.map_with_path(visit, state)


def split_patterns(patterns: str) -> list[str]:
    """Returns the patterns of a text that separates them by commas."""
    return [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]


def _find_label(rules: Sequence[tuple[str, str, str]], path: str) -> str:
    return next((label for _, pattern, label in rules if fnmatch.fnmatchcase(path, pattern)), OTHERS)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
