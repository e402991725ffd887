// Tiles and launch of gather and scatter.

#include "compaction/cuda/move_rows.cuh"

namespace pruneops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The widest unit that divides every address and length of the tensor.
int32_t unit_bytes(const MovedTensor& t) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst) |
                        static_cast<uint64_t>(t.src_row_stride) |
                        static_cast<uint64_t>(t.row_bytes);
  int32_t bytes = 16;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

// Fills what the launchers own in params.tensors. Returns the number of tiles.
int64_t plan_tiles(MoveParams& p) {
  int64_t tiles = 0;
  for (int32_t i = 0; i < p.num_tensors; ++i) {
    MovedTensor& t = p.tensors[i];
    t.unit_bytes = unit_bytes(t);
    t.row_units = t.row_bytes / t.unit_bytes;
    t.lanes_log2 = 0;
    while (t.lanes_log2 < kMoveThreadsLog2 && (int64_t{1} << t.lanes_log2) < t.row_units) {
      ++t.lanes_log2;
    }
    t.tiles_per_group = ceil_div(t.row_units, kMaxTileUnits);
    const int64_t group_rows = kRowsInFlight << (kMoveThreadsLog2 - t.lanes_log2);
    tiles += ceil_div(p.num_rows, group_rows) * t.tiles_per_group;
    t.end_tile = tiles;
  }
  return tiles;
}

template <bool kScatter>
cudaError_t launch(MoveParams& p, cudaStream_t stream) {
  const int64_t tiles = plan_tiles(p);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(move_rows_kernel<kScatter>, dim3(static_cast<unsigned>(tiles)),
                       dim3(kMoveThreads), 0, stream, p);
}

}  // namespace

cudaError_t launch_gather_rows(MoveParams p, cudaStream_t stream) {
  return launch<false>(p, stream);
}

cudaError_t launch_scatter_rows(MoveParams p, int32_t* inverse, cudaStream_t stream) {
  if (p.num_indices <= kMaxScannedIndices) return launch<true>(p, stream);
  cudaError_t error = cudaMemsetAsync(inverse, 0xff, p.num_rows * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(
      invert_indices_kernel, dim3(static_cast<unsigned>(ceil_div(p.num_indices, kMoveThreads))),
      dim3(kMoveThreads), 0, stream, p.indices, p.num_indices, inverse, p.num_rows);
  if (error != cudaSuccess) return error;
  p.indices = inverse;
  p.num_indices = p.num_rows;
  return launch<false>(p, stream);
}

}  // namespace pruneops
