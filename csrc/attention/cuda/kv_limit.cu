// Launch of the key limits.

#include "attention/cuda/kv_limit.cuh"

namespace pruneops {
namespace {

template <class Q>
auto limit_kernel(bool k_is_int64) {
  return k_is_int64 ? kv_limit_kernel<Q, int64_t> : kv_limit_kernel<Q, int32_t>;
}

}  // namespace

cudaError_t launch_kv_limit(const CudaKvLimitParams& p, cudaStream_t stream) {
  if (p.total_q == 0) return cudaSuccess;
  const cudaError_t error =
      launch_kernel(bounds_kernel, dim3(2), dim3(kBoundsThreads), 0, stream, p.cu_seqlens_q,
                    p.cu_seqlens_k, p.num_segments + 1, p.total_q, p.total_k, p.bounds);
  if (error != cudaSuccess) return error;
  const auto kernel = p.positions_q.is_int64 ? limit_kernel<int64_t>(p.positions_k.is_int64)
                                             : limit_kernel<int32_t>(p.positions_k.is_int64);
  const dim3 grid(static_cast<unsigned>((p.total_q + kLimitThreads - 1) / kLimitThreads));
  return launch_kernel(kernel, grid, dim3(kLimitThreads), 0, stream, p);
}

}  // namespace pruneops
