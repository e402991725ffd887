"""decode_attention, last_query_scores and column_scores: what only unusual tiles, groups and boundaries show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import AttentionInputs, attention_inputs
from pruneops.triton import column_scores, decode, softmax_lse, tuning
from pruneops.triton.tuning import Config

REDUCTIONS = list(itertools.product(("mean", "sum", "max"), repeat=2))


def last_query(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.last_query_scores(inputs.q, inputs.k, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **options)


def column(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.column_scores(inputs.q, inputs.k, *inputs.boundaries, **options)


CALLS = pytest.mark.parametrize("call", [last_query, column])


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=2e-5, atol=2e-6, equal_nan=True)


def check_decode(heads: tuple[int, int], head_dim: int, num_splits: int) -> None:
    q, k, v = torch.randn(2, heads[0], head_dim), *torch.randn(2, 2, 75, heads[1], head_dim)
    used = torch.tensor([70, 0], dtype=torch.int32)
    options = {"num_splits": num_splits, "return_scores": True}
    for ours, expected in zip(
        ops.decode_attention(q, k, v, used, **options),
        reference.decode_attention(q, k, v, used, **options),
        strict=True,
    ):
        assert_close(ours, expected)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("keys", [16, 128])
@CALLS
def test_tiles_of_other_sizes_give_the_same_scores(call, keys, rows):
    inputs = attention_inputs((3, 0, 90), (20, 9, 95), heads=(4, 2), head_dim=40, tail=1)
    config = Config({"BLOCK_M": rows, "BLOCK_N": keys})
    for head_reduce, query_reduce in (("mean", "sum"), ("max", "mean")):
        options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
        with tuning.use(softmax_lse.LSE, config), tuning.use(column_scores.COLUMN, config):
            ours = call(ops, inputs, **options)
        assert_close(ours, call(reference, inputs, **options))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_tiles_of_other_sizes_give_the_same_attention(num_splits):
    with tuning.use(decode.DECODE, Config({"BLOCK_N": 16})):
        check_decode((4, 2), 40, num_splits)


@pytest.mark.parametrize("heads", [(24, 1), (70, 1)], ids=str)
def test_more_query_heads_of_a_key_head_than_fit_a_tile(heads):
    check_decode(heads, 16, 2)
    inputs = attention_inputs((1, 2), (40, 30), heads=heads)
    for head_reduce, query_reduce in (("mean", "sum"), ("max", "mean")):
        options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
        assert_close(last_query(ops, inputs, **options), last_query(reference, inputs, **options))


@pytest.mark.parametrize("heads", [(2, 2), (7, 1)], ids=str)
def test_one_query_row_against_keys_that_many_programs_share(heads):
    inputs = attention_inputs((1, 1), (1500, 70), heads=heads)
    assert_close(last_query(ops, inputs), last_query(reference, inputs))


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12), (3, 5, 5, 17)], ids=str)
def test_boundaries_of_any_values_are_clamped_as_in_the_reference(boundaries):
    q, k = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    whole = torch.tensor([0, 6, 6, 20], dtype=torch.int32)
    for cu_q, cu_k in ((cu_seqlens, cu_seqlens), (whole, cu_seqlens), (cu_seqlens, whole)):
        kernel = backends.kernel(backends.TRITON, "last_query_scores")
        ours = kernel(q, k, cu_q, cu_k, 0.25, "mean", "mean")
        assert_close(ours, reference.last_query_scores(q, k, cu_q, cu_k))
        for causal in (True, False):
            kernel = backends.kernel(backends.TRITON, "column_scores")
            ours = kernel(q, k, cu_q, cu_k, 20, 20, causal, 0.25, "sum", "mean")
            assert_close(ours, reference.column_scores(q, k, cu_q, cu_k, 20, 20, causal=causal))


def test_slot_counts_of_any_values_are_clamped():
    q, (k, v) = torch.randn(4, 2, 16), torch.randn(2, 4, 9, 2, 16)
    used = torch.tensor([-3, 2**31 - 1, 10, -(2**31)], dtype=torch.int32)
    kernel = backends.kernel(backends.TRITON, "decode_attention")
    out, lse, scores = kernel(q, k, v, used, 0.25, 0, True)
    expected = reference.decode_attention(q, k, v, used.clamp(0, 9), return_scores=True)
    assert_close(out, expected[0])
    assert_close(scores, expected[1])
    assert lse[:, [0, 3]].eq(-torch.inf).all() and lse[:, 1:3].isfinite().all()


@CALLS
@pytest.mark.parametrize(("head_reduce", "query_reduce"), REDUCTIONS)
def test_nan_reaches_the_scores_that_depend_on_it(head_reduce, query_reduce, call):
    options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
    inputs = attention_inputs((2, 40), (6, 40), heads=(4, 2))
    inputs.k[20, 1] = torch.nan
    expected = call(reference, inputs, **options)
    assert expected.isnan().any() and not expected.isnan().all()
    assert_close(call(ops, inputs, **options), expected)


def test_nan_in_a_filled_slot_reaches_its_heads_alone():
    q, (k, v) = torch.randn(2, 4, 16), torch.randn(2, 2, 150, 2, 16)
    k[0, 100, 1] = torch.nan
    used = torch.tensor([150, 150], dtype=torch.int32)
    for num_splits in (1, 3):
        assert_close(
            ops.decode_attention(q, k, v, used, num_splits=num_splits), reference.decode_attention(q, k, v, used)
        )
