"""Run against an installed wheel, away from the source tree: does it import, and do its kernels compute?"""

import sys
from pathlib import Path

import torch

import pruneops
from pruneops import ops

location = Path(pruneops.__file__).resolve()
assert Path(sys.prefix).resolve() in location.parents, f"pruneops came from {location}, not from the wheel"
assert "transformers" not in sys.modules, "importing pruneops must not import transformers"
assert (location.parent / "assets" / "scene_llava" / "model.safetensors").is_file(), "the small model is missing"
print("pruneops", pruneops.__version__, "with torch", torch.__version__)
print(pruneops.build_info())

scores = torch.tensor([0.1, 0.9, 0.4, 0.3, 0.8, 0.8])
cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
indices, kept = ops.segment_topk(scores, cu_seqlens, [2, 1])
assert indices.tolist() == [1, 2, 4], indices
assert kept.tolist() == [0, 2, 3], kept

torch.manual_seed(0)
q, k, v = torch.randn(3, 6, 2, 16).unbind(0)
out = ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 3, 3, causal=True)
for begin, end in ((0, 3), (3, 6)):
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x[begin:end].transpose(0, 1) for x in (q, k, v)), is_causal=True
    ).transpose(0, 1)
    torch.testing.assert_close(out[begin:end], want)
print("kernels agree with torch")
