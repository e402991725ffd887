// torch wrappers of the attention scores on CPU: last_query_scores, column_scores, and
// kv_limit_from_positions.

#include <algorithm>
#include <string>

#include "attention/attention_torch.h"
#include "attention/positions.h"

namespace pruneops {
namespace {

Reduce checked_reduce(const std::string& value, const char* name) {
  if (value == "mean") return Reduce::kMean;
  if (value == "sum") return Reduce::kSum;
  STD_TORCH_CHECK(value == "max", name, " must be 'mean', 'sum' or 'max', got '", value, "'");
  return Reduce::kMax;
}

// The LSE of every query row, from a forward pass that leaves the values out.
Tensor compute_lse(const ScoreParams& scores, const std::vector<Segment>& segments,
                   const AttentionKernels& kernels, const ParallelFor& parallel, char* workspace) {
  Tensor lse = empty_float32({scores.heads.num_heads_q, scores.total_q});
  const std::vector<Block> blocks = forward_blocks(segments, scores.heads, scores.visibility,
                                                   kernels.forward_rows, parallel.num_threads);
  ForwardParams params{};
  params.q = scores.q;
  params.k = scores.k;
  params.softmax_lse = float_data(lse);
  params.lse_stride = scores.total_q;
  params.heads = scores.heads;
  params.visibility = scores.visibility;
  params.softmax_scale = scores.softmax_scale;
  params.segments = segments.data();
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
  kernels.forward(params, parallel, workspace);
  return lse;
}

// Runs the tiled kernel, computing the LSE first where it is not given.
void run_column_scores(ScoreParams params, const std::vector<Segment>& segments,
                       const AttentionKernels& kernels, const ParallelFor& parallel,
                       char* workspace) {
  std::optional<Tensor> lse;
  if (params.softmax_lse == nullptr) {
    lse = compute_lse(params, segments, kernels, parallel, workspace);
    params.softmax_lse = float_data(*lse);
    params.lse_stride = params.total_q;
  }
  constexpr int64_t kSmallestKeys = 16;
  const std::vector<Block> blocks = key_blocks(segments, params.visibility, kernels.score_keys,
                                               kSmallestKeys, 1, parallel.num_threads);
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
  kernels.column_scores(params, parallel, workspace);
}

// Runs the kernel for few query rows, whose raw scores fit in less memory than the keys.
void run_direct_scores(ScoreParams params, const std::vector<Segment>& segments,
                       const AttentionKernels& kernels, const ParallelFor& parallel,
                       char* workspace) {
  const Tensor raw = empty_float32({params.heads.num_heads_q * kDirectQueries, params.total_k});
  const Tensor row_lse = empty_float32({params.heads.num_heads_q, params.total_q});
  constexpr int64_t kLargestKeys = 512, kSmallestKeys = 128;
  const std::vector<Block> blocks =
      key_blocks(segments, params.visibility, kLargestKeys, kSmallestKeys, params.heads.num_heads_k,
                 parallel.num_threads);
  params.raw_scores = float_data(raw);
  params.row_lse = float_data(row_lse);
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
  kernels.direct_scores(params, parallel, workspace);
}

Tensor scores_of(const Tensor& q_in, const Tensor& k_in, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, const Visibility& visibility, double softmax_scale,
                 Reduce query_reduce, Reduce head_reduce, const float* softmax_lse,
                 bool few_queries) {
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, 3, "k");
  const Heads heads = checked_heads(q, k, "k");
  const int64_t total_q = q.size(0), total_k = k.size(0);
  const std::vector<Segment> segments =
      checked_packed_segments(cu_seqlens_q, cu_seqlens_k, total_q, total_k);
  Tensor scores = empty_float32({total_k});
  const Covered covered(segments);
  zero_uncovered_rows(scores, covered.k_begin, covered.k_end);

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  const Workspace workspace(kernels, heads, parallel);
  ScoreParams params{};
  params.q = row_view(q);
  params.k = row_view(k);
  params.softmax_lse = softmax_lse;
  params.lse_stride = total_q;
  params.scores = float_data(scores);
  params.total_k = total_k;
  params.total_q = total_q;
  params.heads = heads;
  params.visibility = visibility;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.head_reduce = head_reduce;
  params.query_reduce = query_reduce;
  params.segments = segments.data();
  params.num_segments = static_cast<int64_t>(segments.size());
  const bool direct =
      few_queries && std::all_of(segments.begin(), segments.end(),
                                 [](const Segment& s) { return s.q_len <= kDirectQueries; });
  const auto run = direct ? run_direct_scores : run_column_scores;
  run(params, segments, kernels, parallel, workspace.data());
  return scores;
}

Tensor last_query_scores_cpu(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, double softmax_scale,
                             std::string head_reduce, std::string query_reduce,
                             const std::optional<Tensor>& kv_limit) {
  check_dim(q, 3, "q");
  const auto limit = checked_vector(kv_limit, ScalarType::Int, q.size(0), "kv_limit");
  return scores_of(q, k, cu_seqlens_q, cu_seqlens_k, {false, int_data(limit)}, softmax_scale,
                   checked_reduce(query_reduce, "query_reduce"),
                   checked_reduce(head_reduce, "head_reduce"), nullptr, true);
}

Tensor column_scores_cpu(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                         const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
                         int64_t /*max_seqlen_k*/, bool causal, double softmax_scale,
                         std::string query_reduce, std::string head_reduce,
                         const std::optional<Tensor>& softmax_lse) {
  check_dim(q, 3, "q");
  std::optional<Tensor> lse;
  if (softmax_lse.has_value()) lse = checked_lse(*softmax_lse, q.size(1), q.size(0), "softmax_lse");
  return scores_of(
      q, k, cu_seqlens_q, cu_seqlens_k, {causal, nullptr}, softmax_scale,
      checked_reduce(query_reduce, "query_reduce"), checked_reduce(head_reduce, "head_reduce"),
      lse.has_value() ? static_cast<const float*>(lse->const_data_ptr()) : nullptr, false);
}

Tensor checked_positions(const Tensor& t, const char* name) {
  check_cpu(t, name);
  check_dim(t, 1, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(t.size(0) <= kMaxRows, name, " has too many rows");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class Q>
void fill_kv_limit(const Q* positions_q, const Tensor& positions_k,
                   const std::vector<Segment>& segments, int32_t* out) {
  if (positions_k.scalar_type() == ScalarType::Int) {
    kv_limit_from_positions(positions_q, int_data(positions_k), segments, out);
  } else {
    kv_limit_from_positions(positions_q, static_cast<const int64_t*>(positions_k.const_data_ptr()),
                            segments, out);
  }
}

Tensor kv_limit_from_positions_cpu(const Tensor& position_ids_q, const Tensor& position_ids_k,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  const Tensor positions_q = checked_positions(position_ids_q, "position_ids_q");
  const Tensor positions_k = checked_positions(position_ids_k, "position_ids_k");
  const int64_t total_q = positions_q.size(0);
  const std::vector<Segment> segments =
      checked_packed_segments(cu_seqlens_q, cu_seqlens_k, total_q, positions_k.size(0));
  // The limits are int32 like the boundaries.
  Tensor limit = empty_cpu_like_dtype(cu_seqlens_q, {total_q});
  const Covered covered(segments);
  zero_uncovered_rows(limit, covered.q_begin, covered.q_end);
  int32_t* out = static_cast<int32_t*>(limit.mutable_data_ptr());
  if (positions_q.scalar_type() == ScalarType::Int) {
    fill_kv_limit(int_data(positions_q), positions_k, segments, out);
  } else {
    fill_kv_limit(static_cast<const int64_t*>(positions_q.const_data_ptr()), positions_k, segments,
                  out);
  }
  return limit;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("last_query_scores", TORCH_BOX(&pruneops::last_query_scores_cpu));
  m.impl("column_scores", TORCH_BOX(&pruneops::column_scores_cpu));
  m.impl("kv_limit_from_positions", TORCH_BOX(&pruneops::kv_limit_from_positions_cpu));
}
