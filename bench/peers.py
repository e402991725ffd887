"""The same results from plain torch: what one would write without pruneops.

Peers that allow a choice get their best form: contiguous head-major inputs for scaled_dot_product_attention,
padding done outside the timed call, unsorted top-k where the order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from pruneops.methods.video_merge import refined_labels


def _slices(seqlens: Sequence[int]) -> list[slice]:
    ends = torch.tensor(seqlens).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(seqlens, ends, strict=True)]


# ---------------------------------------------------------------------- selection


def topk_sort(scores: Tensor, keep: int) -> Tensor:
    """Rows of equal length, scores ``[B, L]``: absolute kept rows ``[B * keep]``, ascending in each row."""
    picked = scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values
    return (picked + torch.arange(scores.shape[0])[:, None] * scores.shape[1]).flatten()


def pad_scores(scores: Tensor, seqlens: Sequence[int]) -> Tensor:
    """``[total]`` to ``[B, max]``, padded with -inf."""
    padded = scores.new_full((len(seqlens), max(seqlens)), -torch.inf)
    for row, part in enumerate(_slices(seqlens)):
        padded[row, : seqlens[row]] = scores[part]
    return padded


def ragged_topk_sort(padded: Tensor, seqlens: Tensor, keep: Tensor, keep_max: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, already padded: absolute kept rows and cu_seqlens of the kept."""
    picked = padded.topk(keep_max, dim=-1).indices
    wanted = torch.arange(keep_max) < keep[:, None]
    picked = picked.masked_fill(~wanted, padded.shape[1]).sort(dim=-1).values
    offsets = F.pad(seqlens.cumsum(0), (1, 0))[:-1]
    rows = (picked + offsets[:, None])[wanted]
    return rows, F.pad(keep.cumsum(0), (1, 0))


def loop_topk_cat(scores: Tensor, rows: Sequence[Tensor], seqlens: Sequence[int], keep: Sequence[int]) -> list[Tensor]:
    """A Python loop over the batch: top-k, sort, index, collect, concatenate. Common in published code."""
    kept: list[list[Tensor]] = [[] for _ in rows]
    for part, count in zip(_slices(seqlens), keep, strict=True):
        index = scores[part].topk(count).indices.sort().values + part.start
        for target, tensor in zip(kept, rows, strict=True):
            target.append(tensor[index])
    return [torch.cat(parts) for parts in kept]


def threshold_nonzero(scores: Tensor, cu_seqlens: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Rows above a threshold and their cu_seqlens."""
    above = scores > threshold
    counts = F.pad(above.cumsum(0), (1, 0))[cu_seqlens.long()]
    return above.nonzero().squeeze(1), counts


# ---------------------------------------------------------------------- compaction


def index_select_chain(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """One ``index_select`` a tensor."""
    return [tensor.index_select(0, indices) for tensor in tensors]


def advanced_index(x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``."""
    return x[indices]


def scatter_index_copy(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    """Rows written back into zeros."""
    return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, indices, rows)


def select_chain(scores: Tensor, tensors: Sequence[Tensor], keep: int) -> tuple[list[Tensor], Tensor]:
    """Equal rows: top-k, sort and one ``index_select`` a tensor."""
    indices = topk_sort(scores, keep)
    return index_select_chain(tensors, indices), indices


def scaled_in_place(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Rows put into a clone, all weighted in place, the residual added. Common in published code; differentiable."""
    out = x.clone()
    out[indices] = branch
    out *= weights[:, None].to(x.dtype)
    out[indices] += residual
    return out


def scaled_copy(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The same with the fewest passes over memory; differentiable."""
    scale = weights[:, None].to(x.dtype)
    return (x * scale).index_copy_(0, indices, torch.addcmul(residual, branch, scale[indices]))


# ---------------------------------------------------------------------- routing


def tanh_router(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Linear, 0.2 * tanh + 1, and what rows outside ``target`` get; logits and weights in the dtype of ``x``."""
    logits = F.linear(x, weight[None], bias).squeeze(1)
    return torch.where(target, logits, -torch.inf), torch.where(target, 0.2 * torch.tanh(logits) + 1.0, 1.0)


# ---------------------------------------------------------------------- attention


def head_major(x: Tensor) -> Tensor:
    """``[total, H, D]`` to contiguous ``[1, H, total, D]``."""
    return x.transpose(0, 1).unsqueeze(0).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """scaled_dot_product_attention on ``[B, H, L, D]``; GQA through ``enable_gqa``."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_loop(segments: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """One call a segment, each ``[1, H, L, D]``."""
    return [sdpa(*segment) for segment in segments]


def pad_rows(x: Tensor, seqlens: Sequence[int]) -> Tensor:
    """``[total, H, D]`` to right-padded ``[B, H, max, D]``."""
    padded = x.new_zeros(len(seqlens), x.shape[1], max(seqlens), x.shape[2])
    for row, part in enumerate(_slices(seqlens)):
        padded[row, :, : seqlens[row]] = x[part].transpose(0, 1)
    return padded


def unpad_rows(x: Tensor, seqlens: Sequence[int]) -> Tensor:
    """``[B, H, max, D]`` to ``[total, H, D]``."""
    return torch.cat([x[row, :, :n].transpose(0, 1) for row, n in enumerate(seqlens)])


def causal_padding_mask(seqlens: Sequence[int]) -> Tensor:
    """Boolean ``[B, 1, max, max]``, as a model builds it for a right-padded batch."""
    longest = max(seqlens)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    valid = torch.arange(longest) < torch.tensor(seqlens)[:, None]
    return causal & valid[:, None, None, :]


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """scaled_dot_product_attention under an explicit mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def policy_softmax(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
    """Attention ``[B, H, L, D]`` whose softmax counts key ``j`` as ``policy[j]``, 1 for a row's own, in a matrix L x L.

    ``mask`` is boolean ``[.., L, L]``, true where a query sees a key.
    """
    length = q.shape[2]
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask, -torch.inf).float()
    counts = policy + (1.0 - policy) * torch.eye(length)
    e = (logits - logits.amax(-1, keepdim=True)).exp() * counts
    return ((e + 1e-6 / length) / (e.sum(-1, keepdim=True) + 1e-6)).to(q.dtype) @ v


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """One query token a row: q ``[B, Hq, 1, D]``, caches ``[B, Hk, L, D]``."""
    return sdpa(q, k_cache, v_cache, causal=False)


# ---------------------------------------------------------------------- scores


def _softmax_rows(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """q ``[H, Lq, D]``, k ``[H, Lk, D]``: probabilities ``[H, Lq, Lk]`` in float32."""
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        longest_q, longest_k = logits.shape[-2:]
        hidden = torch.ones(longest_q, longest_k, dtype=torch.bool).triu(longest_k - longest_q + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


def last_query_mean(q: Tensor, k: Tensor) -> Tensor:
    """Attention of one query row to every key, mean over heads: q ``[H, 1, D]``, k ``[H, L, D]``."""
    return _softmax_rows(q, k, causal=False).mean(0).squeeze(0)


def column_sum(q: Tensor, k: Tensor) -> Tensor:
    """Attention every key receives under a causal mask: mean over heads, sum over query rows."""
    return _softmax_rows(q, k, causal=True).mean(0).sum(0)


# ---------------------------------------------------------------------- clustering


def dpc_chain(x: Tensor, clusters: int, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """DPC-kNN of equal segments ``[B, N, C]``: ids ``[B, N]`` and centres ``[B, clusters]``.

    The chain of published code, with its N x N mask and float arithmetic on it replaced by one masked fill.
    """
    distances = torch.cdist(x, x) / x.shape[-1] ** 0.5
    nearest = distances.topk(k, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp() + noise * 1e-6
    denser = density[:, None, :] > density[:, :, None]
    largest = distances.flatten(1).amax(-1)[:, None, None]
    delta = torch.where(denser, distances, largest).amin(-1)
    centers = (delta * density).topk(clusters, dim=-1).indices
    to_centers = distances.gather(1, centers[:, :, None].expand(-1, -1, x.shape[1]))
    ids = to_centers.argmin(1)
    return ids.scatter_(1, centers, torch.arange(clusters).expand_as(centers)), centers


def mean_index_add(x: Tensor, ids: Tensor, clusters: int) -> Tensor:
    """Cluster means by ``index_add_`` and a division."""
    sums = x.new_zeros(clusters, x.shape[1]).index_add_(0, ids, x)
    return sums / torch.bincount(ids, minlength=clusters).clamp(min=1)[:, None]


def mean_sorted(x: Tensor, ids: Tensor, clusters: int) -> Tensor:
    """Cluster means of rows sorted by cluster, by a segmented reduction."""
    order = ids.argsort(stable=True)
    lengths = torch.bincount(ids, minlength=clusters)
    sums = torch.segment_reduce(x[order], "sum", lengths=lengths, unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


def _merged_block(block: Tensor, ratio: float, k: int) -> Tensor:
    """The cluster means of one block of tokens by one-hot products; a block of up to 14 stays."""
    if block.shape[0] <= 14:
        return block
    clusters = int(block.shape[0] * ratio)
    ids, _ = dpc_chain(block[None], clusters, k, torch.zeros(1, block.shape[0]))
    members = F.one_hot(ids[0], clusters).to(block.dtype)
    return (members.T @ block) / members.sum(0)[:, None]


def merge_video_loop(
    frames: Tensor, tau: float, temporal_segment_ratio: float, cluster_ratio: float, k: int = 7
) -> Tensor:
    """PruneVid's merging of one video ``[T, P, C]``, segment by segment and frame by frame, as published code does."""
    features = frames.mean(1)[None]
    labels, _ = dpc_chain(features, max(1, int(len(frames) * temporal_segment_ratio)), k, torch.zeros(1, len(frames)))
    merged, start = [], 0
    for _, run in groupby(refined_labels(labels[0].tolist())):
        w = len(list(run))
        segment = frames[start : start + w]
        start += w
        unit = F.normalize(segment, dim=-1)
        pairs = torch.einsum("ipc,jpc->ijp", unit, unit)
        static = (pairs.sum((0, 1)) - w) / (w * (w - 1)) > tau
        merged.append(_merged_block(segment[:, static].mean(0), cluster_ratio, k))
        merged += [_merged_block(frame[~static], cluster_ratio, k) for frame in segment]
    return torch.cat(merged)
