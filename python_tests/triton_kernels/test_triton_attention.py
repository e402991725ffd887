"""varlen_attention in Triton: what its tiles, their order and its reads of memory must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import ops, reference
from pruneops.testing import AttentionInputs, assert_bitwise_equal, attention_inputs, cu_seqlens_of, strided
from pruneops.triton import attention_backward, attention_forward, tuning
from pruneops.triton.attention_backward import BACKWARD_KEYS, BACKWARD_QUERIES
from pruneops.triton.attention_forward import FORWARD, SHAPE_CLASSES, section_of_pairs, shape_class
from pruneops.triton.head_tiles import aligned, head_tiles
from pruneops.triton.tuning import Config

TILES = ((16, 32), (64, 16), (128, 64))
TUNABLES = (*attention_forward.TUNABLES, *attention_backward.TUNABLES)


def results(module: Any, inputs: AttentionInputs, **options: Any) -> list[Tensor]:
    """Output, LSE and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = module.varlen_attention(*leaves, *inputs.boundaries, return_lse=True, **options)
    seen = lse.isfinite()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    upstream[1] = torch.where(seen, upstream[1], 0.0)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


def assert_close_to_reference(inputs: AttentionInputs, **options: Any) -> list[Tensor]:
    ours = results(ops, inputs, **options)
    for a, b in zip(ours, results(reference, inputs, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return ours


def use_tiles(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    forced = {
        tunable.name: Config({"BLOCK_M": m, "BLOCK_N": n}) for tunable in (FORWARD, BACKWARD_KEYS, BACKWARD_QUERIES)
    }
    monkeypatch.setattr(tuning, "_forced", forced)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 48])
def test_every_shape_of_tiles(tiles, head_dim, monkeypatch):
    """Query tiles that are taller and flatter than key tiles, with one tile of the head dimension and with two."""
    use_tiles(monkeypatch, *tiles)
    inputs = attention_inputs((70, 0, 33), (100, 5, 20), heads=(2, 1), head_dim=head_dim, tail=2)
    limit = torch.randint(-3, 110, (inputs.q.shape[0],), dtype=torch.int32)
    assert_close_to_reference(inputs, causal=True)
    assert_close_to_reference(inputs, kv_limit=limit)


def test_limits_that_rise_and_fall(monkeypatch):
    """Key tiles that only some tiles of query rows see, with others between that do not."""
    use_tiles(monkeypatch, 16, 16)
    inputs = attention_inputs((128,), (64,), heads=(2, 2))
    limit = torch.tensor([64, 0, 17, 16, 5, 0, 64, 33], dtype=torch.int32).repeat_interleave(16)
    out, lse, *_ = assert_close_to_reference(inputs, kv_limit=limit)
    dead = limit == 0
    assert (out[dead] == 0).all() and (lse[:, dead] == -torch.inf).all()


def test_the_order_of_programs_changes_nothing(monkeypatch):
    inputs = attention_inputs((70, 5, 0, 40), heads=(4, 2))
    expected = results(ops, inputs)
    monkeypatch.setattr(attention_forward, "CACHED_BYTES", 1)
    assert section_of_pairs(256, 70, 2) == 2
    assert_bitwise_equal(results(ops, inputs), expected)


def test_sections_hold_as_many_heads_as_the_cache():
    keys = 2 * 128 * 2
    assert section_of_pairs(keys, 3000, 1) == 16
    assert section_of_pairs(keys, 3000, 8) == 128
    assert section_of_pairs(keys, 1 << 20, 4) == 4
    assert section_of_pairs(keys, 0, 1) == attention_forward.CACHED_BYTES


def test_a_bound_above_the_longest_segment_changes_nothing():
    inputs = attention_inputs((40, 3), heads=(2, 1), tail=1)
    expected = results(ops, inputs)
    bounds = AttentionInputs(inputs.q, inputs.k, inputs.v, *inputs.boundaries[:2], 10_000, 2**31 - 1)
    assert_bitwise_equal(results(ops, bounds), expected)


def test_a_tail_longer_than_all_segments_is_zeroed():
    """There are fewer programs than tiles of unused rows."""
    inputs = attention_inputs((3, 2), heads=(2, 1), tail=200)
    for x in (inputs.q, inputs.k, inputs.v):
        x[5:] = torch.nan
    out, lse, dq, dk, dv = results(ops, inputs)
    for x in (out, dq, dk, dv):
        assert x.isfinite().all() and (x[5:] == 0).all()
    assert (lse[:, 5:] == -torch.inf).all()


@pytest.mark.parametrize("used", [(-3, 40), (0, 9)], ids=str)
def test_slots_are_clamped_to_the_capacity(used):
    inputs, slots = attention_inputs((3, 2)), torch.randn(2, 2, 9, 2, 16)

    def call(used: tuple[int, ...]) -> Tensor:
        seqused_k = torch.tensor(used, dtype=torch.int32)
        arguments = (inputs.q, *slots, inputs.cu_seqlens_q, None, 3, 9, True, 0.25, None, seqused_k)
        return torch.ops.pruneops_triton.varlen_attention(*arguments)

    assert_bitwise_equal(call(used), call((0, 9)))


def test_more_segments_than_are_read_at_once():
    """Boundaries are read 256 at a time."""
    inputs = attention_inputs([1, 0] * 150, heads=(1, 1))
    assert_bitwise_equal(ops.varlen_attention(*inputs.args), inputs.v)


def test_no_segments_and_no_keys():
    q, none = torch.randn(3, 2, 16), torch.randn(0, 2, 16)
    for k, lengths_q, lengths_k in ((q, (), ()), (none, (3,), (0,))):
        inputs = AttentionInputs(q, k, k, cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), 3, 3)
        out, lse = ops.varlen_attention(*inputs.args, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()
        arguments = (q, None, q, k, k, out, lse, *inputs.boundaries, True, 0.25)
        assert not any(grad.any() for grad in torch.ops.pruneops_triton.varlen_attention_backward(*arguments))


@pytest.mark.parametrize(
    ("head_dim", "tiles"),
    [(1, (16, 0)), (16, (16, 0)), (17, (16, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (255, (128, 128))],
)
def test_head_tiles_are_little_wider_than_the_head(head_dim, tiles):
    assert head_tiles(head_dim) == tiles


def test_alignment_counts_bytes():
    rows = torch.zeros(4, 3, 72, dtype=torch.bfloat16)
    assert aligned(rows, rows.float()) and aligned(rows[..., 8:])
    assert not aligned(rows[..., 1:]) and not aligned(rows, strided(rows))
    assert not aligned(torch.zeros(4, 3, 20, dtype=torch.bfloat16)) and aligned(torch.zeros(4, 3, 20))


def test_every_shape_has_a_class_with_candidates():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(shape_class(head_dim, dtype) in SHAPE_CLASSES for head_dim in range(1, 257))
    for tunable in TUNABLES:
        for name in SHAPE_CLASSES:
            assert tunable.candidates(name)[-1].min_capability <= 80
