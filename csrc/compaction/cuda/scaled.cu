// Launches of the weighted rows.

#include "compaction/cuda/scaled.cuh"

namespace pruneops {
namespace {

int64_t tiles_of(int64_t rows, int64_t tile_rows) { return (rows + tile_rows - 1) / tile_rows; }

// Large tiles where there are rows enough for every multiprocessor: each looks through all indices.
int tile_rows_for(int64_t total, int num_sms) {
  constexpr int64_t kTilesOfAnSm = 16;
  int rows = kScaledWarps;
  while (rows < kMaxScaledRows && total > kTilesOfAnSm * num_sms * rows) rows *= 2;
  return rows;
}

template <class T>
cudaError_t launch_forward(const CudaScatterScaledParams& p, int tile_rows, cudaStream_t stream) {
  const int64_t tiles = tiles_of(p.total, tile_rows);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  const bool wide = begin_on_16_bytes(p.x, p.type) && begin_on_16_bytes(p.residual, p.type) &&
                    begin_on_16_bytes(p.branch, p.type) &&
                    begin_on_16_bytes(p.out, p.columns, p.type);
  return launch_kernel(wide ? scatter_scaled_kernel<T, true> : scatter_scaled_kernel<T, false>,
                       dim3(static_cast<unsigned>(tiles)), dim3(kScaledThreads), 0, stream, p,
                       tile_rows);
}

template <class T>
cudaError_t launch_backward(const CudaScatterScaledGradParams& p, int tile_rows,
                            cudaStream_t stream) {
  const int64_t row_tiles = tiles_of(p.total, tile_rows);
  const int64_t tiles = row_tiles + tiles_of(p.kept, kMaxScaledRows);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  const bool wide = begin_on_16_bytes(p.dout, p.type) && begin_on_16_bytes(p.x, p.type) &&
                    begin_on_16_bytes(p.branch, p.type) &&
                    begin_on_16_bytes(p.dx, p.columns, p.type) &&
                    begin_on_16_bytes(p.dresidual, p.columns, p.type) &&
                    begin_on_16_bytes(p.dbranch, p.columns, p.type);
  return launch_kernel(
      wide ? scatter_scaled_backward_kernel<T, true> : scatter_scaled_backward_kernel<T, false>,
      dim3(static_cast<unsigned>(tiles)), dim3(kScaledThreads), 0, stream, p, tile_rows, row_tiles);
}

}  // namespace

cudaError_t launch_scatter_scaled(const CudaScatterScaledParams& p, int num_sms,
                                  cudaStream_t stream) {
  const int tile_rows = tile_rows_for(p.total, num_sms);
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch_forward<BFloat16>(p, tile_rows, stream);
    case FloatType::kFloat16:
      return launch_forward<Half>(p, tile_rows, stream);
    default:
      return launch_forward<float>(p, tile_rows, stream);
  }
}

cudaError_t launch_scatter_scaled_backward(const CudaScatterScaledGradParams& p, int num_sms,
                                           cudaStream_t stream) {
  const int tile_rows = tile_rows_for(p.total, num_sms);
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch_backward<BFloat16>(p, tile_rows, stream);
    case FloatType::kFloat16:
      return launch_backward<Half>(p, tile_rows, stream);
    default:
      return launch_backward<float>(p, tile_rows, stream);
  }
}

}  // namespace pruneops
