"""On a GPU gather_rows, scatter_rows and select_compact move the bytes that the CPU kernels move."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    assert_equals_cpu_kernel,
    every_second,
    head_major,
    on_both,
    on_cpu,
    on_device,
    raw,
    with_gaps,
)

from pruneops import ops
from pruneops.testing import LENGTHS, assert_bitwise_equal, cu_seqlens_of, random_tensor, some_indices

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

ANY_DTYPE = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
# Rows of 16-byte multiples, of odd sizes, empty ones, and longer than a block is wide.
ROW_SHAPES = ((), (1,), (3,), (64,), (2, 5), (4, 16, 3), (0,), (1031,), (4096,), (20_000,))


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_any_dtype_and_row_shape(shape, dtype):
    for rows, count in ((9, 5), (9, 12), (300, 299), (9, 0), (1, 1), (0, 3), (0, 0)):
        indices = some_indices(rows, count)
        assert_equals_cpu_kernel("gather_rows", [random_tensor((rows, *shape), dtype)], indices)
        assert_equals_cpu_kernel("scatter_rows", [random_tensor((count, *shape), dtype)], indices, rows)


def test_a_list_moves_many_tensors_of_different_dtypes():
    tensors = [random_tensor((20, *shape), dtype) for dtype in ANY_DTYPE for shape in ROW_SHAPES]
    indices = some_indices(20, 13)
    gathered = assert_equals_cpu_kernel("gather_rows", tensors, indices)
    assert_equals_cpu_kernel("scatter_rows", on_cpu(gathered), indices, 20)
    assert raw("gather_rows", [], on_device(indices)) == []


@pytest.mark.rehearsed
@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_gives_zeros_and_writes_nothing(bad):
    x, indices = torch.ones(4, 5), torch.tensor([bad, 1, -1], dtype=torch.int32)
    (gathered,) = assert_equals_cpu_kernel("gather_rows", [x], indices)
    assert gathered[0].sum() == 0 and gathered[1].sum() == 5
    (scattered,) = assert_equals_cpu_kernel("scatter_rows", [x[:3]], indices, 4)
    assert scattered.sum(1).tolist() == [0, 5, 0, 0]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1023, 1025, 4096, 5000, 70_000])
def test_scatter_of_few_and_many_indices(count):
    """The kernel finds the source of a row by a scan or by an inverted table, as the number of indices decides."""
    rows = count + count // 2 + 3
    moved = [torch.randn(count, 3), torch.arange(count)]
    assert_equals_cpu_kernel("scatter_rows", moved, some_indices(rows, count), rows)
    duplicates = torch.randint(-1, rows // 2, (count,), dtype=torch.int32)
    assert_equals_cpu_kernel("scatter_rows", moved, duplicates, rows)


VIEWS = {
    "gaps": with_gaps,
    "head_major": head_major,
    "last_stride_2": every_second,
    "expanded": lambda x: x[:, :1].expand_as(x),
    "one_row": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(1, 1, 1).expand(1, *x.shape[1:]), x])[1:],
    "narrowed": lambda x: torch.cat([x, x], dim=2)[:, :, 1 : 1 + x.shape[2]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("width", [4, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
def test_strided_inputs_give_the_same_result(dtype, width, view):
    x = view(random_tensor((11, 6, width), dtype).to(DEVICE))
    indices = some_indices(11, 11).to(DEVICE)
    dense = x.contiguous()
    assert_bitwise_equal(raw("gather_rows", [x], indices), raw("gather_rows", [dense], indices))
    assert_bitwise_equal(raw("scatter_rows", [x], indices, 30), raw("scatter_rows", [dense], indices, 30))
    spaced = every_second(indices)
    assert_bitwise_equal(raw("gather_rows", [x], spaced), raw("gather_rows", [dense], indices))
    assert_bitwise_equal(raw("scatter_rows", [x], spaced, 30), raw("scatter_rows", [dense], indices, 30))


def test_outputs_are_contiguous_and_do_not_alias_their_input():
    x = torch.randn(4, 6, device=DEVICE).t()
    out = ops.gather_rows(x, torch.arange(6, dtype=torch.int32, device=DEVICE))
    assert out.is_contiguous() and out.data_ptr() != x.data_ptr()


def test_rows_beyond_32_bit_offsets():
    """2.4 GB of rows: byte and element offsets do not fit in 32 bits."""
    rows, width = 600_000, 4 if REHEARSAL else 4096
    x = torch.zeros(rows, width, dtype=torch.uint8, device=DEVICE)
    x[:, 0] = torch.arange(rows, device=DEVICE) % 251
    indices = torch.tensor([0, rows - 1, 524_288, 524_289, 300_000], dtype=torch.int32, device=DEVICE)
    (out,) = raw("gather_rows", [x], indices)
    assert torch.equal(out, x[indices.long()])
    del x
    (back,) = raw("scatter_rows", [out], indices, rows)
    assert torch.equal(back[indices.long()], out) and int(back.count_nonzero()) == int(out.count_nonzero())


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), (2880, 576, 0, 6272)], ids=[*LENGTHS, "llava"])
def test_select_compact_equals_the_cpu_kernel(lengths, dtype, protected):
    total = sum(lengths)
    scores, cu_seqlens = torch.randn(total).round(decimals=1).to(dtype), cu_seqlens_of(lengths)
    protect = torch.rand(total) < 0.3 if protected else None
    tensors = [torch.randn(total, 24, dtype=torch.bfloat16), torch.arange(total), torch.randn(total, 2, 3)]
    counts = torch.tensor([n // 3 for n in lengths], dtype=torch.int32)
    for capacity in (0, 3, total // 2, total + 5):
        assert_equals_cpu_kernel("select_compact", scores, tensors, cu_seqlens, counts, capacity, protect)


def test_select_compact_is_topk_then_gather():
    total = 5000
    scores, x = torch.randn(total, device=DEVICE), torch.randn(total, 96, device=DEVICE)
    cu_seqlens = cu_seqlens_of([2880, 0, 2120]).to(DEVICE)
    counts = torch.tensor([1440, 0, 7], dtype=torch.int32, device=DEVICE)
    ours = ops.select_compact(scores, [x], cu_seqlens, counts, capacity=1500)
    indices, kept = ops.segment_topk(scores, cu_seqlens, counts, capacity=1500)
    assert_bitwise_equal(ours, ([ops.gather_rows(x, indices)], indices, kept))
    assert (ours[0][0][int(kept[-1]) :] == 0).all()


@pytest.mark.rehearsed
def test_select_compact_without_tensors_only_selects():
    scores = torch.arange(4.0, device=DEVICE)
    moved, indices, kept = ops.select_compact(scores, [], cu_seqlens_of([4]).to(DEVICE), [2])
    assert moved == [] and indices.tolist() == [2, 3] and kept.tolist() == [0, 2]


@pytest.mark.rehearsed
def test_gradients_equal_those_of_the_cpu_kernels():
    lengths = (50, 0, 700)
    total = sum(lengths)
    backwards = torch.arange(399, -1, -1, dtype=torch.int32)

    def gradients(scores, cu_seqlens, counts, labels, weight, backwards, *leaves):
        x, y = (leaf.clone().requires_grad_() for leaf in leaves)
        (moved, _, moved_y), indices, _ = ops.select_compact(scores, [x, labels, y], cu_seqlens, counts, capacity=400)
        again = ops.scatter_rows(ops.gather_rows(moved, backwards), indices, total)
        loss = (moved * weight).sum() + moved_y.sum() + (again[:400] * weight).sum()
        return list(torch.autograd.grad(loss, (x, y)))

    counts = torch.tensor([20, 0, 333], dtype=torch.int32)
    args = torch.randn(total), cu_seqlens_of(lengths), counts, torch.arange(total), torch.randn(400, 40), backwards
    assert_bitwise_equal(*on_both(gradients, *args, torch.randn(total, 40), torch.randn(total)))
