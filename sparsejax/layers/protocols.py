"""What a mixer, its config and a feed-forward part must provide.

A new mixer is one file, with a config and a module that satisfy these protocols, and one line in `mixers.MIXERS`.
`tests/layers/test_mixers.py` holds every mixer to them.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.stream import Cost
from sparsejax.ops import IMPLEMENTATIONS

Cache = dict[str, Any]  # arrays [b, ...] by name, or caches by name
Losses = dict[str, Float[Array, ""]]  # weighted losses by name


@runtime_checkable
class Mixer(Protocol):
    """A module through which tokens read from each other."""

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        ...

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache before the first of `length` tokens."""
        ...

    def step(
        self, x: Float[Array, "b m"], cache: Cache, position: Int[Array, ""], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b m"], Cache]:
        """Mixes the token at `position`; returns its output, equal to that of `__call__`, and the next cache."""
        ...

    def cost(self, length: int) -> Cost:
        """Returns the cost over `length` tokens."""
        ...


@runtime_checkable
class FeedForward(Protocol):
    """A module that transforms every token by itself."""

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Losses]:
        """Returns the output and the auxiliary losses."""
        ...

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        ...


@runtime_checkable
class MixerConfigProtocol(Protocol):
    """The frozen dataclass that describes a mixer."""

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        ...

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from."""
        ...

    def check(self, length: int) -> None:
        """Raises InputError, with the path of the argument, if the mixer cannot run on `length` tokens."""
        ...


class UnpatternedConfig:
    """Base of the configs of mixers without a pattern: a position reads from its whole past, at any length."""

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from."""
        return patterns.Causal()

    def check(self, length: int) -> None:
        """Accepts every length."""


def parse_pattern(text: str | patterns.Pattern, heads: int, length: int | None = None) -> patterns.Pattern:
    """Parses the `pattern` argument of an attention mixer.

    Raises:
      InputError: The text does not parse, does not fit `length`, or describes another number of heads.
    """
    try:
        pattern = patterns.parse(text, length)
    except patterns.PatternError as error:
        raise InputError("pattern", error.problem) from error
    if pattern.heads not in (None, heads):
        raise InputError("pattern", f"{str(text)!r} describes {pattern.heads} heads, but heads = {heads}")
    return pattern


def implementation_names() -> tuple[str, ...]:
    """Values of the argument `impl` of attention mixers."""
    return "auto", *(implementation.name for implementation in IMPLEMENTATIONS)
