// Torch wrapper of decode_attention, CUDA.

#include <tuple>

#include "attention/attention_cuda.h"
#include "attention/cuda/decode.h"

namespace pruneops {
namespace {

// Queries or cache slots of fp32, bf16 or fp16 on the device, each head's elements contiguous. A
// copy is made of 16-bit heads that could lie on 16 bytes but do not: to read them element by
// element is slow.
Tensor decode_rows(const Tensor& t, int64_t dim, int32_t device, const char* name) {
  check_cuda(t, device, name);
  check_dim(t, dim, name);
  check_floating(t, name);
  bool good = t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1;
  if (t.element_size() == 2 && t.size(dim - 1) % 8 == 0) {
    good = good && begins_on_16_bytes(row_view(t));
  }
  return good ? t : dense_copy(t);
}

std::tuple<Tensor, Tensor, Tensor> decode_attention_cuda(const Tensor& q_in, const Tensor& k_in,
                                                         const Tensor& v_in,
                                                         const Tensor& seqused_k,
                                                         double softmax_scale, int64_t num_splits,
                                                         bool return_scores) {
  check_cuda(q_in, "q");
  const int32_t device = q_in.get_device_index();
  const DeviceGuard guard(device);
  const Tensor q = decode_rows(q_in, 3, device, "q");
  const Tensor k = decode_rows(k_in, 4, device, "k_cache");
  const Tensor v = decode_rows(v_in, 4, device, "v_cache");
  const Heads heads = checked_heads(q, k, "k_cache");
  check_same_sizes(v, k, "v_cache");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v_cache must have the dtype of q");
  STD_TORCH_CHECK(num_splits >= 0, "num_splits must be 0 or more, got ", num_splits);
  const int64_t batch = q.size(0), capacity = k.size(1);
  check_size(k, 0, batch, "k_cache");
  const Tensor used = cuda_vector(seqused_k, ScalarType::Int, batch, device, "seqused_k");

  const Tensor out = empty_cuda_like_dtype(q, {batch, heads.num_heads_q, heads.head_dim});
  const Tensor lse = empty_cuda_float32({heads.num_heads_q, batch}, device);
  const Tensor scores = return_scores ? empty_cuda_float32({batch, capacity}, device)
                                      : empty_cuda_float32({0, 0}, device);
  CudaDecodeParams params{};
  params.q = row_view(q);
  params.k = row_view(k);
  params.v = row_view(v);
  params.out = row_view(out);
  params.heads = heads;
  params.lengths = int_data(used);
  params.batch = batch;
  params.capacity = capacity;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.softmax_lse = float_data(lse);
  params.scores = scores.numel() > 0 ? float_data(scores) : nullptr;
  const DecodePlan plan = plan_decode(params, num_splits);
  const Tensor workspace = empty_cuda_float32({plan.workspace_floats}, device);
  params.workspace = float_data(workspace);
  STD_CUDA_CHECK(launch_decode(params, plan, current_cuda_stream(device)));
  return {out, lse, scores};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&pruneops::decode_attention_cuda));
}
