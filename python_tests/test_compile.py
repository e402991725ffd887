"""The front-ends trace into one graph, forward and backward, with fixed and with changing sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import _triton_library, backends, ops
from pruneops.testing import assert_bitwise_equal, attention_inputs, cu_seqlens_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def check_compiled(function: Callable[..., Any], *args: Any) -> None:
    assert_bitwise_equal(compiled(function)(*args), function(*args))


CU = cu_seqlens_of([4, 0, 5])


def test_segment_topk_exact():
    check_compiled(lambda s, cu: ops.segment_topk(s, cu, [2, 0, 3]), torch.randn(9), CU)


def test_segment_topk_capacity():
    counts, protect = torch.tensor([2, 0, 3], dtype=torch.int32), torch.rand(9) < 0.3
    check_compiled(
        lambda s, cu, c, p: ops.segment_topk(s, cu, c, capacity=6, protect=p),
        torch.randn(9),
        CU,
        counts,
        protect,
    )


def test_segment_topk_exact_with_protect_and_counts_from_the_host():
    protect = torch.tensor([True, False, False, True, False, False, False, True, False])
    check_compiled(
        lambda s, cu, p: ops.segment_topk(s, cu, [1, 0, 3], protect=p, protected_counts=[2, 0, 1]),
        torch.randn(9),
        CU,
        protect,
    )


def test_segment_threshold_with_a_size_that_depends_on_data():
    check_compiled(lambda s, cu: ops.segment_threshold(s, cu, 0.1), torch.randn(9), CU)
    check_compiled(lambda s, cu: ops.segment_threshold(s, cu, 0.1, capacity=4), torch.randn(9), CU)


def test_gather_and_scatter():
    indices = torch.tensor([5, -1, 0], dtype=torch.int32)
    check_compiled(ops.gather_rows, torch.randn(9, 3), indices)
    check_compiled(lambda x, y, i: ops.gather_rows([x, y], i), torch.randn(9, 3), torch.arange(9), indices)
    check_compiled(lambda x, i: ops.scatter_rows(x, i, 9), torch.randn(3, 2), indices)


def test_select_compact():
    check_compiled(
        lambda s, x, n, cu: ops.select_compact(s, [x, n], cu, [2, 0, 3]),
        torch.randn(9),
        torch.randn(9, 4),
        torch.arange(9),
        CU,
    )


def scaled_inputs(total: int = 9) -> tuple[Tensor, ...]:
    return torch.randn(total, 4), torch.randn(3, 4), torch.randn(3, 4), torch.rand(total)


def test_scatter_scaled():
    check_compiled(ops.scatter_scaled, *scaled_inputs(), torch.tensor([5, -1, 0], dtype=torch.int32))


@pytest.mark.parametrize("masked", [False, True])
def test_router_weights(masked):
    target = torch.arange(9) % 3 > 0 if masked else None
    check_compiled(
        lambda x, w, b: ops.router_weights(x, w, b, target=target, activation="sigmoid", scale=0.2),
        torch.randn(9, 4),
        torch.randn(4),
        torch.randn(1),
    )


@pytest.mark.parametrize("return_lse", [False, True])
def test_varlen_attention(return_lse):
    inputs = attention_inputs((5, 0, 7))
    check_compiled(lambda *args: ops.varlen_attention(*args, return_lse=return_lse), *inputs.args)


def test_varlen_attention_with_slots_and_limit():
    inputs = attention_inputs((5, 0, 7))
    slots = torch.randn(2, 3, 9, 2, 16)
    used, limit = torch.tensor([9, 0, 3], dtype=torch.int32), torch.randint(0, 9, (12,), dtype=torch.int32)
    check_compiled(
        lambda q, k, v, cu, used, limit: ops.varlen_attention(q, k, v, cu, None, 7, 9, kv_limit=limit, seqused_k=used),
        inputs.q,
        *slots,
        inputs.cu_seqlens_q,
        used,
        limit,
    )


def test_policy_attention():
    inputs = attention_inputs((5, 0, 7))
    check_compiled(
        lambda q, k, v, policy, cu: ops.policy_attention(q, k, v, policy, cu, 7),
        *(inputs.q, inputs.k, inputs.v, torch.rand(12), inputs.cu_seqlens_q),
    )


def test_decode_attention():
    arguments = torch.randn(3, 4, 8), torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    used = torch.tensor([9, 0, 3], dtype=torch.int32)
    check_compiled(lambda *args: ops.decode_attention(*args, return_scores=True), *arguments, used)


def test_scores_and_limits():
    inputs = attention_inputs((5, 0, 7))
    cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    check_compiled(lambda *args: ops.last_query_scores(*args), inputs.q, inputs.k, cu_q, cu_k)
    check_compiled(lambda *args: ops.column_scores(*args), inputs.q, inputs.k, *inputs.boundaries)
    check_compiled(ops.kv_limit_from_positions, torch.arange(12), torch.arange(12), cu_q, cu_k)


def test_dpc_knn():
    x, noise = torch.randn(9, 4), torch.rand(9)
    check_compiled(lambda x, cu: ops.dpc_knn(x, cu, [2, 1, 3], k=3, capacity=6), x, CU)
    # Segment lengths are unknown under a tracer, where an empty segment takes room for one cluster.
    traced = compiled(lambda x, cu, noise: ops.dpc_knn(x, cu, 2, k=3, noise=noise))(x, CU, noise)
    eager = ops.dpc_knn(x, CU, 2, k=3, noise=noise)
    assert traced.center_indices.tolist() == [*eager.center_indices.tolist(), -1, -1]
    assert_bitwise_equal([*traced[:1], *traced[2:]], [*eager[:1], *eager[2:]])
    counts = torch.tensor([2, 0, 3], dtype=torch.int32)
    check_compiled(lambda x, cu, counts: ops.dpc_knn(x, cu, counts, k=3, capacity=4), x, CU, counts)


def test_merge_mean():
    x, ids, weights = torch.randn(9, 4), torch.randint(-1, 3, (9,), dtype=torch.int32), torch.rand(9)
    counts = torch.tensor([2, 0, 3], dtype=torch.int32)
    check_compiled(lambda x, ids, cu: ops.merge_mean(x, ids, cu, 3), x, ids, CU)
    check_compiled(lambda x, ids, cu, n, w: ops.merge_mean(x, ids, cu, n, weights=w), x, ids, CU, counts, weights)


def test_position_means():
    x, counts = torch.randn(9, 4), torch.tensor([2, 0, 3], dtype=torch.int32)
    check_compiled(lambda x, cu: ops.position_means(x, cu, 2), x, CU)
    check_compiled(lambda x, cu, n: ops.position_means(x, cu, n), x, CU, counts)


def gradients(function: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in args]
    return list(torch.autograd.grad(function(*leaves).square().sum(), leaves))


def test_gradient_of_gather_scatter_and_select_compact():
    indices = torch.tensor([5, -1, 0], dtype=torch.int32)
    scores = torch.randn(9)

    def block(x: Tensor) -> Tensor:
        (hidden, _), _, _ = ops.select_compact(scores, [x, torch.arange(9)], CU, [2, 0, 3])
        return ops.scatter_rows(ops.gather_rows(x, indices), indices, 9).sum() + hidden.sin().sum()

    x = torch.randn(9, 4)
    assert_bitwise_equal(gradients(compiled(block), x), gradients(block, x))


def test_gradient_of_merge_mean():
    ids = torch.tensor([0, 1, 1, 0, 2, -1, 1, 1, 0], dtype=torch.int32)

    def block(x: Tensor, weights: Tensor) -> Tensor:
        return ops.merge_mean(x, ids, CU, [2, 0, 3], weights=weights)[0]

    x, weights = torch.randn(9, 4), torch.rand(9)
    assert_bitwise_equal(gradients(compiled(block), x, weights), gradients(block, x, weights))


def test_gradient_of_position_means():
    def block(x: Tensor) -> Tensor:
        return ops.position_means(x, CU, [2, 0, 3])[0]

    x = torch.randn(9, 4)
    assert_bitwise_equal(gradients(compiled(block), x), gradients(block, x))


def test_gradient_of_varlen_attention():
    inputs = attention_inputs((5, 0, 7))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ops.varlen_attention(q, k, v, *inputs.boundaries, return_lse=True)
        return out.sum() + lse.sum()

    leaves = inputs.q, inputs.k, inputs.v
    assert_bitwise_equal(gradients(compiled(block), *leaves), gradients(block, *leaves))


def test_gradient_of_scatter_scaled_and_router_weights():
    def block(x: Tensor, residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        _, weights = ops.router_weights(x, weight, bias, target=x[:, 0] > 0, scale=0.2, shift=1.0)
        indices = torch.tensor([5, -1, 0], dtype=torch.int32)
        return ops.scatter_scaled(x, residual, branch, weights, indices)

    traced = compiled(block, dynamic=True)
    for total in (9, 20):
        leaves = *scaled_inputs(total)[:3], torch.randn(4), torch.randn(1)
        assert_bitwise_equal(gradients(traced, *leaves), gradients(block, *leaves))


@pytest.mark.parametrize("dynamic", [None, True])
def test_gradient_of_policy_attention(dynamic):
    def block(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, cu: Tensor) -> Tensor:
        return ops.policy_attention(q, k, v, policy, cu, q.shape[0])

    traced = compiled(block, dynamic)
    for lengths in ((5, 0, 7), (20, 2, 11)):
        inputs = attention_inputs(lengths)
        cu, leaves = inputs.cu_seqlens_q, (inputs.q, inputs.k, inputs.v, torch.rand(sum(lengths)))
        ours = gradients(lambda *x, cu=cu: traced(*x, cu), *leaves)
        assert_bitwise_equal(ours, gradients(lambda *x, cu=cu: block(*x, cu), *leaves))


def test_sizes_may_change_without_a_second_graph():
    graphs = 0

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def block(x: Tensor, scores: Tensor, cu: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        total = x.shape[0]
        (kept,), indices, cu_out = ops.select_compact(scores, [x], cu, counts, capacity=total // 2)
        attended = ops.varlen_attention(kept, kept, kept, cu_out, cu_out, total, total)
        return ops.scatter_rows(attended, indices, total), indices

    traced = torch.compile(block, fullgraph=True, backend=counting, dynamic=True)
    for lengths in ((4, 0, 5), (7, 9, 2), (30, 1, 1)):
        total, counts = sum(lengths), torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
        args = torch.randn(total, 2, 8), torch.randn(total), cu_seqlens_of(lengths), counts
        assert_bitwise_equal(traced(*args), block(*args))
    assert graphs == 1


def test_dynamic_gradients():
    def block(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        longest = q.shape[0]
        return ops.varlen_attention(q, k, v, cu, cu, longest, longest)

    traced = compiled(block, dynamic=True)
    for lengths in ((4, 5), (20, 11)):
        inputs = attention_inputs(lengths)
        cu = inputs.cu_seqlens_q
        leaves = inputs.q, inputs.k, inputs.v
        ours = gradients(lambda *x, cu=cu: traced(*x, cu), *leaves)
        assert_bitwise_equal(ours, gradients(lambda *x, cu=cu: block(*x, cu), *leaves))


def targets(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> set[str]:
    """What a function calls, as its graph names it."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)(*args)
    return found


@pytest.mark.skipif(_triton_library.refusal is not None, reason=str(_triton_library.refusal))
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_size_of_heads_chooses_the_backend_in_a_trace(monkeypatch, dynamic):
    sizes = {"native": (16, 64), "triton": None}
    monkeypatch.setattr(backends, "_limits", lambda backend, op, device: ((torch.float32,), sizes[backend]))
    for size, namespace in ((16, "pruneops"), (8, "pruneops_triton")):
        torch._dynamo.reset()
        args = [x.to("meta") if isinstance(x, Tensor) else x for x in attention_inputs((5, 7), head_dim=size).args]
        found = targets(lambda *args: ops.varlen_attention(*args), *args, dynamic=dynamic)
        assert f"{namespace}.varlen_attention.default" in found


def test_the_backend_is_part_of_the_trace():
    def block(x: Tensor) -> Tensor:
        return ops.gather_rows(x, torch.tensor([1, 0], dtype=torch.int32))

    x = torch.randn(3, 2)
    assert "pruneops.gather_rows.default" in targets(block, x)
    torch._dynamo.reset()
    with backends.use("reference"):
        assert not any("pruneops" in target for target in targets(block, x))
