// Torch wrappers of the selection kernels, CPU.

#include "selection/selection_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <memory>

#include "common/parallel_torch.h"
#include "common/segments.h"
#include "common/tensor_checks.h"
#include "selection/selection.h"

namespace pruneops {
namespace {

// The rule of one selection besides the scores.
struct Rule {
  std::optional<Tensor> keep_counts;  // [B], int32
  std::optional<float> threshold;
  const char* counts_name;
};

// capacity < 0 means exactly as many indices as rows are kept.
std::tuple<Tensor, Tensor> select(const Tensor& scores, const Tensor& cu_seqlens, const Rule& rule,
                                  int64_t capacity, const std::optional<Tensor>& protect) {
  check_cpu(scores, "scores");
  check_dim(scores, 1, "scores");
  check_floating(scores, "scores");
  const int64_t total = scores.size(0);
  STD_TORCH_CHECK(total <= kMaxRows, "scores has ", total, " rows; at most ", kMaxRows,
                  " are supported");
  STD_TORCH_CHECK(capacity <= kMaxRows, "capacity must be at most ", kMaxRows, ", got ", capacity);
  const Tensor values = checked_vector(scores, scores.scalar_type(), -1, "scores");
  const Tensor bounds = checked_cu_seqlens(cu_seqlens, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const auto counts =
      checked_vector(rule.keep_counts, ScalarType::Int, num_segments, rule.counts_name);
  const auto kept = checked_vector(protect, ScalarType::Bool, total, "protect");

  // One block of scratch: keys [total], then sanitized boundaries [B + 1].
  const std::unique_ptr<int32_t[]> scratch(new int32_t[total + num_segments + 1]);
  const std::unique_ptr<SegmentCut[]> cuts(new SegmentCut[num_segments]);
  int32_t* sanitized = scratch.get() + total;
  sanitize_cu_seqlens(static_cast<const int32_t*>(bounds.const_data_ptr()), num_segments + 1, total,
                      sanitized);

  SelectParams params{};
  params.scores = values.const_data_ptr();
  params.score_type = float_type(values);
  params.protect = kept ? static_cast<const uint8_t*>(kept->const_data_ptr()) : nullptr;
  params.cu_seqlens = sanitized;
  params.keep_counts = counts ? static_cast<const int32_t*>(counts->const_data_ptr()) : nullptr;
  params.use_threshold = rule.threshold.has_value();
  params.threshold = rule.threshold.value_or(0.0f);
  params.num_segments = num_segments;
  params.keys = scratch.get();
  params.cuts = cuts.get();

  const ParallelFor parallel = torch_parallel();
  select_cuts(params, parallel);
  const Tensor cu_seqlens_out = empty_cpu_like_dtype(bounds, {num_segments + 1});
  int32_t* offsets = static_cast<int32_t*>(cu_seqlens_out.mutable_data_ptr());
  const int64_t wanted = select_offsets(params, capacity < 0 ? kMaxRows : capacity, offsets);
  const int64_t length = capacity < 0 ? wanted : capacity;
  const Tensor indices = empty_cpu_like_dtype(bounds, {length});
  select_emit(params, offsets, static_cast<int32_t*>(indices.mutable_data_ptr()), length, parallel);
  return {indices, cu_seqlens_out};
}

std::tuple<Tensor, Tensor> segment_threshold_cpu(const Tensor& scores, const Tensor& cu_seqlens,
                                                 double threshold, int64_t capacity,
                                                 const std::optional<Tensor>& min_keep,
                                                 const std::optional<Tensor>& protect) {
  STD_TORCH_CHECK(capacity >= -1, "capacity must be -1 (exact) or at least 0, got ", capacity);
  const Rule rule{min_keep, static_cast<float>(threshold), "min_keep"};
  return select(scores, cu_seqlens, rule, capacity, protect);
}

}  // namespace

std::tuple<Tensor, Tensor> segment_topk_cpu(const Tensor& scores, const Tensor& cu_seqlens,
                                            const Tensor& keep_counts, int64_t capacity,
                                            const std::optional<Tensor>& protect) {
  STD_TORCH_CHECK(capacity >= 0, "capacity must be at least 0, got ", capacity);
  return select(scores, cu_seqlens, Rule{keep_counts, std::nullopt, "keep_counts"}, capacity,
                protect);
}

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("segment_topk", TORCH_BOX(&segment_topk_cpu));
  m.impl("segment_threshold", TORCH_BOX(&segment_threshold_cpu));
}

}  // namespace pruneops
