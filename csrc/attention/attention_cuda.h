// What the CUDA wrappers of the attention family share: rows of heads, boundaries.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "attention/attention_checks.h"
#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"

namespace pruneops {

// Rows of fp32, bf16 or fp16 heads on the device, each head's elements contiguous.
inline Tensor cuda_rows(const Tensor& t, int32_t device, const char* name) {
  check_cuda(t, device, name);
  check_dim(t, 3, name);
  check_floating(t, name);
  const bool unit = t.size(2) <= 1 || t.stride(2) == 1;
  return unit ? t : torch::stable::contiguous(t);
}

// A dense copy in memory of its own, which begins where torch's allocator puts it: aligned.
inline Tensor dense_copy(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  Tensor copy = empty_cuda_like_dtype(t, sizes);
  torch::stable::copy_(copy, t);
  return copy;
}

// Boundaries of packed queries and keys, which must agree in their number.
struct Boundaries {
  Tensor q, k;
  Tensor scratch;  // [2, num_segments + 1] int32
  int64_t num_segments;

  Boundaries(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int32_t device)
      : q(cuda_cu_seqlens(cu_seqlens_q, device, "cu_seqlens_q")),
        k(cuda_cu_seqlens(cu_seqlens_k, device, "cu_seqlens_k")),
        scratch(empty_cuda_int32({2, q.size(0)}, device)),
        num_segments(q.size(0) - 1) {
    check_size(k, 0, q.size(0), "cu_seqlens_k");
  }

  template <class Params>
  void put_into(Params& params) const {
    params.cu_seqlens_q = int_data(q);
    params.cu_seqlens_k = int_data(k);
    params.num_segments = num_segments;
    params.bounds = static_cast<int32_t*>(scratch.mutable_data_ptr());
  }
};

}  // namespace pruneops
