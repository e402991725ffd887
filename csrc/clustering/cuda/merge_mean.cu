// Launches of the means of clusters.

#include "clustering/cuda/merge_mean.cuh"

namespace pruneops {
namespace {

// As many threads as a row has quads, so that one block has all of it where it can; at least as
// many as make looking through ids quick.
int threads_for(int64_t channels) {
  constexpr int kFewest = 64;
  int threads = kMergeThreads;
  while (threads > kFewest && threads / 2 * int64_t{kQuad} >= channels) threads /= 2;
  return threads;
}

template <class T>
cudaError_t launch_merge(const CudaMergeMeanParams& p, cudaStream_t stream) {
  constexpr int64_t kMostStretches = 1024;  // blocks go on to further ones
  const int threads = threads_for(p.x.channels);
  const int64_t at_once = threads * int64_t{kQuad};
  int64_t stretches = (p.x.channels + at_once - 1) / at_once;
  if (stretches < 1) stretches = 1;  // counts are written all the same
  if (stretches > kMostStretches) stretches = kMostStretches;
  const dim3 grid(static_cast<unsigned>(p.capacity), static_cast<unsigned>(stretches));
  return launch_kernel(merge_mean_kernel<T>, grid, dim3(threads), 0, stream, p, reads_quads(p.x));
}

}  // namespace

cudaError_t launch_merge_mean(const CudaMergeMeanParams& p, cudaStream_t stream) {
  if (p.capacity == 0) return cudaSuccess;
  const cudaError_t error =
      launch_kernel(merge_layout_kernel, dim3(1), dim3(kLayoutThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  switch (p.x.type) {
    case FloatType::kBFloat16:
      return launch_merge<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_merge<Half>(p, stream);
    default:
      return launch_merge<float>(p, stream);
  }
}

}  // namespace pruneops
