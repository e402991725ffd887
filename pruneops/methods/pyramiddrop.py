"""PyramidDrop: drop visual tokens in stages, ranked by the attention of the last instruction token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruneops import ops
from pruneops.decoder import DecoderState
from pruneops.methods.staged_drop import StagedDrop
from pruneops.ragged import RaggedBatch, cu_seqlens_of, to_device


@dataclass(frozen=True)
class PyramidDrop(StagedDrop):
    """PyramidDrop (Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", arXiv 2410.17247, sections 3.2 and 3.3).

    After a given number of decoder layers, every image is cut to a share of its *original* tokens. Tokens are ranked by
    the attention they get from the last instruction token, computed with the next layer's own norm, query and key
    projection (causal softmax over all keys, mean over heads). The best stay, in their order; all text stays; the
    remaining tokens are renumbered from 0. Dropped tokens stay in the key/value cache of the layers they went through.

    Parameters
    ----------
    layers : sequence of int, optional
        How many decoder layers run before each drop, strictly increasing, at least 1 and below the depth of the model.
        None: the quarter points of the depth, one per ratio (8, 16, 24 of 32).
    keep_ratios : sequence of float
        Share of the original tokens of an image that stays after each drop, in (0, 1], not increasing. An image of n
        tokens keeps ``int(n * keep_ratio)``; 0 means that it vanishes.

    Notes
    -----
    *Queries.* With labels, every token right before an answer is a query and their scores are averaged, as the official
    code does in training (the paper has one instruction); a row without an answer is left alone. Without labels the
    query is the last prompt token.

    *Where the official code fails or is limited* (batches while decoding, padding under SDPA, grouped-query attention,
    several images a row, text-only rows) this does what the paper means: keys are shared by their group of query heads,
    every image of a row is dropped by its own ratio, text-only rows are not touched, the query is the true last prompt
    token, and sequences are not truncated to a maximum length.

    *Continuation* (another turn on the cache): images of the new chunk are ranked and dropped within the chunk; earlier
    turns are never revisited; a chunk without images is not pruned.

    Scores are float32 and ties go to the lowest index, so that recomputation under activation checkpointing selects
    the same tokens.

    Raises
    ------
    TypeError, ValueError
        For layers or ratios that break the rules above.
    """

    name: ClassVar[str] = "pyramiddrop"

    @property
    def ranked_layers(self) -> tuple[int, ...]:
        return self.layers or ()

    def scores(self, batch: RaggedBatch, layer: nn.Module, state: DecoderState, rows: list[int]) -> Tensor:
        return _rank(batch, layer, state, rows)


#: Drops nothing: the ragged decoder alone.
KEEP_ALL = PyramidDrop(layers=(), keep_ratios=())


def _rank(batch: RaggedBatch, layer: nn.Module, state: DecoderState, ranked: list[int]) -> Tensor:
    """``(total,)`` float32: attention of the query tokens to each token of the ranked rows; 0 in other rows.

    Projects the keys of the ranked rows and the queries of their query tokens, nothing else.
    """
    device = batch.values.device
    total = batch.values.shape[0]
    values, position_ids, lengths, chosen = batch.values.detach(), batch.position_ids, batch.lengths, None
    if len(ranked) < batch.batch_size:
        starts = [0]
        for length in batch.lengths:
            starts.append(starts[-1] + length)
        chosen = to_device(torch.cat([torch.arange(starts[b], starts[b + 1]) for b in ranked]), device)
        values = ops.gather_rows(values, chosen.to(torch.int32))
        position_ids = position_ids.index_select(0, chosen)
        lengths = [batch.lengths[b] for b in ranked]
    cu_seqlens = cu_seqlens_of(lengths, device)

    # The query tokens' places now: the token itself, or what is left before it.
    borders = batch.entry.cu_seqlens_host
    origins = [borders[b] + t for b in ranked for t in batch.entry.query_tokens[b]]
    counts = [len(batch.entry.query_tokens[b]) for b in ranked]
    origin = batch.origin if chosen is None else batch.origin.index_select(0, chosen)
    query_origin = to_device(torch.tensor(origins, dtype=torch.int64), device)
    query_row = to_device(torch.tensor([r for r, n in enumerate(counts) for _ in range(n)], dtype=torch.int64), device)
    first = cu_seqlens.index_select(0, query_row).long()
    query = torch.maximum(torch.searchsorted(origin, query_origin, right=True) - 1, first)

    attention = layer.self_attn
    normed = layer.input_layernorm(values)
    head_dim = attention.head_dim
    q = attention.q_proj(normed.index_select(0, query)).view(len(origins), -1, head_dim)
    k = attention.k_proj(normed).view(normed.shape[0], -1, head_dim)
    cos, sin = (t.squeeze(0).unsqueeze(1) for t in state.rotary(position_ids))
    q = _rotate(q, cos.index_select(0, query), sin.index_select(0, query)).to(k.dtype)
    k = _rotate(k, cos, sin).to(k.dtype)
    scores = ops.last_query_scores(
        q,
        k,
        cu_seqlens_of(counts, device),
        cu_seqlens,
        kv_limit=(query - first + 1).to(torch.int32),
        softmax_scale=attention.scaling,
    )
    return scores if chosen is None else scores.new_zeros(total).index_copy_(0, chosen, scores)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(tokens, heads, head_dim)`` with ``(tokens, 1, head_dim)`` cos and sin (halves layout)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
