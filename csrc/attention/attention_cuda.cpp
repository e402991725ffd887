// Torch wrappers of the attention scores, CUDA: last_query_scores, column_scores,
// kv_limit_from_positions.

#include "attention/attention_cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "attention/cuda/scores.h"

namespace pruneops {
namespace {

struct ScoreArguments {
  Visibility visibility;
  double softmax_scale;
  std::string head_reduce;
  std::string query_reduce;
  const float* softmax_lse;  // [num_heads_q, total_q] or null
  bool often_few_queries;
};

Tensor scores_of(const Tensor& q_in, const Tensor& k_in, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, const ScoreArguments& arguments) {
  const int32_t device = q_in.get_device_index();
  const Tensor q = cuda_rows(q_in, device, "q");
  const Tensor k = cuda_rows(k_in, device, "k");
  const Boundaries boundaries(cu_seqlens_q, cu_seqlens_k, device);
  CudaScoreParams params{};
  params.q = row_view(q);
  params.k = row_view(k);
  params.heads = checked_heads(q, k, "k");
  boundaries.put_into(params);
  params.total_q = q.size(0);
  params.total_k = k.size(0);
  params.visibility = arguments.visibility;
  params.softmax_scale = static_cast<float>(arguments.softmax_scale);
  params.head_reduce = checked_reduce(arguments.head_reduce, "head_reduce");
  params.query_reduce = checked_reduce(arguments.query_reduce, "query_reduce");
  params.softmax_lse = arguments.softmax_lse;
  const Tensor scores = empty_cuda_float32({params.total_k}, device);
  params.scores = float_data(scores);
  const ScorePlan plan = plan_scores(params, arguments.often_few_queries);
  const Tensor workspace = empty_cuda_float32({plan.workspace_floats}, device);
  params.workspace = float_data(workspace);
  STD_CUDA_CHECK(launch_scores(params, plan, current_cuda_stream(device)));
  return scores;
}

Tensor last_query_scores_cuda(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, double softmax_scale,
                              std::string head_reduce, std::string query_reduce,
                              const std::optional<Tensor>& kv_limit) {
  check_cuda(q, "q");
  check_dim(q, 3, "q");
  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  const auto limit = cuda_vector(kv_limit, ScalarType::Int, q.size(0), device, "kv_limit");
  return scores_of(
      q, k, cu_seqlens_q, cu_seqlens_k,
      {{false, int_data(limit)}, softmax_scale, head_reduce, query_reduce, nullptr, true});
}

Tensor column_scores_cuda(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                          const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
                          int64_t /*max_seqlen_k*/, bool causal, double softmax_scale,
                          std::string query_reduce, std::string head_reduce,
                          const std::optional<Tensor>& softmax_lse) {
  check_cuda(q, "q");
  check_dim(q, 3, "q");
  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  std::optional<Tensor> lse;
  if (softmax_lse.has_value()) {
    check_cuda(*softmax_lse, device, "softmax_lse");
    check_lse(*softmax_lse, q.size(1), q.size(0), "softmax_lse");
    lse = softmax_lse->is_contiguous() ? *softmax_lse : torch::stable::contiguous(*softmax_lse);
  }
  const float* lse_data =
      lse.has_value() ? static_cast<const float*>(lse->const_data_ptr()) : nullptr;
  return scores_of(q, k, cu_seqlens_q, cu_seqlens_k,
                   {{causal, nullptr}, softmax_scale, head_reduce, query_reduce, lse_data, false});
}

Tensor cuda_positions(const Tensor& t, int32_t device, const char* name) {
  check_cuda(t, device, name);
  check_positions(t, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

CudaPositions positions_data(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long};
}

Tensor kv_limit_from_positions_cuda(const Tensor& position_ids_q, const Tensor& position_ids_k,
                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  check_cuda(position_ids_q, "position_ids_q");
  const int32_t device = position_ids_q.get_device_index();
  const DeviceGuard guard(device);
  const Tensor positions_q = cuda_positions(position_ids_q, device, "position_ids_q");
  const Tensor positions_k = cuda_positions(position_ids_k, device, "position_ids_k");
  const Boundaries boundaries(cu_seqlens_q, cu_seqlens_k, device);
  CudaKvLimitParams params{};
  params.positions_q = positions_data(positions_q);
  params.positions_k = positions_data(positions_k);
  boundaries.put_into(params);
  params.total_q = positions_q.size(0);
  params.total_k = positions_k.size(0);
  const Tensor kv_limit = empty_cuda_int32({params.total_q}, device);
  params.kv_limit = static_cast<int32_t*>(kv_limit.mutable_data_ptr());
  STD_CUDA_CHECK(launch_kv_limit(params, current_cuda_stream(device)));
  return kv_limit;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("last_query_scores", TORCH_BOX(&pruneops::last_query_scores_cuda));
  m.impl("column_scores", TORCH_BOX(&pruneops::column_scores_cuda));
  m.impl("kv_limit_from_positions", TORCH_BOX(&pruneops::kv_limit_from_positions_cuda));
}
