"""A pattern and a recipe of a user, in a file outside the package."""

import dataclasses
from typing import ClassVar

from sparsejax import patterns


@patterns.register
@dataclasses.dataclass(frozen=True)
class Older(patterns.Pattern):
    """A query attends to the oldest `1 / share` of its past."""

    name: ClassVar[str] = "older"
    share: int

    def __post_init__(self):
        patterns.require(self, share=1)

    def allows(self, q, k, t=None, s=None):
        return k * self.share <= q

    def bounds(self, grid):
        first, last = (position // self.share + 1 for position in grid.row_bounds())
        return patterns.from_ranges(grid, any_key=(0 * last, last), every_key=(0 * first, first))


@patterns.register
def older_or_near(share: int, w: int = 8) -> patterns.Pattern:
    """The oldest part of the past, and a window of `w` keys."""
    return patterns.parse(f"causal & (older({share}) | window({w - 1}))")
