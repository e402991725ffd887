"""policy_attention and its gradients."""

from __future__ import annotations

from pruneops.triton.policy_backward import KEY_GRADIENT, QUERY_GRADIENT, policy_attention_backward
from pruneops.triton.policy_forward import FORWARD, policy_attention
from pruneops.triton.tuning import Tunable

TUNABLES: tuple[Tunable, ...] = (FORWARD, QUERY_GRADIENT, KEY_GRADIENT)
KERNELS = {"policy_attention": policy_attention, "policy_attention_backward": policy_attention_backward}
