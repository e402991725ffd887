// Launches of policy_attention and its backward.

#include <initializer_list>

#include "attention/cuda/flash_policy.h"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/flash_tiles.h"
#include "attention/cuda/policy_backward.cuh"
#include "attention/cuda/policy_forward.cuh"

namespace pruneops {
namespace {

int64_t parts_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks go on to further work items beyond this many.
dim3 policy_grid(int64_t items, int64_t parts) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  return dim3(static_cast<unsigned>(items < kMostBlocks ? items : kMostBlocks),
              static_cast<unsigned>(parts));
}

cudaError_t launch_bounds_of(const CudaPolicyParams& p, cudaStream_t stream) {
  return launch_kernel(bounds_kernel, dim3(2), dim3(kBoundsThreads), 0, stream, p.cu_seqlens,
                       p.cu_seqlens, p.num_segments + 1, p.total, p.total, p.bounds);
}

template <class T, int kParts>
cudaError_t launch_forward_parts(const CudaPolicyParams& p, cudaStream_t stream) {
  return launch_kernel(policy_forward_kernel<T, kParts>,
                       policy_grid(parts_of(p.total, kTile) * p.heads.num_heads_q,
                                   parts_of(p.heads.head_dim, kParts * kTile)),
                       dim3(kTileThreads), 0, stream, p, begins_on_16_bytes(p.q),
                       begins_on_16_bytes(p.k), begins_on_16_bytes(p.v));
}

template <class T>
cudaError_t launch_value_sums(const CudaPolicyParams& p, cudaStream_t stream) {
  return launch_kernel(segment_sums_kernel<T>, policy_grid(p.num_segments * p.heads.num_heads_k, 1),
                       dim3(kSumThreads), 0, stream, p, p.v, begins_on_16_bytes(p.v), int64_t{1},
                       static_cast<const float*>(nullptr), p.sums);
}

bool forward_on_tensor_cores(const CudaPolicyParams& p) {
  bool reads = true;
  for (const RowView* rows : {&p.q, &p.k, &p.v, &p.out}) reads = reads && flash_reads(*rows);
  return reads && flash_supports(p.q.type, p.heads.head_dim);
}

FlashSegments segments_of(const CudaPolicyParams& p) {
  return {p.cu_seqlens, p.cu_seqlens, nullptr, 0, p.num_segments, p.total, p.total};
}

template <class T>
cudaError_t launch_forward_on_tensor_cores(const CudaPolicyParams& p, cudaStream_t stream) {
  FlashPolicyForwardParams flash{};
  flash.policy = p;
  flash.policy.bounds = FlashSchedule(p.schedule, p.num_segments).bounds;
  flash.segments = segments_of(p);
  flash.rows = {false, forward_tile_sm80(static_cast<int>(p.heads.head_dim)).rows,
                static_cast<int32_t>(p.heads.group), p.schedule};
  cudaError_t error = launch_flash_schedule(flash.segments, &flash.rows, 1, stream);
  if (error != cudaSuccess) return error;
  error = launch_value_sums<T>(flash.policy, stream);
  if (error != cudaSuccess) return error;
  switch (p.heads.head_dim) {
    case 64:
      return launch_flash_policy_forward_sm80<64>(flash, stream);
    case 80:
      return launch_flash_policy_forward_sm80<80>(flash, stream);
    case 96:
      return launch_flash_policy_forward_sm80<96>(flash, stream);
    default:
      return launch_flash_policy_forward_sm80<128>(flash, stream);
  }
}

template <class T>
cudaError_t launch_forward(const CudaPolicyParams& p, cudaStream_t stream) {
  if (forward_on_tensor_cores(p)) return launch_forward_on_tensor_cores<T>(p, stream);
  cudaError_t error = launch_bounds_of(p, stream);
  if (error != cudaSuccess) return error;
  error = launch_value_sums<T>(p, stream);
  if (error != cudaSuccess) return error;
  return p.heads.head_dim <= kTile ? launch_forward_parts<T, 1>(p, stream)
                                   : launch_forward_parts<T, 2>(p, stream);
}

template <class T, int kParts>
cudaError_t launch_query_gradient(const CudaPolicyBackwardParams& p, const PolicyVectors& vectors,
                                  cudaStream_t stream) {
  const CudaPolicyParams& f = p.forward;
  return launch_kernel(policy_query_gradient_kernel<T, kParts>,
                       policy_grid(parts_of(f.total, kTile) * f.heads.num_heads_q,
                                   parts_of(f.heads.head_dim, kParts * kTile)),
                       dim3(kTileThreads), 0, stream, p, vectors);
}

// Sums over segments of dout / (sum + epsilon).
template <class T>
cudaError_t launch_dout_sums(const CudaPolicyBackwardParams& p, cudaStream_t stream) {
  const CudaPolicyParams& f = p.forward;
  return launch_kernel(segment_sums_kernel<T>, policy_grid(f.num_segments * f.heads.num_heads_k, 1),
                       dim3(kSumThreads), 0, stream, f, p.dout, begins_on_16_bytes(p.dout),
                       f.heads.group, static_cast<const float*>(f.softmax_sum), f.sums);
}

cudaError_t launch_finish(const CudaPolicyBackwardParams& p, cudaStream_t stream) {
  return launch_kernel(finish_dpolicy_kernel,
                       policy_grid(parts_of(p.forward.total, kDpolicyThreads), 1),
                       dim3(kDpolicyThreads), 0, stream, p);
}

bool backward_on_tensor_cores(const CudaPolicyBackwardParams& p) {
  bool reads = true;
  for (const RowView* rows : {&p.dout, &p.dq, &p.dk, &p.dv}) reads = reads && flash_reads(*rows);
  return reads && forward_on_tensor_cores(p.forward);
}

template <class T>
cudaError_t launch_backward_on_tensor_cores(const CudaPolicyBackwardParams& p,
                                            cudaStream_t stream) {
  const CudaPolicyParams& f = p.forward;
  const int head_dim = static_cast<int>(f.heads.head_dim);
  const FlashOrder orders[] = {
      {true, key_gradient_tile_sm80(head_dim).held, 1, f.schedule},
      {false, query_gradient_tile_sm80(head_dim).held, static_cast<int32_t>(f.heads.group),
       f.schedule + flash_schedule_ints(f.num_segments)}};
  FlashPolicyBackwardParams flash{};
  flash.policy = p;
  flash.policy.forward.bounds = FlashSchedule(f.schedule, f.num_segments).bounds;
  flash.segments = segments_of(f);
  flash.keys = orders[0];
  flash.rows = orders[1];
  cudaError_t error = launch_flash_schedule(flash.segments, orders, 2, stream);
  if (error != cudaSuccess) return error;
  error = launch_dout_sums<T>(flash.policy, stream);
  if (error != cudaSuccess) return error;
  switch (head_dim) {
    case 64:
      error = launch_flash_policy_backward_sm80<64>(flash, stream);
      break;
    case 80:
      error = launch_flash_policy_backward_sm80<80>(flash, stream);
      break;
    case 96:
      error = launch_flash_policy_backward_sm80<96>(flash, stream);
      break;
    default:
      error = launch_flash_policy_backward_sm80<128>(flash, stream);
  }
  return error == cudaSuccess ? launch_finish(flash.policy, stream) : error;
}

template <class T>
cudaError_t launch_backward(const CudaPolicyBackwardParams& p, cudaStream_t stream) {
  if (backward_on_tensor_cores(p)) return launch_backward_on_tensor_cores<T>(p, stream);
  const CudaPolicyParams& f = p.forward;
  const PolicyVectors vectors{begins_on_16_bytes(f.q), begins_on_16_bytes(f.k),
                              begins_on_16_bytes(f.v), begins_on_16_bytes(p.dout)};
  cudaError_t error = launch_bounds_of(f, stream);
  if (error != cudaSuccess) return error;
  error = launch_dout_sums<T>(p, stream);
  if (error != cudaSuccess) return error;
  constexpr int64_t kRowsOfBlock = kPolicyDeltaThreads / kWarpSize;
  error = launch_kernel(
      policy_delta_kernel<T>, policy_grid(parts_of(f.total * f.heads.num_heads_q, kRowsOfBlock), 1),
      dim3(kPolicyDeltaThreads), 0, stream, p, vectors.dout, begins_on_16_bytes(f.out));
  if (error != cudaSuccess) return error;
  error = f.heads.head_dim <= kTile ? launch_query_gradient<T, 1>(p, vectors, stream)
                                    : launch_query_gradient<T, 2>(p, vectors, stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(policy_key_gradient_kernel<T>,
                        policy_grid(parts_of(f.total, kTile) * f.heads.num_heads_k,
                                    parts_of(f.heads.head_dim, kTile)),
                        dim3(kTileThreads), 0, stream, p, vectors);
  if (error != cudaSuccess) return error;
  return launch_finish(p, stream);
}

}  // namespace

cudaError_t launch_policy_forward(const CudaPolicyParams& p, cudaStream_t stream) {
  if (p.total == 0) return cudaSuccess;
  switch (p.q.type) {
    case FloatType::kBFloat16:
      return launch_forward<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_forward<Half>(p, stream);
    default:
      return launch_forward<float>(p, stream);
  }
}

cudaError_t launch_policy_backward(const CudaPolicyBackwardParams& p, cudaStream_t stream) {
  if (p.forward.total == 0) return cudaSuccess;
  switch (p.forward.q.type) {
    case FloatType::kBFloat16:
      return launch_backward<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_backward<Half>(p, stream);
    default:
      return launch_backward<float>(p, stream);
  }
}

}  // namespace pruneops
