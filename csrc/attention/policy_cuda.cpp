// torch wrappers of policy_attention and its backward, CUDA.

#include <tuple>

#include "attention/attention_cuda.h"
#include "attention/cuda/flash_backward.h"
#include "attention/cuda/policy.h"

namespace pruneops {
namespace {

// Inputs of both directions, checked; rows whose elements are not contiguous are copied.
struct PolicyInputs {
  int32_t device;
  Tensor q, k, v, policy, cu_seqlens;
  Tensor bounds;    // scratch [2, num_segments + 1] int32
  Tensor schedule;  // scratch [2 * flash_schedule_ints(num_segments)] int32, half for the forward
  Tensor sums;      // scratch [num_segments, num_heads_k, head_dim]

  PolicyInputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& policy_in,
               const Tensor& cu_seqlens_in)
      : device(q_in.get_device_index()),
        q(cuda_rows(q_in, device, "q")),
        k(cuda_rows(k_in, device, "k")),
        v(cuda_rows(v_in, device, "v")),
        policy(cuda_vector(policy_in, ScalarType::Float, q.size(0), device, "policy")),
        cu_seqlens(cuda_cu_seqlens(cu_seqlens_in, device, "cu_seqlens")),
        bounds(empty_cuda_int32({2, cu_seqlens.size(0)}, device)),
        schedule(empty_cuda_int32({2 * flash_schedule_ints(cu_seqlens.size(0) - 1)}, device)),
        sums(empty_cuda_float32({cu_seqlens.size(0) - 1, k.size(1), k.size(2)}, device)) {}

  CudaPolicyParams params(double softmax_scale, double epsilon) const {
    CudaPolicyParams params{};
    params.heads = checked_heads(q, k, "k");
    check_size(k, 0, q.size(0), "k");
    check_same_sizes(v, k, "v");
    STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
    params.q = row_view(q);
    params.k = row_view(k);
    params.v = row_view(v);
    params.policy = static_cast<const float*>(policy.const_data_ptr());
    params.cu_seqlens = int_data(cu_seqlens);
    params.num_segments = cu_seqlens.size(0) - 1;
    params.total = q.size(0);
    params.softmax_scale = static_cast<float>(softmax_scale);
    params.epsilon = static_cast<float>(epsilon);
    params.bounds = static_cast<int32_t*>(bounds.mutable_data_ptr());
    params.schedule = static_cast<int32_t*>(schedule.mutable_data_ptr());
    params.sums = float_data(sums);
    return params;
  }
};

// softmax_max or softmax_sum, contiguous.
Tensor row_numbers(const Tensor& t, const Heads& heads, int64_t total, int32_t device,
                   const char* name) {
  check_cuda(t, device, name);
  check_lse(t, heads.num_heads_q, total, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor, Tensor> policy_attention_cuda(const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const Tensor& policy,
                                                         const Tensor& cu_seqlens,
                                                         int64_t /*max_seqlen*/,
                                                         double softmax_scale, double epsilon) {
  check_cuda(q, "q");
  const DeviceGuard guard(q.get_device_index());
  const PolicyInputs inputs(q, k, v, policy, cu_seqlens);
  CudaPolicyParams params = inputs.params(softmax_scale, epsilon);
  const Heads& heads = params.heads;
  const Tensor out =
      empty_cuda_like_dtype(inputs.q, {params.total, heads.num_heads_q, heads.head_dim});
  const Tensor max = empty_cuda_float32({heads.num_heads_q, params.total}, inputs.device);
  const Tensor sum = empty_cuda_float32({heads.num_heads_q, params.total}, inputs.device);
  params.out = row_view(out);
  params.softmax_max = float_data(max);
  params.softmax_sum = float_data(sum);
  STD_CUDA_CHECK(launch_policy_forward(params, current_cuda_stream(inputs.device)));
  return {out, max, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention_backward_cuda(
    const Tensor& dout_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& policy,
    const Tensor& out_in, const Tensor& softmax_max, const Tensor& softmax_sum,
    const Tensor& cu_seqlens, int64_t /*max_seqlen*/, double softmax_scale, double epsilon) {
  check_cuda(q, "q");
  const DeviceGuard guard(q.get_device_index());
  const PolicyInputs inputs(q, k, v, policy, cu_seqlens);
  const int32_t device = inputs.device;
  CudaPolicyBackwardParams params{};
  params.forward = inputs.params(softmax_scale, epsilon);
  CudaPolicyParams& forward = params.forward;
  const Heads& heads = forward.heads;
  const Tensor dout = cuda_rows(dout_in, device, "dout");
  const Tensor out = cuda_rows(out_in, device, "out");
  check_same_sizes(dout, inputs.q, "dout");
  check_same_sizes(out, inputs.q, "out");
  STD_TORCH_CHECK(dout.scalar_type() == inputs.q.scalar_type(), "dout must have the dtype of q");
  STD_TORCH_CHECK(out.scalar_type() == inputs.q.scalar_type(), "out must have the dtype of q");
  const Tensor max = row_numbers(softmax_max, heads, forward.total, device, "softmax_max");
  const Tensor sum = row_numbers(softmax_sum, heads, forward.total, device, "softmax_sum");

  const std::vector<int64_t> like_keys{forward.total, heads.num_heads_k, heads.head_dim};
  const Tensor dq =
      empty_cuda_like_dtype(inputs.q, {forward.total, heads.num_heads_q, heads.head_dim});
  const Tensor dk = empty_cuda_like_dtype(inputs.k, like_keys);
  const Tensor dv = empty_cuda_like_dtype(inputs.v, like_keys);
  const Tensor dpolicy = empty_cuda_float32({forward.total}, device);
  const Tensor of_heads = empty_cuda_float32({heads.num_heads_k, forward.total}, device);
  const Tensor delta =
      empty_cuda_float32({2 * flash_row_terms(forward.total, heads.num_heads_q)}, device);
  forward.out = row_view(out);
  forward.softmax_max = float_data(max);
  forward.softmax_sum = float_data(sum);
  params.dout = row_view(dout);
  params.dq = row_view(dq);
  params.dk = row_view(dk);
  params.dv = row_view(dv);
  params.dpolicy = float_data(dpolicy);
  params.dpolicy_of_heads = float_data(of_heads);
  params.delta = float_data(delta);
  STD_CUDA_CHECK(launch_policy_backward(params, current_cuda_stream(device)));
  return {dq, dk, dv, dpolicy};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("policy_attention", TORCH_BOX(&pruneops::policy_attention_cuda));
  m.impl("policy_attention_backward", TORCH_BOX(&pruneops::policy_attention_backward_cuda));
}
