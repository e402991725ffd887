// torch wrappers of policy_attention and its backward on CPU.

#include <tuple>

#include "attention/attention_torch.h"

namespace pruneops {
namespace {

// One float32 number a packed row.
Tensor checked_policy(const Tensor& policy, int64_t total) {
  return checked_vector(policy, ScalarType::Float, total, "policy");
}

std::tuple<Tensor, Tensor, Tensor> policy_attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                        const Tensor& v_in, const Tensor& policy_in,
                                                        const Tensor& cu_seqlens,
                                                        int64_t /*max_seqlen*/,
                                                        double softmax_scale, double epsilon) {
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, 3, "k");
  const Tensor v = checked_rows(v_in, 3, "v");
  const Heads heads = checked_heads(q, k, "k");
  const int64_t total = q.size(0);
  check_size(k, 0, total, "k");
  check_same_sizes(v, k, "v");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  const Tensor policy = checked_policy(policy_in, total);
  const std::vector<Segment> segments =
      checked_packed_segments(cu_seqlens, cu_seqlens, total, total);
  const int64_t num_segments = static_cast<int64_t>(segments.size());

  Tensor out = empty_cpu_like_dtype(q, {total, heads.num_heads_q, heads.head_dim});
  Tensor softmax_max = empty_float32({heads.num_heads_q, total});
  Tensor softmax_sum = empty_float32({heads.num_heads_q, total});
  const Covered covered(segments);
  zero_uncovered_rows(out, covered.q_begin, covered.q_end);
  reset_uncovered_lse(float_data(softmax_max), heads.num_heads_q, total, covered.q_begin,
                      covered.q_end);
  fill_uncovered_rows(float_data(softmax_sum), heads.num_heads_q, total, covered.q_begin,
                      covered.q_end, 0.0f);
  const Tensor value_sums =
      empty_float32({num_segments, heads.num_heads_k, padded_head_dim(heads.head_dim)});

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  const Visibility visibility{true, nullptr};
  const std::vector<Block> blocks =
      forward_blocks(segments, heads, visibility, kernels.forward_rows, parallel.num_threads);
  PolicyForwardParams params{};
  set_problem(params.attention, q, k, v, out, heads, visibility, softmax_scale, segments);
  set_blocks(params.attention, blocks);
  params.policy = static_cast<const float*>(policy.const_data_ptr());
  params.epsilon = static_cast<float>(epsilon);
  params.softmax_max = float_data(softmax_max);
  params.softmax_sum = float_data(softmax_sum);
  params.value_sums = float_data(value_sums);
  params.num_segments = num_segments;
  const Workspace workspace(kernels, heads, parallel);
  kernels.policy_forward(params, parallel, workspace.data());
  return {out, softmax_max, softmax_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention_backward_cpu(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& policy_in, const Tensor& out_in, const Tensor& softmax_max,
    const Tensor& softmax_sum, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
    double softmax_scale, double epsilon) {
  const Tensor dout = checked_rows(dout_in, 3, "dout");
  const Tensor q = checked_rows(q_in, 3, "q");
  const Tensor k = checked_rows(k_in, 3, "k");
  const Tensor v = checked_rows(v_in, 3, "v");
  const Tensor out = checked_rows(out_in, 3, "out");
  const Heads heads = checked_heads(q, k, "k");
  const int64_t total = q.size(0);
  check_size(k, 0, total, "k");
  check_same_sizes(v, k, "v");
  check_same_sizes(dout, q, "dout");
  check_same_sizes(out, q, "out");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  const Tensor policy = checked_policy(policy_in, total);
  const Tensor max = checked_lse(softmax_max, heads.num_heads_q, total, "softmax_max");
  const Tensor sum = checked_lse(softmax_sum, heads.num_heads_q, total, "softmax_sum");
  const std::vector<Segment> segments =
      checked_packed_segments(cu_seqlens, cu_seqlens, total, total);
  const int64_t num_segments = static_cast<int64_t>(segments.size());

  Tensor dq = empty_cpu_like_dtype(q, {total, heads.num_heads_q, heads.head_dim});
  Tensor dk = empty_cpu_like_dtype(k, {total, heads.num_heads_k, heads.head_dim});
  Tensor dv = empty_cpu_like_dtype(v, {total, heads.num_heads_k, heads.head_dim});
  Tensor dpolicy = empty_float32({total});
  const Covered covered(segments);
  for (const Tensor& gradient : {dq, dk, dv, dpolicy}) {
    zero_uncovered_rows(gradient, covered.q_begin, covered.q_end);
  }
  const int64_t padded = padded_head_dim(heads.head_dim);
  const Tensor accumulator = empty_float32({total, heads.num_heads_q, padded});
  const Tensor delta = empty_float32({total, heads.num_heads_q});
  const Tensor dpolicy_of_heads = empty_float32({heads.num_heads_k, total});
  const Tensor dout_sums = empty_float32({num_segments, heads.num_heads_k, padded});

  const AttentionKernels& kernels = attention_kernels(active_isa());
  const ParallelFor parallel = torch_parallel();
  const Visibility visibility{true, nullptr};
  const BackwardBlocks blocks = backward_blocks(segments, heads, visibility, kernels.backward_rows,
                                                kernels.backward_keys, parallel.num_threads);
  PolicyBackwardParams params{};
  set_problem(params.attention, q, k, v, out, heads, visibility, softmax_scale, segments);
  set_blocks(params.attention, blocks);
  set_gradients(params.attention, dout, dq, dk, dv, accumulator, delta);
  params.policy = static_cast<const float*>(policy.const_data_ptr());
  params.epsilon = static_cast<float>(epsilon);
  params.softmax_max = static_cast<const float*>(max.const_data_ptr());
  params.softmax_sum = static_cast<const float*>(sum.const_data_ptr());
  params.dpolicy = float_data(dpolicy);
  params.dpolicy_of_heads = float_data(dpolicy_of_heads);
  params.dout_sums = float_data(dout_sums);
  params.num_segments = num_segments;
  const Workspace workspace(kernels, heads, parallel);
  kernels.policy_backward(params, parallel, workspace.data());
  return {dq, dk, dv, dpolicy};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("policy_attention", TORCH_BOX(&pruneops::policy_attention_cpu));
  m.impl("policy_attention_backward", TORCH_BOX(&pruneops::policy_attention_backward_cpu));
}
