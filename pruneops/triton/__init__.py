"""The kernels in Triton, for any GPU that Triton compiles for.

:data:`KERNELS` holds a launcher for each op under the name and with the arguments of its schema; ``pruneops.ops`` is
the way to call them, with its checks, gradients and choice of a backend. Tile sizes come from
:mod:`pruneops.triton.tuning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruneops.triton import (
    attention_backward,
    attention_forward,
    compaction,
    decode,
    dpc_knn,
    few_query_scores,
    kv_limit,
    merge_mean,
    policy,
    position_means,
    routing,
    scaled,
    selection,
)
from pruneops.triton.tuning import Tunable

KERNELS: dict[str, Callable[..., Any]] = {
    **dpc_knn.KERNELS,
    **merge_mean.KERNELS,
    **position_means.KERNELS,
    **attention_backward.KERNELS,
    **attention_forward.KERNELS,
    **compaction.KERNELS,
    **routing.KERNELS,
    **scaled.KERNELS,
    **decode.KERNELS,
    **few_query_scores.KERNELS,
    **selection.KERNELS,
    **kv_limit.KERNELS,
    **policy.KERNELS,
}

# The kernels whose tile sizes `pruneops tune` measures.
TUNABLES: tuple[Tunable, ...] = (
    *attention_backward.TUNABLES,
    *attention_forward.TUNABLES,
    *decode.TUNABLES,
    *few_query_scores.TUNABLES,
    *dpc_knn.TUNABLES,
    *selection.TUNABLES,
    *policy.TUNABLES,
)

__all__ = ["KERNELS", "TUNABLES"]
