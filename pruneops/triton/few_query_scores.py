"""last_query_scores: the attention of a few chosen query rows a segment, usually one, to all its keys.

The keys are read twice, for the LSE and for the probabilities, the second time from the L2 cache where they fit;
nothing as large as rows times keys is stored. With many rows the work is that of column_scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pruneops.triton import column_scores, softmax_lse
from pruneops.triton.tuning import Tunable

# Average query rows of a segment up to which the heads of a row share a tile.
FEW_ROWS = 8


def last_query_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    head_reduce: str,
    query_reduce: str,
    kv_limit: Tensor | None = None,
) -> Tensor:
    """float32 ``[total_k]``: the softmax of the chosen rows, reduced over heads and then over rows."""
    few = q.shape[0] <= FEW_ROWS * (cu_seqlens_q.shape[0] - 1)
    return column_scores.scores_of(
        q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, head_reduce, query_reduce, kv_limit=kv_limit, few=few
    )


TUNABLES: tuple[Tunable, ...] = (softmax_lse.LSE, column_scores.COLUMN)
KERNELS: dict[str, Callable[..., Any]] = {
    "last_query_scores": last_query_scores,
    "column_scores": column_scores.column_scores,
}
