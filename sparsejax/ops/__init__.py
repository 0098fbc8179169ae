"""Arrays in, arrays out: no parameters, no configuration."""

from sparsejax.ops.attention import (
    IMPLEMENTATIONS,
    Implementation,
    ImplementationError,
    attend,
    attention_flops,
)
from sparsejax.ops.cached import attend_cached, attend_cached_selection
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import CHUNK
from sparsejax.ops.conv import causal_conv
from sparsejax.ops.delta import delta_rule
from sparsejax.ops.entries import attend_entries, close_windows, compress_windows
from sparsejax.ops.indexer import Index, indexer_divergence, select_indexed
from sparsejax.ops.linear_scan import linear_scan
from sparsejax.ops.lsh import attend_hashed, decode_attend_hashed, hash_buckets, hashed_pairs
from sparsejax.ops.recall import measure_selection
from sparsejax.ops.scan import selective_scan
from sparsejax.ops.segment import attend_edges
from sparsejax.ops.selection import Selection, choose, select
from sparsejax.ops.selectors import infllm, moba, nsa, nsa_pairs, route, top_tiles, top_tokens
from sparsejax.ops.softmax import add_alibi, log_multiplicity, merge_lse
from sparsejax.ops.ssd import ssd

__all__ = [
    "CHUNK",
    "IMPLEMENTATIONS",
    "AttentionCall",
    "Implementation",
    "ImplementationError",
    "Index",
    "Selection",
    "add_alibi",
    "attend",
    "attend_cached",
    "attend_cached_selection",
    "attend_edges",
    "attend_entries",
    "attend_hashed",
    "attention_flops",
    "causal_conv",
    "choose",
    "close_windows",
    "compress_windows",
    "decode_attend_hashed",
    "delta_rule",
    "hash_buckets",
    "hashed_pairs",
    "indexer_divergence",
    "infllm",
    "linear_scan",
    "log_multiplicity",
    "measure_selection",
    "merge_lse",
    "moba",
    "nsa",
    "nsa_pairs",
    "route",
    "select",
    "select_indexed",
    "selective_scan",
    "ssd",
    "top_tiles",
    "top_tokens",
]
