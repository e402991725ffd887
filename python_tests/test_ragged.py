"""Packing: what goes in comes out at its place, and images are found."""

from __future__ import annotations

import pytest
import torch

from pruneops.ragged import Span, image_runs, pack


def test_pack_and_unpack_are_inverse_on_valid_tokens() -> None:
    values = torch.randn(3, 7, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    batch = pack(values, mask, None, None, None)
    assert batch.lengths == [5, 6, 0] and batch.cu_seqlens.tolist() == [0, 5, 11, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert torch.equal(batch.values, values[mask.bool()])
    assert torch.equal(batch.unpack(), values * mask[..., None])


def test_gradients_go_through_pack_and_unpack() -> None:
    values = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    (pack(values, mask, None, None, None).unpack() * 2).sum().backward()
    assert torch.equal(values.grad, 2.0 * mask[..., None].expand(2, 4, 3))


def test_the_last_column_of_a_right_padded_row_repeats_its_last_token() -> None:
    values = torch.randn(2, 4, 3)
    padded = pack(values, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), None, None, None).unpack()
    assert torch.equal(padded[0, :2], values[0, :2]) and not padded[0, 2].any()
    assert torch.equal(padded[0, 3], values[0, 1])
    assert torch.equal(padded[1], values[1])


def test_positions_of_the_caller_are_carried() -> None:
    positions = torch.tensor([[9, 4, 5, 7]])
    batch = pack(torch.zeros(2, 4, 1), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), positions, None, None)
    assert batch.position_ids.tolist() == [4, 5, 7, 9, 4, 5, 7]


def test_spans_count_text_images_and_what_lies_between_their_pieces() -> None:
    visual = torch.tensor([[0, 0, 1, 1, 2, 2, 0], [3, 3, 0, 3, 0, 0, 9]])
    batch = pack(torch.zeros(2, 7, 1), None, None, visual, None)
    assert batch.spans[0] == [Span(0, 2, 0, 0), Span(1, 2, 2, 2), Span(2, 2, 2, 2), Span(0, 1, 0, 0)]
    assert batch.spans[1] == [Span(3, 4, 3, 3), Span(0, 2, 0, 0), Span(9, 1, 1, 1)]
    assert batch.protect.tolist() == (visual == 0).flatten().tolist()


def test_keep_best_keeps_text_and_the_best_of_each_image() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 0, 2, 2], [1, 0, 1, 1, 1, 0, 0]])
    values = torch.arange(14.0).view(2, 7, 1)
    scores = torch.tensor([9.0, 1, 3, 2, 9, 5, 5, 4, 0, 8, 8, 1, 0, 0])
    batch = pack(values, None, None, visual, None)
    shorter = batch.keep_best(scores, [[0, 2, 0, 1], [2, 0]])
    assert shorter.values.flatten().tolist() == [0, 2, 3, 4, 5, 8, 9, 10, 12, 13]
    assert shorter.origin.tolist() == [0, 2, 3, 4, 5, 8, 9, 10, 12, 13]
    assert shorter.lengths == [5, 5] and shorter.cu_seqlens.tolist() == [0, 5, 10]
    assert [[span.visual for span in row] for row in shorter.spans] == [[0, 2, 0, 1], [2, 0]]
    assert shorter.spans[1][0].original_visual == 4
    assert shorter.protect.tolist() == [True, False, False, True, False, True, False, False, True, True]
    restored = shorter.unpack()
    # The last column repeats the last survivor, because generate() reads the logits there.
    assert restored[0].flatten().tolist() == [0, 0, 2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([0, 1, 1, 0, 1], [0, 1, 1, 0, 2]),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([1, 0, 1, 0, 1], [1, 0, 2, 0, 3]),
    ],
)
def test_image_runs(mask: list[int], runs: list[int]) -> None:
    assert image_runs(torch.tensor([mask, mask]) != 0).tolist() == [runs, runs]
