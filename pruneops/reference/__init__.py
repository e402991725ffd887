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
from pruneops.reference.clustering import DPCKNNResult, dpc_knn, merge_mean, position_means
from pruneops.reference.compaction import gather_rows, scatter_rows, scatter_scaled, select_compact
from pruneops.reference.policy import policy_attention
from pruneops.reference.routing import router_weights
from pruneops.reference.selection import segment_threshold, segment_topk

__all__ = [
    "DPCKNNResult",
    "column_scores",
    "decode_attention",
    "dpc_knn",
    "gather_rows",
    "kv_limit_from_positions",
    "last_query_scores",
    "merge_mean",
    "position_means",
    "policy_attention",
    "router_weights",
    "scatter_rows",
    "scatter_scaled",
    "segment_threshold",
    "segment_topk",
    "select_compact",
    "varlen_attention",
]
