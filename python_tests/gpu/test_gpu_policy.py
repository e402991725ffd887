"""On a GPU policy_attention and its gradients are within rounding of the float64 oracle and repeat to the bit."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DTYPES,
    assert_policy_within_rounding,
    cpu_kernel,
    every_second,
    head_major,
    inputs_on_device,
    on_cpu,
    on_device,
    policy_attention,
    raw,
    with_gaps,
)

from pruneops import ops
from pruneops.testing import LENGTHS, AttentionInputs, attention_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

MORE_LENGTHS = {**LENGTHS, "tiny512": (34,) * 512}


def random_policy(rows: int) -> torch.Tensor:
    """Zeros, ones and what lies between."""
    policy = torch.rand(rows)
    return torch.where(policy < 0.4, 0.0, torch.where(policy > 0.8, 1.0, policy))


def check(inputs: AttentionInputs, **options) -> None:
    assert_policy_within_rounding(inputs, random_policy(inputs.q.shape[0]), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_ragged_batches(lengths, dtype):
    check(attention_inputs(lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 31, 64, 65, 80, 96, 128, 129, 200, 256])
def test_head_dims(head_dim, dtype):
    check(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (8, 2), (28, 4), (32, 32)], ids=str)
def test_grouped_queries(heads):
    check(attention_inputs((3, 0, 66), heads=heads, head_dim=24))


@pytest.mark.parametrize("length", [1, 15, 17, 31, 33, 63, 64, 65, 127, 129, 257])
def test_lengths_around_tile_sizes(length):
    check(attention_inputs((length,), heads=(2, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_image(dtype):
    check(attention_inputs((640, 353), heads=(4, 2), head_dim=128, dtype=dtype))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_uniform_policies(value):
    assert_policy_within_rounding(attention_inputs((40, 130, 1)), torch.full((171,), value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dominant_key_that_is_dropped_leaves_the_mean_value(dtype):
    inputs = attention_inputs((200,), heads=(2, 1), head_dim=32, dtype=dtype)
    inputs.q[:], inputs.k[:], inputs.k[0] = 4.0, -1.0, 4.0
    policy = torch.ones(200)
    policy[0] = 0.0
    assert_policy_within_rounding(inputs, policy, softmax_scale=1.0)


@pytest.mark.parametrize("options", [{"softmax_scale": -0.5}, {"softmax_scale": 0.0}, {"epsilon": 0.3}], ids=str)
def test_softmax_scale_and_epsilon(options):
    check(attention_inputs((33, 5, 70)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [with_gaps, head_major, every_second], ids=lambda view: view.__name__)
def test_strided_inputs(view, dtype):
    check(attention_inputs((40, 3, 70), dtype=dtype, head_dim=24), view=view)


@pytest.mark.rehearsed
def test_rows_past_the_last_segment_are_zero_whatever_they_hold():
    inputs = inputs_on_device(attention_inputs((20, 30), tail=5))
    policy, dout = on_device(torch.rand(55)), torch.ones_like(inputs.q)
    for x in (inputs.q, inputs.k, inputs.v, policy):
        x[50:] = torch.nan
    for result in policy_attention(ops, inputs, policy, dout):
        assert (result[50:] == 0).all() and result.isfinite().all()


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12)], ids=str)
def test_boundaries_on_a_device_are_clamped_as_on_the_cpu(boundaries):
    inputs = attention_inputs((20,), heads=(2, 2))
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    args = (inputs.q, inputs.k, inputs.v, random_policy(20), cu_seqlens, 20, 0.3, 1e-6)
    forward = cpu_kernel("policy_attention", *args)
    torch.testing.assert_close(on_cpu(raw("policy_attention", *on_device(args))), forward, rtol=1e-5, atol=1e-5)
    backward = (inputs.q, *args[:4], *forward, *args[4:])
    expected = cpu_kernel("policy_attention_backward", *backward)
    ours = on_cpu(raw("policy_attention_backward", *on_device(backward)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
