"""The functional API: checked, differentiable where that has a meaning, traceable by ``torch.compile``."""

from pruneops.ops import _autograd, _fake  # noqa: F401  (imported for what they register)
from pruneops.ops.attention import (
    column_scores,
    decode_attention,
    kv_limit_from_positions,
    last_query_scores,
    varlen_attention,
)
from pruneops.ops.compaction import gather_rows, scatter_rows, select_compact
from pruneops.ops.selection import segment_threshold, segment_topk

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
