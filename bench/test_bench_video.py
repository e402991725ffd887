"""PruneVid's merging of one video against the loop over segments and frames that published code runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.conftest import Versus
from pruneops.methods.prunevid import merge_video

RATIOS = {"tau": 0.8, "temporal_segment_ratio": 0.25, "cluster_ratio": 0.5}


def _video(channels: int, moving: float) -> Tensor:
    """16 frames of 12 x 12 patches in four scenes; the given share of the patches moves."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(4, 144, channels, generator=generator)
    noise = torch.randn(16, 144, channels, generator=generator)
    moves = torch.rand(144, generator=generator) < moving
    return scenes[torch.arange(16) // 4] + noise * torch.where(moves, 1.0, 0.1)[:, None]


def _same_size(ours: Tensor, peer: Tensor) -> None:
    """Near ties fall differently with the rounding of cdist; most means agree all the same."""
    assert ours.shape == peer.shape
    close = torch.isclose(ours, peer, rtol=1e-3, atol=1e-3).all(-1)
    assert float(close.float().mean()) > 0.9


@pytest.mark.parametrize("channels", [1024, 4096])
@pytest.mark.parametrize("moving", [0.5, 1.0])
def test_merge_a_video_of_16_frames(versus: Versus, channels: int, moving: float) -> None:
    frames = _video(channels, moving)
    versus(
        lambda: merge_video(frames, **RATIOS).tokens,
        lambda: peers.merge_video_loop(frames, **RATIOS),
        op="merge_video",
        workload=f"16 frames of 144 tokens of {channels}, {moving:.0%} moving",
        peer_name="per segment and frame: cdist chain",
        bytes_moved=frames.numel() * frames.element_size(),
        same=_same_size,
    )
