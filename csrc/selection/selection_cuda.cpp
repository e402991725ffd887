// Torch wrappers of the selection kernels, CUDA.

#include "selection/selection_cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "selection/cuda/select.h"

namespace pruneops {
namespace {

// The rule of one selection besides the scores.
struct Rule {
  std::optional<Tensor> keep_counts;  // [B], int32
  std::optional<float> threshold;
  const char* counts_name;
};

std::tuple<Tensor, Tensor> select(const Tensor& scores, const Tensor& cu_seqlens, const Rule& rule,
                                  int64_t capacity, const std::optional<Tensor>& protect) {
  check_cuda(scores, "scores");
  check_dim(scores, 1, "scores");
  check_floating(scores, "scores");
  const int64_t total = scores.size(0);
  STD_TORCH_CHECK(total <= kMaxRows, "scores has ", total, " rows; at most ", kMaxRows,
                  " are supported");
  STD_TORCH_CHECK(capacity >= 0 && capacity <= kMaxRows, "capacity must be in [0, ", kMaxRows,
                  "] on a CUDA device, got ", capacity);
  const int32_t device = scores.get_device_index();
  const DeviceGuard guard(device);
  const Tensor values = cuda_vector(scores, scores.scalar_type(), -1, device, "scores");
  const Tensor bounds = cuda_cu_seqlens(cu_seqlens, device, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const auto counts =
      cuda_vector(rule.keep_counts, ScalarType::Int, num_segments, device, rule.counts_name);
  const auto kept = cuda_vector(protect, ScalarType::Bool, total, device, "protect");
  const Tensor cu_seqlens_out = empty_cuda_int32({num_segments + 1}, device);
  const Tensor indices = empty_cuda_int32({capacity}, device);

  CudaSelectParams params{};
  params.scores = values.const_data_ptr();
  params.score_type = float_type(values);
  params.protect = const_data_of<uint8_t>(kept);
  params.cu_seqlens = static_cast<const int32_t*>(bounds.const_data_ptr());
  params.keep_counts = const_data_of<int32_t>(counts);
  params.use_threshold = rule.threshold.has_value();
  params.threshold = rule.threshold.value_or(0.0f);
  params.num_sms = cuda_device(device).num_sms;
  params.max_shared_bytes = cuda_device(device).max_shared_bytes;
  params.total = total;
  params.num_segments = num_segments;
  params.capacity = capacity;
  params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  params.cu_seqlens_out = static_cast<int32_t*>(cu_seqlens_out.mutable_data_ptr());
  const CudaSelectPlan plan = plan_select(params);
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace =
        empty_cuda_int32({plan.workspace_bytes / static_cast<int64_t>(sizeof(int32_t))}, device);
  }
  void* scratch = workspace.has_value() ? workspace->mutable_data_ptr() : nullptr;
  STD_CUDA_CHECK(launch_select(params, plan, scratch, current_cuda_stream(device)));
  return {indices, cu_seqlens_out};
}

std::tuple<Tensor, Tensor> segment_threshold_cuda(const Tensor& scores, const Tensor& cu_seqlens,
                                                  double threshold, int64_t capacity,
                                                  const std::optional<Tensor>& min_keep,
                                                  const std::optional<Tensor>& protect) {
  const Rule rule{min_keep, static_cast<float>(threshold), "min_keep"};
  return select(scores, cu_seqlens, rule, capacity, protect);
}

}  // namespace

std::tuple<Tensor, Tensor> segment_topk_cuda(const Tensor& scores, const Tensor& cu_seqlens,
                                             const Tensor& keep_counts, int64_t capacity,
                                             const std::optional<Tensor>& protect) {
  return select(scores, cu_seqlens, Rule{keep_counts, std::nullopt, "keep_counts"}, capacity,
                protect);
}

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("segment_topk", TORCH_BOX(&segment_topk_cuda));
  m.impl("segment_threshold", TORCH_BOX(&segment_threshold_cuda));
}

}  // namespace pruneops
