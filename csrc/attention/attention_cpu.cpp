// torch wrappers of the attention kernels on CPU: varlen_attention, its backward, decode_attention.

#include <algorithm>
#include <tuple>

#include "attention/attention_torch.h"

namespace pruneops {
namespace {

// Splits of fixed length make a result independent of the number of threads.
constexpr int64_t kKeysPerSplit = 256;
constexpr int64_t kMaxSplits = 256;

std::tuple<Tensor, Tensor> varlen_attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                const Tensor& v_in, const Tensor& cu_seqlens_q,
                                                const std::optional<Tensor>& cu_seqlens_k,
                                                int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                                bool causal, double softmax_scale,
                                                const std::optional<Tensor>& kv_limit,
                                                const std::optional<Tensor>& seqused_k) {
  STD_TORCH_CHECK(cu_seqlens_k.has_value() != seqused_k.has_value(),
                  "exactly one of cu_seqlens_k and seqused_k must be given");
  const int64_t k_dim = seqused_k.has_value() ? 4 : 3;
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, k_dim, "k");
  const Tensor v = checked_rows(v_in, k_dim, "v");
  const Heads heads = checked_heads(q, k, "k");
  check_same_sizes(v, k, "v");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  const int64_t total_q = q.size(0);
  const auto limit = checked_vector(kv_limit, ScalarType::Int, total_q, "kv_limit");

  std::vector<Segment> segments;
  if (seqused_k.has_value()) {
    const Tensor cu_q = checked_cu_seqlens(cu_seqlens_q, "cu_seqlens_q");
    const int64_t batch = cu_q.size(0) - 1;
    const Tensor used = checked_vector(*seqused_k, ScalarType::Int, batch, "seqused_k");
    check_size(k, 0, batch, "k");
    segments = slot_segments(int_data(cu_q), int_data(used), batch, total_q, k.size(1));
  } else {
    segments = checked_packed_segments(cu_seqlens_q, *cu_seqlens_k, total_q, k.size(0));
  }

  Tensor out = empty_cpu_like_dtype(q, {total_q, heads.num_heads_q, heads.head_dim});
  Tensor lse = empty_float32({heads.num_heads_q, total_q});
  const Covered covered(segments);
  zero_uncovered_rows(out, covered.q_begin, covered.q_end);
  reset_uncovered_lse(float_data(lse), heads.num_heads_q, total_q, covered.q_begin, covered.q_end);

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  const Visibility visibility{causal, int_data(limit)};
  const std::vector<Block> blocks =
      forward_blocks(segments, heads, visibility, kernels.forward_rows, parallel.num_threads);
  ForwardParams params{};
  set_problem(params, q, k, v, out, heads, visibility, softmax_scale, segments);
  set_blocks(params, blocks);
  params.softmax_lse = float_data(lse);
  const Workspace workspace(kernels, heads, parallel);
  kernels.forward(params, parallel, workspace.data());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward_cpu(
    const Tensor& dout_in, const std::optional<Tensor>& dsoftmax_lse, const Tensor& q_in,
    const Tensor& k_in, const Tensor& v_in, const Tensor& out_in, const Tensor& softmax_lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, bool causal, double softmax_scale,
    const std::optional<Tensor>& kv_limit) {
  const Tensor dout = checked_rows(dout_in, 3, "dout");
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, 3, "k");
  const Tensor v = checked_rows(v_in, 3, "v");
  const Tensor out = checked_rows(out_in, 3, "out");
  const Heads heads = checked_heads(q, k, "k");
  check_same_sizes(v, k, "v");
  check_same_sizes(dout, q, "dout");
  check_same_sizes(out, q, "out");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  const int64_t total_q = q.size(0), total_k = k.size(0);
  const auto limit = checked_vector(kv_limit, ScalarType::Int, total_q, "kv_limit");
  const Tensor lse = checked_lse(softmax_lse, heads.num_heads_q, total_q, "softmax_lse");
  std::optional<Tensor> dlse;
  if (dsoftmax_lse.has_value()) {
    dlse = checked_lse(*dsoftmax_lse, heads.num_heads_q, total_q, "dsoftmax_lse");
  }
  const std::vector<Segment> segments =
      checked_packed_segments(cu_seqlens_q, cu_seqlens_k, total_q, total_k);

  Tensor dq = empty_cpu_like_dtype(q, {total_q, heads.num_heads_q, heads.head_dim});
  Tensor dk = empty_cpu_like_dtype(k, {total_k, heads.num_heads_k, heads.head_dim});
  Tensor dv = empty_cpu_like_dtype(v, {total_k, heads.num_heads_k, heads.head_dim});
  const Covered covered(segments);
  zero_uncovered_rows(dq, covered.q_begin, covered.q_end);
  zero_uncovered_rows(dk, covered.k_begin, covered.k_end);
  zero_uncovered_rows(dv, covered.k_begin, covered.k_end);
  const Tensor accumulator =
      empty_float32({total_q, heads.num_heads_q, padded_head_dim(heads.head_dim)});
  const Tensor delta = empty_float32({total_q, heads.num_heads_q});

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  const Visibility visibility{causal, int_data(limit)};
  const BackwardBlocks blocks = backward_blocks(segments, heads, visibility, kernels.backward_rows,
                                                kernels.backward_keys, parallel.num_threads);
  BackwardParams params{};
  set_problem(params, q, k, v, out, heads, visibility, softmax_scale, segments);
  set_blocks(params, blocks);
  set_gradients(params, dout, dq, dk, dv, accumulator, delta);
  params.softmax_lse = static_cast<const float*>(lse.const_data_ptr());
  params.dsoftmax_lse =
      dlse.has_value() ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr;
  const Workspace workspace(kernels, heads, parallel);
  kernels.backward(params, parallel, workspace.data());
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> decode_attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                        const Tensor& v_in, const Tensor& seqused_k,
                                                        double softmax_scale, int64_t num_splits,
                                                        bool return_scores) {
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, 4, "k_cache");
  const Tensor v = checked_rows(v_in, 4, "v_cache");
  const Heads heads = checked_heads(q, k, "k_cache");
  check_same_sizes(v, k, "v_cache");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v_cache must have the dtype of q");
  STD_TORCH_CHECK(num_splits >= 0, "num_splits must be 0 or more, got ", num_splits);
  const int64_t batch = q.size(0), capacity = k.size(1);
  check_size(k, 0, batch, "k_cache");
  const Tensor used = checked_vector(seqused_k, ScalarType::Int, batch, "seqused_k");

  std::vector<int32_t> lengths(batch);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    lengths[b] = static_cast<int32_t>(std::clamp<int64_t>(int_data(used)[b], 0, capacity));
    longest = std::max<int64_t>(longest, lengths[b]);
  }
  if (num_splits == 0) num_splits = (longest + kKeysPerSplit - 1) / kKeysPerSplit;
  num_splits = std::clamp<int64_t>(num_splits, 1, kMaxSplits);

  Tensor out = empty_cpu_like_dtype(q, {batch, heads.num_heads_q, heads.head_dim});
  Tensor lse = empty_float32({heads.num_heads_q, batch});
  Tensor scores = return_scores ? empty_float32({batch, capacity}) : empty_float32({0, 0});
  const int64_t raw_rows = return_scores ? batch * heads.num_heads_q : 0;
  const Tensor raw_scores = empty_float32({raw_rows, capacity});
  const int64_t partials = num_splits * batch * heads.num_heads_q;
  const Tensor partial_out = empty_float32({partials, heads.head_dim});
  const Tensor partial_max = empty_float32({partials});
  const Tensor partial_sum = empty_float32({partials});

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  DecodeParams params{};
  params.q = row_view(q);
  params.k = row_view(k);
  params.v = row_view(v);
  params.out = row_view(out);
  params.softmax_lse = float_data(lse);
  params.scores = return_scores ? float_data(scores) : nullptr;
  params.raw_scores = return_scores ? float_data(raw_scores) : nullptr;
  params.partial_out = float_data(partial_out);
  params.partial_max = float_data(partial_max);
  params.partial_sum = float_data(partial_sum);
  params.lengths = lengths.data();
  params.batch = batch;
  params.capacity = capacity;
  params.num_splits = num_splits;
  params.heads = heads;
  params.softmax_scale = static_cast<float>(softmax_scale);
  const Workspace workspace(kernels, heads, parallel);
  kernels.decode(params, parallel, workspace.data());
  return {out, lse, scores};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&pruneops::varlen_attention_cpu));
  m.impl("varlen_attention_backward", TORCH_BOX(&pruneops::varlen_attention_backward_cpu));
  m.impl("decode_attention", TORCH_BOX(&pruneops::decode_attention_cpu));
}
