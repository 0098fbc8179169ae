"""Arrays in, arrays out: no parameters, no configuration."""

from sparsejax.ops.attention import IMPLEMENTATIONS, Implementation, ImplementationError, attend, attend_one, merge
from sparsejax.ops.request import count_bonus, lean
from sparsejax.ops.scan import selective_scan, selective_step
from sparsejax.ops.segment import attend_edges

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "ImplementationError",
    "attend",
    "attend_edges",
    "attend_one",
    "count_bonus",
    "lean",
    "merge",
    "selective_scan",
    "selective_step",
]
