// Launches of policy_attention and its backward.

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
                       dim3(kTileThreads), 0, stream, p, reads_vectors(p.q), reads_vectors(p.k),
                       reads_vectors(p.v));
}

template <class T>
cudaError_t launch_forward(const CudaPolicyParams& p, cudaStream_t stream) {
  cudaError_t error = launch_bounds_of(p, stream);
  if (error != cudaSuccess) return error;
  error =
      launch_kernel(segment_sums_kernel<T>, policy_grid(p.num_segments * p.heads.num_heads_k, 1),
                    dim3(kSumThreads), 0, stream, p, p.v, reads_vectors(p.v), int64_t{1},
                    static_cast<const float*>(nullptr), p.sums);
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

template <class T>
cudaError_t launch_backward(const CudaPolicyBackwardParams& p, cudaStream_t stream) {
  const CudaPolicyParams& f = p.forward;
  const PolicyVectors vectors{reads_vectors(f.q), reads_vectors(f.k), reads_vectors(f.v),
                              reads_vectors(p.dout)};
  cudaError_t error = launch_bounds_of(f, stream);
  if (error != cudaSuccess) return error;
  error =
      launch_kernel(segment_sums_kernel<T>, policy_grid(f.num_segments * f.heads.num_heads_k, 1),
                    dim3(kSumThreads), 0, stream, f, p.dout, vectors.dout, f.heads.group,
                    static_cast<const float*>(f.softmax_sum), f.sums);
  if (error != cudaSuccess) return error;
  constexpr int64_t kRowsOfBlock = kDeltaThreads / kWarpSize;
  error = launch_kernel(policy_delta_kernel<T>,
                        policy_grid(parts_of(f.total * f.heads.num_heads_q, kRowsOfBlock), 1),
                        dim3(kDeltaThreads), 0, stream, p, vectors.dout, reads_vectors(f.out));
  if (error != cudaSuccess) return error;
  error = f.heads.head_dim <= kTile ? launch_query_gradient<T, 1>(p, vectors, stream)
                                    : launch_query_gradient<T, 2>(p, vectors, stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(policy_key_gradient_kernel<T>,
                        policy_grid(parts_of(f.total, kTile) * f.heads.num_heads_k,
                                    parts_of(f.heads.head_dim, kTile)),
                        dim3(kTileThreads), 0, stream, p, vectors);
  if (error != cudaSuccess) return error;
  return launch_kernel(finish_dpolicy_kernel, policy_grid(parts_of(f.total, kDpolicyThreads), 1),
                       dim3(kDpolicyThreads), 0, stream, p);
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
