// torch wrappers of attention on tensor cores, CUDA: varlen_attention and its backward.

#include <initializer_list>
#include <optional>
#include <tuple>

#include "attention/attention_cuda.h"
#include "attention/cuda/flash_backward.h"

namespace pruneops {
namespace {

// Whether the kernels can read these rows in place. An expanded tensor, with strides of 0, is none
// that Hopper's copies are documented for.
bool is_readable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return false;
  for (int64_t d = 0; d < last; ++d) {
    if (t.size(d) > 1 && t.stride(d) == 0) return false;
  }
  return flash_reads(row_view(t));
}

// bf16 or fp16 heads on the device, [rows, heads, head_dim] or slots of such rows; copied where the
// kernels cannot read them as they lie.
Tensor flash_rows(const Tensor& t, int64_t dim, int32_t device, const char* name) {
  check_cuda(t, device, name);
  check_dim(t, dim, name);
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " must be bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(flash_supports(float_type(t), t.size(dim - 1)), name,
                  " must have a head_dim of 64, 80, 96 or 128, got ", t.size(dim - 1));
  return is_readable(t) ? t : dense_copy(t);
}

FlashDevice flash_device(int32_t device) {
  const CudaDevice& facts = cuda_device(device);
  return {facts.num_sms, facts.compute_capability, facts.max_shared_bytes};
}

// What both directions take, checked.
struct FlashInputs {
  int32_t device;
  Tensor q, k, v, cu_seqlens_q;
  std::optional<Tensor> cu_seqlens_k, seqused_k, kv_limit;
  Heads heads;

  FlashInputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cu_q,
              const std::optional<Tensor>& cu_k, const std::optional<Tensor>& used,
              const std::optional<Tensor>& limit)
      : device(q_in.get_device_index()),
        q(flash_rows(q_in, 3, device, "q")),
        k(flash_rows(k_in, used.has_value() ? 4 : 3, device, "k")),
        v(flash_rows(v_in, used.has_value() ? 4 : 3, device, "v")),
        cu_seqlens_q(cuda_cu_seqlens(cu_q, device, "cu_seqlens_q")),
        kv_limit(cuda_vector(limit, ScalarType::Int, q.size(0), device, "kv_limit")),
        heads(checked_heads(q, k, "k")) {
    STD_TORCH_CHECK(cu_k.has_value() != used.has_value(),
                    "exactly one of cu_seqlens_k and seqused_k must be given");
    check_same_sizes(v, k, "v");
    check_dtype(v, q.scalar_type(), "v");
    if (used.has_value()) {
      seqused_k = cuda_vector(*used, ScalarType::Int, num_segments(), device, "seqused_k");
      check_size(k, 0, num_segments(), "k");
    } else {
      cu_seqlens_k = cuda_cu_seqlens(*cu_k, device, "cu_seqlens_k");
      check_size(*cu_seqlens_k, 0, cu_seqlens_q.size(0), "cu_seqlens_k");
    }
  }

  int64_t num_segments() const { return cu_seqlens_q.size(0) - 1; }

  FlashSegments segments() const {
    FlashSegments segments{};
    segments.cu_seqlens_q = int_data(cu_seqlens_q);
    segments.cu_seqlens_k = int_data(cu_seqlens_k);
    segments.seqused_k = int_data(seqused_k);
    segments.capacity = seqused_k.has_value() ? k.size(1) : 0;
    segments.num_segments = num_segments();
    segments.total_q = q.size(0);
    segments.total_k = seqused_k.has_value() ? 0 : k.size(0);
    // An empty seqused_k has no address. Without segments there are no keys either way, and
    // boundaries of none are clamped to 0.
    if (segments.seqused_k == nullptr && segments.cu_seqlens_k == nullptr) {
      segments.cu_seqlens_k = segments.cu_seqlens_q;
    }
    return segments;
  }

  // A tensor of the inputs' dtype for what has the sizes of `like`.
  Tensor empty_like(const Tensor& like) const {
    return empty_cuda_like_dtype(q, {like.size(0), like.size(1), like.size(2)});
  }

  // A launch's error; the build may lack the machine code.
  void check(cudaError_t error) const {
    const int capability = cuda_device(device).compute_capability;
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                    "pruneops was built without an attention kernel for a head_dim of ",
                    heads.head_dim, " on compute capability ", capability / 10, ".",
                    capability % 10, "; see PRUNEOPS_CUDA_ARCH_LIST and PRUNEOPS_FLASH_HEAD_DIMS");
    STD_CUDA_CHECK(error);
  }
};

std::tuple<Tensor, Tensor> varlen_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& cu_seqlens_q,
                                                 const std::optional<Tensor>& cu_seqlens_k,
                                                 int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                                 bool causal, double softmax_scale,
                                                 const std::optional<Tensor>& kv_limit,
                                                 const std::optional<Tensor>& seqused_k) {
  check_cuda(q, "q");
  const DeviceGuard guard(q.get_device_index());
  const FlashInputs inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, kv_limit);
  const int32_t device = inputs.device;
  FlashForwardParams params{};
  params.heads = inputs.heads;
  params.segments = inputs.segments();
  const int64_t total_q = params.segments.total_q;
  const Tensor out = inputs.empty_like(inputs.q);
  const Tensor lse = empty_cuda_float32({params.heads.num_heads_q, total_q}, device);
  if (total_q == 0) return {out, lse};
  const Tensor schedule = empty_cuda_int32({flash_schedule_ints(inputs.num_segments())}, device);
  params.q = row_view(inputs.q);
  params.k = row_view(inputs.k);
  params.v = row_view(inputs.v);
  params.out = row_view(out);
  params.softmax_lse = float_data(lse);
  params.visibility = {causal, int_data(inputs.kv_limit)};
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.schedule = data_of<int32_t>(schedule);
  inputs.check(launch_flash_forward(params, flash_device(device), current_cuda_stream(device)));
  return {out, lse};
}

// softmax_lse or its gradient, contiguous.
Tensor flash_lse(const Tensor& t, const FlashInputs& inputs, const char* name) {
  check_cuda(t, inputs.device, name);
  check_lse(t, inputs.heads.num_heads_q, inputs.q.size(0), name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// dout or out: rows like q.
Tensor rows_like_q(const Tensor& t, const FlashInputs& inputs, const char* name) {
  const Tensor rows = flash_rows(t, 3, inputs.device, name);
  check_same_sizes(rows, inputs.q, name);
  check_dtype(rows, inputs.q.scalar_type(), name);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward_cuda(
    const Tensor& dout_in, const std::optional<Tensor>& dsoftmax_lse, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out_in, const Tensor& softmax_lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, bool causal, double softmax_scale,
    const std::optional<Tensor>& kv_limit) {
  check_cuda(q, "q");
  const DeviceGuard guard(q.get_device_index());
  const FlashInputs inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, std::nullopt, kv_limit);
  const int32_t device = inputs.device;
  const Tensor dout = rows_like_q(dout_in, inputs, "dout");
  const Tensor out = rows_like_q(out_in, inputs, "out");
  const Tensor lse = flash_lse(softmax_lse, inputs, "softmax_lse");
  std::optional<Tensor> dlse;
  if (dsoftmax_lse.has_value()) dlse = flash_lse(*dsoftmax_lse, inputs, "dsoftmax_lse");

  FlashBackwardParams params{};
  params.heads = inputs.heads;
  params.segments = inputs.segments();
  Tensor dq = inputs.empty_like(inputs.q);
  Tensor dk = inputs.empty_like(inputs.k);
  Tensor dv = inputs.empty_like(inputs.v);
  if (dq.size(0) == 0 || dk.size(0) == 0) {
    for (Tensor* gradient : {&dq, &dk, &dv}) torch::stable::zero_(*gradient);
    return {dq, dk, dv};
  }
  const int64_t num_terms = flash_row_terms(params.segments.total_q, params.heads.num_heads_q);
  const Tensor row_terms = empty_cuda_float32({num_terms, 2}, device);
  const Tensor schedule =
      empty_cuda_int32({2 * flash_schedule_ints(inputs.num_segments())}, device);
  static_assert(sizeof(FlashRowTerms) == 2 * sizeof(float));
  params.q = row_view(inputs.q);
  params.k = row_view(inputs.k);
  params.v = row_view(inputs.v);
  params.out = row_view(out);
  params.dout = row_view(dout);
  params.softmax_lse = static_cast<const float*>(lse.const_data_ptr());
  params.dsoftmax_lse = const_data_of<float>(dlse);
  params.dq = row_view(dq);
  params.dk = row_view(dk);
  params.dv = row_view(dv);
  params.visibility = {causal, int_data(inputs.kv_limit)};
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.row_terms = data_of<FlashRowTerms>(row_terms);
  params.schedule = data_of<int32_t>(schedule);
  inputs.check(launch_flash_backward(params, flash_device(device), current_cuda_stream(device)));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("varlen_attention", TORCH_BOX(&pruneops::varlen_attention_cuda));
  m.impl("varlen_attention_backward", TORCH_BOX(&pruneops::varlen_attention_backward_cuda));
}
