// Gather and scatter of rows, any number of tensors in one launch.
//
// The rows of every tensor are cut into tiles of up to 64 KiB, and every block moves one tile. A
// thread moves 16 bytes at a time (less only where a tensor's alignment forces it) and has
// several rows in flight at once. Short rows (positions, labels) take few lanes each, so that warps
// stay full.

#pragma once

#include "common/cuda_kernel.h"
#include "compaction/cuda/move_rows.h"

namespace pruneops {

constexpr int kMoveThreads = 256;
constexpr int kMoveThreadsLog2 = 8;
// Rows that a thread loads before it stores the first.
constexpr int kRowsInFlight = 4;
constexpr int kMaxTileRows = kRowsInFlight * kMoveThreads;
// Longer rows are cut.
constexpr int64_t kMaxTileUnits = 1024;

__device__ __forceinline__ bool is_row(int32_t index, int64_t num_rows) {
  return index >= 0 && index < num_rows;
}

// Units [begin, end) of the rows from first_row on.
//   source_rows  [rows of the tile], row of src or out of range
template <typename Unit>
__device__ __forceinline__ void move_tile(const MovedTensor& t, const int32_t* source_rows,
                                          int64_t first_row, int64_t begin, int64_t end,
                                          const MoveParams& p) {
  const int lanes = 1 << t.lanes_log2;
  const int rows_per_pass = kMoveThreads >> t.lanes_log2;
  const int row_of_thread = static_cast<int>(threadIdx.x) >> t.lanes_log2;
  const Unit* src[kRowsInFlight];
  Unit* dst[kRowsInFlight];
#pragma unroll
  for (int k = 0; k < kRowsInFlight; ++k) {
    const int row_of_tile = row_of_thread + k * rows_per_pass;
    const int64_t row = first_row + row_of_tile;
    src[k] = nullptr;
    dst[k] = nullptr;
    if (row >= p.num_rows) continue;
    dst[k] = reinterpret_cast<Unit*>(t.dst + row * t.row_bytes);
    const int32_t source = source_rows[row_of_tile];
    if (is_row(source, p.num_src_rows)) {
      src[k] = reinterpret_cast<const Unit*>(t.src + source * t.src_row_stride);
    }
  }
  for (int64_t unit = begin + (threadIdx.x & (lanes - 1)); unit < end; unit += lanes) {
    Unit values[kRowsInFlight];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      values[k] = src[k] != nullptr ? __ldg(src[k] + unit) : Unit{};
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (dst[k] != nullptr) dst[k][unit] = values[k];
    }
  }
}

// One block a tile. kScatter: indices say where source rows go; else where rows come from.
template <bool kScatter>
__global__ void __launch_bounds__(kMoveThreads)
    move_rows_kernel(const __grid_constant__ MoveParams p) {
  __shared__ int32_t source_rows[kMaxTileRows];
  const int64_t tile = blockIdx.x;
  int which = 0;
  while (tile >= p.tensors[which].end_tile) ++which;
  const MovedTensor& t = p.tensors[which];
  const int64_t tile_of_tensor = tile - (which > 0 ? p.tensors[which - 1].end_tile : 0);
  const int64_t group = tile_of_tensor / t.tiles_per_group;
  const int tile_rows = kRowsInFlight << (kMoveThreadsLog2 - t.lanes_log2);
  const int64_t first_row = group * tile_rows;

  for (int i = threadIdx.x; i < tile_rows; i += kMoveThreads) {
    const int64_t row = first_row + i;
    source_rows[i] = !kScatter && row < p.num_indices ? p.indices[row] : -1;
  }
  __syncthreads();
  if (kScatter) {
    for (int64_t i = threadIdx.x; i < p.num_indices; i += kMoveThreads) {
      const int32_t row = p.indices[i];
      if (is_row(row, p.num_rows) && row >= first_row && row < first_row + tile_rows) {
        atomicMax(&source_rows[row - first_row], static_cast<int32_t>(i));
      }
    }
    __syncthreads();
  }

  const int64_t begin = (tile_of_tensor - group * t.tiles_per_group) * kMaxTileUnits;
  const int64_t end = begin + kMaxTileUnits < t.row_units ? begin + kMaxTileUnits : t.row_units;
  switch (t.unit_bytes) {
    case 16:
      return move_tile<uint4>(t, source_rows, first_row, begin, end, p);
    case 8:
      return move_tile<uint2>(t, source_rows, first_row, begin, end, p);
    case 4:
      return move_tile<uint32_t>(t, source_rows, first_row, begin, end, p);
    case 2:
      return move_tile<uint16_t>(t, source_rows, first_row, begin, end, p);
    default:
      return move_tile<uint8_t>(t, source_rows, first_row, begin, end, p);
  }
}

// inverse[indices[i]] = i, the last one of equal indices; inverse comes filled with -1.
//   indices  [num_indices]
//   inverse  [num_rows]
__global__ void __launch_bounds__(kMoveThreads)
    invert_indices_kernel(const int32_t* indices, int64_t num_indices, int32_t* inverse,
                          int64_t num_rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMoveThreads + threadIdx.x;
  if (i >= num_indices) return;
  const int32_t row = indices[i];
  if (is_row(row, num_rows)) atomicMax(&inverse[row], static_cast<int32_t>(i));
}

}  // namespace pruneops
