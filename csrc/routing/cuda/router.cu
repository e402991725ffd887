// Launches of the router.

#include "routing/cuda/router.cuh"

namespace pruneops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kBlockRows = 16;  // or more, so that there are at most kMaxBlocks
constexpr int64_t kMaxBlocks = 512;

int64_t block_rows(int64_t total) {
  const int64_t rows = ceil_div(total, kMaxBlocks);
  return rows > kBlockRows ? rows : kBlockRows;
}

// From one block's sums to the next, the sum of the bias included.
int64_t row_floats(int64_t columns) { return ceil_div(columns + 1, 4) * 4; }

template <class T>
cudaError_t launch_forward(const CudaRouterParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.total, kRouterWarps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const bool wide = begin_on_16_bytes(p.x, p.type) && begin_on_16_bytes(p.weight, 0, p.type);
  return launch_kernel(wide ? router_weights_kernel<T, true> : router_weights_kernel<T, false>,
                       dim3(static_cast<unsigned>(blocks)), dim3(kRouterThreads), 0, stream, p);
}

template <class T>
cudaError_t launch_backward(const CudaRouterGradParams& p, cudaStream_t stream) {
  const int64_t rows = block_rows(p.total), blocks = ceil_div(p.total, rows);
  const bool wide = begin_on_16_bytes(p.x, p.type) && begin_on_16_bytes(p.weight, 0, p.type) &&
                    begin_on_16_bytes(p.dx, p.columns, p.type);
  const int64_t columns_of_slice =
      kRouterThreads * (wide ? kPackElements<T, true> : kPackElements<T, false>);
  // At least one slice, which sums for the bias.
  const int64_t slices = p.columns > 0 ? ceil_div(p.columns, columns_of_slice) : 1;
  if (slices > INT32_MAX || p.columns > INT32_MAX) return cudaErrorInvalidValue;
  const cudaError_t error =
      launch_kernel(wide ? router_backward_kernel<T, true> : router_backward_kernel<T, false>,
                    dim3(static_cast<unsigned>(slices), static_cast<unsigned>(blocks)),
                    dim3(kRouterThreads), 0, stream, p, rows, row_floats(p.columns));
  if (error != cudaSuccess) return error;
  return launch_kernel(router_reduce_kernel<T>,
                       dim3(static_cast<unsigned>(ceil_div(p.columns + 1, kWarpSize))),
                       dim3(kRouterThreads), 0, stream, p, blocks, row_floats(p.columns));
}

}  // namespace

int64_t router_partials(int64_t total, int64_t columns) {
  return ceil_div(total, block_rows(total)) * row_floats(columns);
}

cudaError_t launch_router_weights(const CudaRouterParams& p, cudaStream_t stream) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch_forward<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_forward<Half>(p, stream);
    default:
      return launch_forward<float>(p, stream);
  }
}

cudaError_t launch_router_weights_backward(const CudaRouterGradParams& p, cudaStream_t stream) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch_backward<BFloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_backward<Half>(p, stream);
    default:
      return launch_backward<float>(p, stream);
  }
}

}  // namespace pruneops
