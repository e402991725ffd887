"""What pruning costs and saves: FLOPs, KV bytes, budgets, break-even points, and pictures of what was kept.

Everything here is arithmetic on a configuration's numbers (and PIL for the pictures): no model is run, and
nothing imports transformers.
"""

from __future__ import annotations

from pruneops.analysis.budget import average_tokens, break_even_tokens, solve_keep_ratios, solve_layers
from pruneops.analysis.contact_sheet import VideoView, draw_contact_sheet
from pruneops.analysis.flops import (
    TextShape,
    decode_flops,
    layer_flops,
    lm_head_flops,
    prefill_flops,
    pyramid_lengths,
    ranking_flops,
    router_flops,
)
from pruneops.analysis.kv import dtype_bytes, kv_bytes, kv_bytes_per_token
from pruneops.analysis.pictures import StageView, draw_stages, grid_boxes

__all__ = [
    "StageView",
    "TextShape",
    "VideoView",
    "average_tokens",
    "break_even_tokens",
    "decode_flops",
    "draw_contact_sheet",
    "draw_stages",
    "dtype_bytes",
    "grid_boxes",
    "kv_bytes",
    "kv_bytes_per_token",
    "layer_flops",
    "lm_head_flops",
    "prefill_flops",
    "pyramid_lengths",
    "ranking_flops",
    "router_flops",
    "solve_keep_ratios",
    "solve_layers",
]
