"""The functional API: checked, differentiable where that has a meaning, traceable by ``torch.compile``."""

from pruneops.ops import _autograd, _fake  # noqa: F401  (imported for what they register)
from pruneops.ops.attention import (
    column_scores,
    decode_attention,
    kv_limit_from_positions,
    last_query_scores,
    varlen_attention,
)
from pruneops.ops.clustering import DPCKNNResult, dpc_knn, merge_mean, position_means
from pruneops.ops.compaction import gather_rows, scatter_rows, scatter_scaled, select_compact
from pruneops.ops.policy import policy_attention
from pruneops.ops.routing import router_weights
from pruneops.ops.selection import segment_threshold, segment_topk

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
