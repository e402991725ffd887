"""gather_rows, scatter_rows and select_compact move the right rows, and their gradients move them back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    LENGTHS,
    assert_bitwise_equal,
    assert_repeatable,
    backend_under_test,
    cu_seqlens_of,
    ops_under_test,
    random_tensor,
    some_indices,
    strided,
)

ANY_DTYPE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
ROW_SHAPES = ((), (1,), (3,), (64,), (2, 5), (4, 16, 3), (0,), (1031,))


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_native_equals_reference_for_any_dtype_and_row_shape(shape, dtype, native_calls):
    for rows, count in ((9, 5), (9, 12), (9, 0), (1, 1), (0, 3), (0, 0)):
        x, indices = random_tensor((rows, *shape), dtype), some_indices(rows, count)
        assert_bitwise_equal(ops.gather_rows(x, indices), reference.gather_rows(x, indices))
        moved = random_tensor((count, *shape), dtype)
        assert_bitwise_equal(ops.scatter_rows(moved, indices, rows), reference.scatter_rows(moved, indices, rows))


def test_gather_takes_rows_and_writes_zeros_for_minus_one(native_calls):
    x = torch.arange(6.0).reshape(3, 2)
    out = ops.gather_rows(x, torch.tensor([2, -1, 0, 2], dtype=torch.int32))
    assert out.tolist() == [[4, 5], [0, 0], [0, 1], [4, 5]]


def test_scatter_writes_rows_and_leaves_zeros_elsewhere(native_calls):
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    out = ops.scatter_rows(rows, torch.tensor([3, -1, 0], dtype=torch.int32), 5)
    assert out.flatten().tolist() == [3, 0, 0, 1, 0]


def test_a_list_moves_tensors_of_different_dtypes_in_one_call(native_calls):
    tensors = [random_tensor((20, *shape), dtype) for dtype in ANY_DTYPE for shape in ROW_SHAPES]
    indices = some_indices(20, 13)
    gathered = ops.gather_rows(tensors, indices)
    assert native_calls["gather_rows", backend_under_test()] == 1
    assert isinstance(gathered, list)
    assert_bitwise_equal(gathered, reference.gather_rows(tensors, indices))
    scattered = ops.scatter_rows(gathered, indices, 20)
    assert_bitwise_equal(scattered, reference.scatter_rows(gathered, indices, 20))
    assert ops.gather_rows([], indices) == [] and ops.scatter_rows([], indices, 20) == []


@pytest.mark.parametrize(
    "view",
    [
        strided,
        lambda x: x.clone().transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :1].expand_as(x),
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["gaps", "transposed", "expanded", "last_stride_2", "one_row"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    x = view(random_tensor((11, 6, 4), dtype))
    indices = some_indices(11, 11)
    assert_bitwise_equal(ops.gather_rows(x, indices), ops.gather_rows(x.contiguous(), indices))
    assert_bitwise_equal(ops.scatter_rows(x, indices, 30), ops.scatter_rows(x.contiguous(), indices, 30))
    spaced = torch.stack([indices, indices], dim=1)[:, 1]
    assert_bitwise_equal(ops.gather_rows(x, spaced), ops.gather_rows(x, indices))


def test_outputs_are_contiguous_and_do_not_alias_their_input(native_calls):
    x = torch.randn(4, 6).t()
    out = ops.gather_rows(x, torch.arange(6, dtype=torch.int32))
    assert out.is_contiguous() and out.data_ptr() != x.data_ptr()


def test_gradients_move_rows_back(native_calls):
    x = torch.randn(7, 3, requires_grad=True)
    indices = torch.tensor([5, -1, 2], dtype=torch.int32)
    weight = torch.randn(3, 3)
    (ops.gather_rows(x, indices) * weight).sum().backward()
    expected = torch.zeros(7, 3)
    expected[5], expected[2] = weight[0], weight[2]
    assert torch.equal(x.grad, expected)
    rows = torch.randn(3, 3, requires_grad=True)
    upstream = torch.randn(7, 3)
    (ops.scatter_rows(rows, indices, 7) * upstream).sum().backward()
    assert torch.equal(rows.grad, torch.stack([upstream[5], torch.zeros(3), upstream[2]]))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_gradcheck_and_gradgradcheck(name):
    indices = torch.tensor([3, -1, 0, 4], dtype=torch.int32)
    x = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6)

    def gather(x: Tensor) -> Tensor:
        return ops.gather_rows([x.square(), labels], indices)[0]

    def scatter(rows: Tensor) -> Tensor:
        return ops.scatter_rows(rows.square(), indices, 6)

    with backends.use(name):
        for function, argument in ((gather, x), (scatter, rows)):
            assert torch.autograd.gradcheck(function, argument)
            assert torch.autograd.gradgradcheck(function, argument)


def test_only_outputs_of_inputs_with_a_gradient_have_one(native_calls):
    x, constant, labels = torch.randn(5, 2, requires_grad=True), torch.randn(5), torch.arange(5)
    indices = some_indices(5, 4)
    outputs = ops.gather_rows([constant, x, labels], indices)
    assert [out.requires_grad for out in outputs] == [False, True, False]
    outputs = ops.select_compact(torch.randn(5), [labels, x, constant], cu_seqlens_of([5]), [3])[0]
    assert [out.requires_grad for out in outputs] == [False, True, False]


def test_an_unused_output_gives_its_input_no_gradient(native_calls):
    x, y = torch.randn(5, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    outputs = ops.gather_rows([x, y], some_indices(5, 4))
    outputs[0].sum().backward()
    assert x.grad is not None and y.grad is None


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("protected", [False, True])
def test_select_compact_is_topk_then_gather(lengths, protected, native_calls):
    total = sum(lengths)
    scores, cu_seqlens = torch.randn(total).round(), cu_seqlens_of(lengths)
    protect = torch.rand(total) < 0.3 if protected else None
    tensors = [torch.randn(total, 24, dtype=torch.bfloat16), torch.arange(total), torch.randn(total, 2, 3)]
    counts = [n // 3 for n in lengths]
    if protected:
        counts = [0] * len(lengths)
    ours = ops.select_compact(scores, tensors, cu_seqlens, counts, protect=protect)
    indices, cu_seqlens_out = ops.segment_topk(scores, cu_seqlens, counts, protect=protect)
    assert_bitwise_equal(ours, (ops.gather_rows(tensors, indices), indices, cu_seqlens_out))
    assert_bitwise_equal(ours, reference.select_compact(scores, tensors, cu_seqlens, counts, protect=protect))
    for capacity in (0, 3, total + 5):
        ours = ops.select_compact(
            scores,
            tensors,
            cu_seqlens,
            torch.tensor(counts, dtype=torch.int32),
            capacity=capacity,
            protect=protect,
        )
        expected = reference.select_compact(scores, tensors, cu_seqlens, counts, capacity=capacity, protect=protect)
        assert_bitwise_equal(ours, expected)


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("capacity", [None, 9])
def test_select_compact_gradients_equal_those_of_the_reference(protected, capacity, native_calls):
    scores, cu_seqlens, labels = torch.randn(12), cu_seqlens_of([5, 0, 7]), torch.arange(12)
    protect = torch.arange(12) % 5 == 0 if protected else None
    hidden, other = torch.randn(12, 4), torch.randn(12)
    grads = []
    for module in (ops, reference):
        x, y = hidden.clone().requires_grad_(), other.clone().requires_grad_()
        (a, _, b), _, _ = module.select_compact(
            scores, [x, labels, y], cu_seqlens, [2, 0, 3], capacity=capacity, protect=protect
        )
        (a.square().sum() + b.sin().sum()).backward()
        grads.append([x.grad, y.grad])
    assert_bitwise_equal(*grads)


def test_select_compact_has_no_gradient_in_the_scores(native_calls):
    scores = torch.randn(6, requires_grad=True)
    x = torch.randn(6, 2, requires_grad=True)
    (moved,), _, _ = ops.select_compact(scores, [x], cu_seqlens_of([6]), [3])
    moved.sum().backward()
    assert scores.grad is None and x.grad is not None


def test_select_compact_without_tensors_only_selects(native_calls):
    moved, indices, cu_seqlens = ops.select_compact(torch.arange(4.0), [], cu_seqlens_of([4]), [2])
    assert moved == [] and indices.tolist() == [2, 3] and cu_seqlens.tolist() == [0, 2]


def test_two_runs_are_equal_whatever_memory_held(native_calls):
    x, labels = torch.randn(3000, 17), torch.arange(3000)
    indices = some_indices(3000, 1500)
    indices[::7] = -1
    assert_repeatable(lambda: ops.gather_rows([x, labels], indices))
    assert_repeatable(lambda: ops.scatter_rows([x[:1500], labels[:1500]], indices, 3000))
    scores, cu_seqlens = torch.randn(3000), cu_seqlens_of([1000, 2000])
    assert_repeatable(lambda: ops.select_compact(scores, [x, labels], cu_seqlens, [9, 50], capacity=2000))


def test_duplicate_indices_are_refused_where_they_would_lose_something():
    x, twice = torch.randn(4, 2), torch.tensor([1, -1, 1, -1], dtype=torch.int32)
    assert ops.gather_rows(x, twice).shape == (4, 2)
    with pytest.raises(ValueError, match="indices must not hold a row twice, got 1 2 times"):
        ops.gather_rows(x.requires_grad_(), twice)
    with pytest.raises(ValueError, match="indices must not hold a row twice"):
        ops.scatter_rows(torch.randn(4, 2), twice, 4)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31)])
def test_raw_kernels_write_zeros_for_an_index_out_of_range(bad):
    x, indices = torch.ones(4, 2), torch.tensor([bad, 1], dtype=torch.int32)
    (gathered,) = ops_under_test().gather_rows([x], indices)
    assert gathered.tolist() == [[0, 0], [1, 1]]
    (scattered,) = ops_under_test().scatter_rows([x[:2]], indices, 4)
    assert scattered.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]
