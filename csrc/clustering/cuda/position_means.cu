// Launches of the means over frames.

#include "clustering/cuda/position_means.cuh"

namespace pruneops {
namespace {

template <class T>
cudaError_t launch_positions(const CudaPositionMeansParams& p, cudaStream_t stream) {
  return launch_kernel(position_means_kernel<T>, dim3(static_cast<unsigned>(p.capacity)),
                       dim3(kPositionThreads), 0, stream, p, reads_quads(p.x));
}

}  // namespace

cudaError_t launch_position_means(const CudaPositionMeansParams& p, cudaStream_t stream) {
  if (p.capacity == 0) return cudaSuccess;
  const cudaError_t error =
      launch_kernel(position_layout_kernel, dim3(1), dim3(kLayoutThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  switch (p.x.type) {
    case FloatType::kBFloat16:
      return launch_positions<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_positions<Half>(p, stream);
    default:
      return launch_positions<float>(p, stream);
  }
}

}  // namespace pruneops
