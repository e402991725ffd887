// The torch wrapper that other families call, CUDA.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace pruneops {

// Runs on the current stream of the scores' device.
//   scores       [total], fp32, bf16 or fp16
//   cu_seqlens   [B + 1], int32
//   keep_counts  [B], int32
//   protect      [total], bool
// Returns indices [capacity] and cu_seqlens_out [B + 1], int32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_topk_cuda(
    const torch::stable::Tensor& scores, const torch::stable::Tensor& cu_seqlens,
    const torch::stable::Tensor& keep_counts, int64_t capacity,
    const std::optional<torch::stable::Tensor>& protect);

}  // namespace pruneops
