"""Attention and its scores work on long sequences without ever holding an L x L matrix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LENGTH = 16384
MATRIX_BYTES = LENGTH * LENGTH * 4

# Runs in a process of its own: the peak of a process never goes down again.
PROGRAM = """
import resource
import sys

import torch

from pruneops import backends, ops

length, dtype, case = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(n: int) -> None:
    q, k, v = (torch.randn(n, 1, 16).to(dtype).requires_grad_("attention" in case) for _ in range(3))
    cu = torch.tensor([0, n], dtype=torch.int32)
    if case == "attention":
        ops.varlen_attention(q, k, v, cu, cu, n, n).sum().backward()
    elif case == "policy_attention":
        policy = torch.rand(n).requires_grad_()
        ops.policy_attention(q, k, v, policy, cu, n).sum().backward()
    elif case == "last_query_scores":
        ops.last_query_scores(q, k, cu, cu, query_reduce="max")
    else:
        ops.column_scores(q, k, cu, cu, n, n)


with backends.record_calls() as calls:
    work(64)  # thread pools and first-use allocations
    before = peak()
    work(length)
assert {backend for _, backend in calls} == {"native"}, calls
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["attention", "policy_attention", "last_query_scores", "column_scores"])
def test_peak_memory_is_far_below_a_score_matrix(case, dtype):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LENGTH), dtype, case],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    # Ten tensors of [length, 16] in float32 and the workspaces are some 30 MB; the matrix is 1 GB.
    assert int(result.stdout) < MATRIX_BYTES // 16


# Selecting video tokens by the attention of 64 text tokens to 6,000 others, with 8 heads.
VIDEO_PROGRAM = """
import resource

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pruneops
from pruneops import backends
from pruneops.methods import PruneVid


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, vocab_size=8)
model = LlamaForCausalLM(config).eval()
method = PruneVid(tau=1.0, cluster_ratio=1.0, selected_layer=0)
with torch.no_grad(), pruneops.prune(model, method) as run, backends.record_calls() as calls:
    for patches in (8, 370):
        before = peak()
        visual = torch.tensor([1] * 16 * patches + [0] * 64)[None]
        embeds = torch.randn(1, visual.shape[1], 64)
        model(inputs_embeds=embeds, visual_token_mask=visual, num_frames=[16], logits_to_keep=1)
assert {backend for _, backend in calls} == {"native"}, calls
assert run.layer_lengths[0] > [5900] > run.layer_lengths[1], run.layer_lengths
print(peak() - before)
"""


def test_selecting_video_tokens_never_builds_the_map_of_all_heads():
    result = subprocess.run(
        [sys.executable, "-c", VIDEO_PROGRAM], env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    # The official code builds (heads, N, N) twice: 1.15 GB each here.
    assert int(result.stdout) < 8 * 5984 * 5984 * 4 // 16
