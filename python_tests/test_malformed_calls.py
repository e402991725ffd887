"""Malformed calls of every op end in a correct result or a clear exception: no crash, no hang, no garbage.

Each example takes a well-formed call and breaks up to three of its arguments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pruneops import ops, reference
from pruneops.testing import assert_bitwise_equal
from python_tests.malformed_calls import CALLS, FUZZ, examples, malformed_call

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]


def assert_same(ours: Any, expected: Any, exact: bool) -> None:
    """Equal bytes for ops that move or choose rows, closeness for arithmetic; gradients play no part."""
    if exact:
        assert_bitwise_equal(ours, expected)
        return
    for a, b in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        tolerance = 1e-4 if a.dtype == torch.float32 else 3e-2
        b = b.detach().to(a.dtype)
        torch.testing.assert_close(a.detach(), b, atol=tolerance, rtol=tolerance, equal_nan=True)


def comparable(op: str, args: list[Any], options: dict[str, Any], exact: bool, breaks: int) -> bool:
    """Whether a call that was accepted has one right answer, up to rounding.

    Meta tensors have no values; huge values or scales leave a softmax to the order of arithmetic; a softmax_lse is
    taken at its word; a negative policy can make a sum vanish.
    """
    tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors):
        return False
    if exact:
        return True
    if op == "policy_attention" and bool((args[3] < 0).any()):
        return False
    if breaks and options.get("softmax_lse") is not None or abs(options.get("softmax_scale") or 0.0) > 100:
        return False
    return all(bool((x.float().abs() < 100).all()) for x in tensors if x.is_floating_point())


EXACT = ("segment_topk", "segment_threshold", "gather_rows", "scatter_rows", "select_compact")


@pytest.mark.parametrize("op", CALLS)
def test_front_ends_answer_correctly_or_raise_value_or_type_errors(op):
    @FUZZ
    @examples
    def fuzz(seed: int, breaks: int) -> None:
        args, options = malformed_call(op, seed, breaks)
        try:
            result = getattr(ops, op)(*args, **options)
        except (ValueError, TypeError) as error:
            assert breaks, f"a well-formed call was refused: {error}"
            assert str(error)
            return
        except RuntimeError as error:
            assert "is forced, but its kernels have no gradients" in str(error)
            return
        exact = op in EXACT or op == "kv_limit_from_positions"
        if comparable(op, args, options, exact, breaks):
            assert_same(result, getattr(reference, op)(*args, **options), exact)

    fuzz()
