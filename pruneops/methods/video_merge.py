"""The first stage of PruneVid: segments of a video, static and dynamic tokens, and the means of their clusters.

All videos of a batch go through the same few op calls: their frames, segments and blocks are segments of packed
tensors. What depends on the data is read back twice, the labels of the frames and the static positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from pruneops import ops
from pruneops.methods.base import checked_number
from pruneops.ragged import cu_seqlens_of, to_device

#: Neighbours that make up a density, for frames and for tokens.
NEIGHBOURS = 7
#: Blocks up to this size are left as they are.
UNCLUSTERED_TOKENS = 14


@dataclass(frozen=True)
class VideoShape:
    """Frames of a video, and tokens of each."""

    frames: int
    patches: int


@dataclass(frozen=True)
class VideoMerge:
    """How the tokens of a video are merged.

    Attributes
    ----------
    shape : VideoShape
    window_sizes : list of int
        Frames of each segment.
    static : list of Tensor
        Per segment ``(patches,)`` bool on the CPU, True at static positions.
    segment_blocks : list of list of int
        Merged tokens of each segment: the number of static ones, then that of each frame.
    sources : Tensor
        ``(merged,)`` int64 rows ``frame * patches + patch`` of the video that stand for the merged tokens: a cluster's
        centre, a static token's patch in the first frame of its segment.
    """

    shape: VideoShape
    window_sizes: list[int]
    static: list[Tensor]
    segment_blocks: list[list[int]]
    sources: Tensor

    @property
    def static_sizes(self) -> list[int]:
        """Static merged tokens of each segment."""
        return [sizes[0] for sizes in self.segment_blocks]

    @property
    def dynamic_sizes(self) -> list[int]:
        """Dynamic merged tokens of each segment, all its frames together."""
        return [sum(sizes[1:]) for sizes in self.segment_blocks]

    @property
    def blocks(self) -> list[int]:
        """Sizes of the groups of merged tokens, in order: per segment the static one, then one for each frame."""
        return [size for sizes in self.segment_blocks for size in sizes]


@dataclass(frozen=True)
class MergedVideo(VideoMerge):
    """A video after merging.

    Attributes
    ----------
    tokens : Tensor
        ``(merged, channels)``: per segment its static tokens, then the dynamic tokens of each of its frames.
    """

    tokens: Tensor


def merge_video(
    frames: Tensor,
    *,
    tau: float = 0.8,
    temporal_segment_ratio: float = 0.25,
    cluster_ratio: float = 0.5,
    k: int = NEIGHBOURS,
    noise: Tensor | None = None,
) -> MergedVideo:
    """Merge the tokens of one video as PruneVid does before the language model (arXiv 2412.16117, section 3.2).

    Parameters
    ----------
    frames : ``(frames, patches, channels)`` float32, bfloat16, float16 or float64
    tau : float
        A position is static within a segment if the mean cosine similarity between its frames is above this.
    temporal_segment_ratio : float
        Clusters of frames as a share of the frames.
    cluster_ratio : float
        Clusters of a block of more than 14 tokens as a share of its tokens.
    k : int
        Neighbours that make up a density, the token itself included; cut to what is there.
    noise : ``(draws,)`` float32, optional
        Draws from [0, 1) that break ties between densities: for every frame, then, in the order of `blocks`, for every
        token of a block that is clustered. None: ties go to the lowest index.

    Returns
    -------
    MergedVideo

    Raises
    ------
    TypeError, ValueError
        If `frames` is not such a tensor, a ratio is not in (0, 1], or `noise` has too few or too many draws.

    Notes
    -----
    Differentiable in `frames` through the means. Deterministic. Waits for the device twice.
    """
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames: got {type(frames).__name__}, expected a tensor (frames, patches, channels)")
    if frames.dim() != 3 or 0 in frames.shape or not frames.is_floating_point():
        raise ValueError(
            f"frames: got {frames.dtype} of shape {tuple(frames.shape)}, expected floats (frames, patches, channels), "
            "none of them 0"
        )
    shape = VideoShape(frames.shape[0], frames.shape[1])
    settings = checked_merging(tau=tau, temporal_segment_ratio=temporal_segment_ratio, cluster_ratio=cluster_ratio)
    if noise is not None:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            raise TypeError(f"noise: got {type(noise).__name__}, expected a tensor of floats (draws,)")
        if noise.dim() != 1 or noise.shape[0] < shape.frames:
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected (draws,), at least one for each frame")
        noise = noise.to(torch.float64 if frames.dtype == torch.float64 else torch.float32)
    tokens, (video,) = merge_videos(
        frames.reshape(-1, frames.shape[2]),
        [shape],
        **settings,
        k=k,
        noise=noise,
    )
    return MergedVideo(**vars(video), tokens=tokens)


def checked_merging(tau: float, temporal_segment_ratio: float, cluster_ratio: float) -> dict[str, float]:
    """The settings of `merge_video` as floats; raises what `checked_number` does."""
    ratios = {"temporal_segment_ratio": temporal_segment_ratio, "cluster_ratio": cluster_ratio}
    shares = {name: checked_number(name, ratio, 0, 1, above_low=True) for name, ratio in ratios.items()}
    return {"tau": checked_number("tau", tau), **shares}


def merge_videos(
    x: Tensor,
    shapes: Sequence[VideoShape],
    *,
    tau: float,
    temporal_segment_ratio: float,
    cluster_ratio: float,
    k: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, list[VideoMerge]]:
    """`merge_video` of many videos.

    Parameters
    ----------
    x : ``(total, channels)``
        The videos behind each other, each frame by frame.
    shapes : sequence of VideoShape
    noise : optional
        For a single video only.

    Returns
    -------
    (Tensor, list of VideoMerge)
        ``(merged, channels)`` merged tokens of all videos behind each other, and each video.
    """
    windows = _windows(x, shapes, temporal_segment_ratio, k, None if noise is None else noise[: shapes[0].frames])
    sizes = [size for video in windows for size in video]
    patches = [shape.patches for shape, video in zip(shapes, windows, strict=True) for _ in video]
    borders = cu_seqlens_of([w * p for w, p in zip(sizes, patches, strict=True)], x.device)
    means, similarity = ops.position_means(x, borders, patches)
    static = (similarity > tau).cpu()
    lengths, tokens, rows = _blocks(x, means, static, sizes, patches)
    if noise is not None:
        noise = _noise_of_blocks(noise[shapes[0].frames :], lengths)
    merged, centers = _cluster_blocks(tokens, lengths, cluster_ratio, k, noise)
    sources = centers.long() if rows is None else rows[centers.long()].long()
    block_sizes = iter([_clusters(n, cluster_ratio) for n in lengths])
    blocks = [list(islice(block_sizes, 1 + w)) for w in sizes]
    return merged, _each_video(shapes, windows, list(static.split(patches)), blocks, sources)


def refined_labels(labels: Sequence[int]) -> list[int]:
    """Make the labels of frames contiguous (arXiv 2412.16117, section 3.2, as the official code does it).

    Of every label only its longest runs stay, all of them if several are equally long; a label whose runs are single
    frames loses them all. A stretch without labels then takes that of the longer run beside it, the left one's if they
    are equally long, and 0 if there is none on either side.
    """
    runs = [[label, len(list(run))] for label, run in groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 0))
    open_runs = [[label if length == longest[label] > 1 else None, length] for label, length in runs]
    stretches = [[label, sum(length for _, length in run)] for label, run in groupby(open_runs, key=lambda run: run[0])]
    refined: list[int] = []
    for j, (label, length) in enumerate(stretches):
        if label is None:
            left = len(list(next(groupby(reversed(refined)))[1])) if refined else 0
            right = stretches[j + 1][1] if j + 1 < len(stretches) else 0
            beside = refined[-1:] if left >= right else stretches[j + 1][:1]
            label = beside[0] if beside else 0
        refined += [label] * length
    return refined


def _windows(x: Tensor, shapes: Sequence[VideoShape], ratio: float, k: int, noise: Tensor | None) -> list[list[int]]:
    """Frames of each segment of each video."""
    patches = [shape.patches for shape in shapes for _ in range(shape.frames)]
    frames = [shape.frames for shape in shapes]
    whole = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    features, _ = ops.merge_mean(x.detach(), whole, cu_seqlens_of(patches, x.device), 1, capacity=len(patches))
    clusters = [max(1, int(n * ratio)) for n in frames]
    found = ops.dpc_knn(
        features, cu_seqlens_of(frames, x.device), clusters, k=k, noise=noise, max_seqlen=max(frames, default=0)
    )
    labels = found.cluster_ids.cpu().split(frames)
    return [[len(list(run)) for _, run in groupby(refined_labels(video.tolist()))] for video in labels]


def _blocks(
    x: Tensor, means: Tensor, static: Tensor, sizes: list[int], patches: list[int]
) -> tuple[list[int], Tensor, Tensor | None]:
    """The tokens that are clustered, block behind block: per segment the static ones, then the others of each frame.

    Parameters
    ----------
    x, means : Tensor
        ``(total, channels)`` the videos, ``(positions, channels)`` means over the frames of each segment.
    static : Tensor
        ``(positions,)`` bool on the CPU.
    sizes, patches : list of int
        Frames of every segment, and tokens of each of its frames.

    Returns
    -------
    (list of int, Tensor, Tensor or None)
        Sizes of the blocks, ``(tokens, channels)``, and ``(tokens,)`` int32 rows of `x` that stand for them: of a
        static token the one in the first frame. None: every row of `x`, in order.
    """
    segments = list(zip(sizes, patches, strict=True))
    if not static.any():
        return [n for w, p in segments for n in (0, *[p] * w)], x, None
    # All positions of every block, of which then those stay that are static, or dynamic, as the block has it.
    per_block, of_static, first_rows, first_positions = [], [], [], []
    row = position = 0
    for w, p in segments:
        per_block += [p] * (1 + w)
        of_static += [True] + [False] * w
        first_rows += [row, *range(row, row + w * p, p)]
        first_positions += [position] * (1 + w)
        row += w * p
        position += p
    length = torch.tensor(per_block)
    block = torch.arange(len(per_block)).repeat_interleave(length)
    place = torch.arange(block.shape[0]) - (length.cumsum(0) - length)[block]
    in_segment = torch.tensor(first_positions)[block] + place
    of_static = torch.tensor(of_static)[block]
    kept = (static[in_segment] == of_static).nonzero().squeeze(1)
    lengths = block[kept].bincount(minlength=len(per_block)).tolist()
    rows = to_device((torch.tensor(first_rows)[block] + place)[kept].to(torch.int32), x.device)
    is_mean = of_static[kept].nonzero().squeeze(1)
    of_means = to_device(in_segment[kept[is_mean]].to(torch.int32), x.device)
    tokens = ops.gather_rows(x, rows).index_copy_(0, to_device(is_mean, x.device), ops.gather_rows(means, of_means))
    return lengths, tokens, rows


def _noise_of_blocks(noise: Tensor, lengths: list[int]) -> Tensor:
    """Noise for the tokens of all blocks, 0 where they are too small to be clustered."""
    drawn = torch.tensor([n > UNCLUSTERED_TOKENS for n in lengths]).repeat_interleave(torch.tensor(lengths))
    if noise.shape[0] != int(drawn.sum()):
        raise ValueError(
            f"noise: got {noise.shape[0]} draws behind those of the frames, expected {int(drawn.sum())}, one for each "
            f"token of the blocks of more than {UNCLUSTERED_TOKENS} tokens"
        )
    return noise.new_zeros(drawn.shape[0]).masked_scatter(to_device(drawn, noise.device), noise)


def _cluster_blocks(x: Tensor, lengths: list[int], ratio: float, k: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace the tokens of every block by the means of its clusters, if there are enough of them.

    Parameters
    ----------
    x : Tensor
        ``(total, channels)`` blocks behind each other.
    lengths : list of int
        Their sizes.

    Returns
    -------
    (Tensor, Tensor)
        ``(merged, channels)`` means and ``(merged,)`` int32 rows of `x` that stand for them.
    """
    borders = cu_seqlens_of(lengths, x.device)
    counts = [_clusters(n, ratio) for n in lengths]
    found = ops.dpc_knn(x.detach(), borders, counts, k=k, noise=noise, max_seqlen=max(lengths, default=0))
    ids, centers = found.cluster_ids, found.center_indices
    small = [0 < n <= UNCLUSTERED_TOKENS for n in lengths]
    if any(small):
        # A block that is not clustered keeps its order: its tokens are clusters of their own.
        in_order, is_small, own, is_small_center = _identity(lengths, counts, small)
        ids = torch.where(to_device(is_small, x.device), to_device(in_order, x.device), ids)
        centers = torch.where(to_device(is_small_center, x.device), to_device(own, x.device), centers)
    merged, _ = ops.merge_mean(x, ids, borders, counts)
    return merged, centers


def _clusters(tokens: int, ratio: float) -> int:
    return tokens if tokens <= UNCLUSTERED_TOKENS else max(1, int(tokens * ratio))


def _identity(lengths: list[int], counts: list[int], small: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place in its block and "is in a small block" for every token; the same row and the same for every cluster."""
    n, c, is_small = torch.tensor(lengths), torch.tensor(counts), torch.tensor(small)
    start = (n.cumsum(0) - n).repeat_interleave(n)
    in_order = (torch.arange(start.shape[0]) - start).to(torch.int32)
    cluster_start = (c.cumsum(0) - c).repeat_interleave(c)
    own = torch.arange(cluster_start.shape[0]) - cluster_start + (n.cumsum(0) - n).repeat_interleave(c)
    return in_order, is_small.repeat_interleave(n), own.to(torch.int32), is_small.repeat_interleave(c)


def _each_video(
    shapes: Sequence[VideoShape],
    windows: list[list[int]],
    static: list[Tensor],
    blocks: list[list[int]],
    sources: Tensor,
) -> list[VideoMerge]:
    videos, segment, at, row = [], 0, 0, 0
    for shape, window_sizes in zip(shapes, windows, strict=True):
        segments = slice(segment, segment + len(window_sizes))
        stop = at + sum(map(sum, blocks[segments]))
        videos.append(VideoMerge(shape, window_sizes, static[segments], blocks[segments], sources[at:stop] - row))
        segment, at = segments.stop, stop
        row += shape.frames * shape.patches
    return videos
