"""The meaning of each op in plain torch: clear before fast, any device, float64 included.

The fast backends are tested against these functions, and :mod:`pruneops.backends` falls back to them.
"""

from pruneops.reference.attention import (
    column_scores,
    decode_attention,
    kv_limit_from_positions,
    last_query_scores,
    varlen_attention,
)
from pruneops.reference.compaction import gather_rows, scatter_rows, select_compact
from pruneops.reference.selection import segment_threshold, segment_topk

__all__ = [
    "column_scores",
    "decode_attention",
    "gather_rows",
    "kv_limit_from_positions",
    "last_query_scores",
    "scatter_rows",
    "segment_threshold",
    "segment_topk",
    "select_compact",
    "varlen_attention",
]
