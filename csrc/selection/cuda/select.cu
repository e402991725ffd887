// Launch of the selection kernels.

#include "selection/cuda/select.cuh"

namespace pruneops {
namespace {

// Shared memory of a block that does not ask for more, and the part of it that is not for keys: the
// static variables with room for alignment.
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kStaticBytes = 9 * 1024;
static_assert(sizeof(SelectShared) + 128 <= kStaticBytes, "the cached keys do not fit");

// Keys that each block caches. Where every block has a multiprocessor to itself it may take all
// shared memory there is. The host does not know the lengths, only that few segments are more than
// four times as long as the average; those are read from global memory again in each pass.
int64_t cached_keys(const CudaSelectParams& p) {
  const int64_t shared = p.num_segments <= p.num_sms ? p.max_shared_bytes : kSharedBytes;
  const int64_t fit = (shared - kStaticBytes) / static_cast<int64_t>(sizeof(uint32_t));
  const int64_t likely = p.num_segments > 4 ? p.total / p.num_segments * 4 : p.total;
  // What every block may have anyway costs nothing.
  const int64_t free = (kSharedBytes - kStaticBytes) / static_cast<int64_t>(sizeof(uint32_t));
  const int64_t wanted = likely > free ? likely : free;
  const int64_t keys = wanted < fit ? wanted : fit;
  return keys < p.total ? keys : p.total;
}

// More threads pay off as long as each has a few rows; many short segments share a multiprocessor.
int num_threads(const CudaSelectParams& p) {
  const int64_t rows = p.total / (p.num_segments > 0 ? p.num_segments : 1);
  if (rows <= 256) return 128;
  if (rows <= 1024) return 256;
  return rows <= 8192 ? 512 : 1024;
}

template <typename Score>
cudaError_t launch(const CudaSelectParams& p, cudaStream_t stream) {
  const int64_t keys = cached_keys(p);
  const unsigned blocks = static_cast<unsigned>(p.num_segments > 0 ? p.num_segments : 1);
  return launch_kernel(select_kernel<Score>, dim3(blocks), dim3(num_threads(p)),
                       keys * sizeof(uint32_t), stream, p, keys);
}

}  // namespace

cudaError_t launch_select(const CudaSelectParams& p, cudaStream_t stream) {
  if (p.num_segments > 1) {
    const cudaError_t error =
        launch_kernel(prepare_select_kernel, dim3(1), dim3(256), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  switch (p.score_type) {
    case FloatType::kBFloat16:
      return launch<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch<Half>(p, stream);
    default:
      return launch<float>(p, stream);
  }
}

}  // namespace pruneops
