"""Arrays in, arrays out: no parameters, no configuration."""

from sparsejax.ops.attention import IMPLEMENTATIONS, Implementation, ImplementationError, attend, attend_one, merge
from sparsejax.ops.conv import causal_conv
from sparsejax.ops.delta import delta_rule, delta_step
from sparsejax.ops.linear_scan import linear_scan, linear_step
from sparsejax.ops.lsh import attend_hashed, attend_hashed_one, hash_buckets
from sparsejax.ops.request import count_bonus, lean
from sparsejax.ops.scan import selective_scan, selective_step
from sparsejax.ops.segment import attend_edges
from sparsejax.ops.selection import attend_selected, index_scores, select_keys, top_keys
from sparsejax.ops.ssd import ssd, ssd_step

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "ImplementationError",
    "attend",
    "attend_edges",
    "attend_hashed",
    "attend_hashed_one",
    "attend_one",
    "attend_selected",
    "causal_conv",
    "count_bonus",
    "delta_rule",
    "delta_step",
    "hash_buckets",
    "index_scores",
    "lean",
    "linear_scan",
    "linear_step",
    "merge",
    "select_keys",
    "selective_scan",
    "selective_step",
    "ssd",
    "ssd_step",
    "top_keys",
]
