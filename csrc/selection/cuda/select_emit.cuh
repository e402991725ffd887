// Writing the rows that a cut keeps. Nothing is sorted: one ordered pass with ballots writes them
// in ascending order.

#pragma once

#include "selection/cuda/select_cut.cuh"

namespace pruneops {

// Rows [begin, end) that this warp looks at: whole rows of lanes.
struct WarpRows {
  int begin;
  int end;
};

__device__ __forceinline__ WarpRows rows_of_warp(int n) {
  const int warp = threadIdx.x / kWarpSize;
  const int num_threads = blockDim.x;
  const int length = (n + num_threads - 1) / num_threads * kWarpSize;
  const int begin = warp * length;
  return {begin, begin + length < n ? begin + length : n};
}

// Counts the rows of each warp that lie above the cutoff and that equal it.
template <typename Keys>
__device__ void count_rows(const Keys& keys, uint32_t cutoff, SelectShared& s) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const WarpRows rows = rows_of_warp(keys.n);
  uint32_t above = 0;
  uint32_t ties = 0;
  for (int i = rows.begin + lane; i < rows.end; i += kWarpSize) {
    const uint32_t key = keys[i];
    above += key > cutoff;
    ties += key == cutoff;
  }
  above = warp_sum(above);
  ties = warp_sum(ties);
  if (lane == 0) {
    s.warp_above[warp] = above;
    s.warp_ties[warp] = ties;
  }
}

// Rows of the segment before those of the block.
struct RowsBefore {
  uint32_t above;  // that lie above the cutoff
  uint32_t ties;   // that equal it
};

// Writes the kept rows in ascending order; after count_rows and a barrier.
//   first_row  row 0 of the block in the packed tensor
//   offset     place of the segment's first kept row in indices
template <typename Keys>
__device__ void emit_rows(const Keys& keys, const SegmentCutoff& cut, const RowsBefore& before,
                          int64_t first_row, int64_t offset, const CudaSelectParams& p,
                          const SelectShared& s) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const uint32_t lanes_before = (1u << lane) - 1;
  const WarpRows rows = rows_of_warp(keys.n);
  uint32_t above = before.above + warp_sum(lane < warp ? s.warp_above[lane] : 0);
  uint32_t ties = before.ties + warp_sum(lane < warp ? s.warp_ties[lane] : 0);
  for (int base = rows.begin; base < rows.end; base += kWarpSize) {
    const int i = base + lane;
    const uint32_t key = i < rows.end ? keys[i] : 0;
    const bool is_above = i < rows.end && key > cut.key;
    const bool is_tie = i < rows.end && key == cut.key;
    const uint32_t above_mask = __ballot_sync(kAllLanes, is_above);
    const uint32_t tie_mask = __ballot_sync(kAllLanes, is_tie);
    const uint32_t tie_rank = ties + __popc(tie_mask & lanes_before);
    const uint32_t kept_ties = tie_rank < cut.num_ties ? tie_rank : cut.num_ties;
    if (is_above || (is_tie && tie_rank < cut.num_ties)) {
      const int64_t place = offset + above + __popc(above_mask & lanes_before) + kept_ties;
      if (place < p.capacity) p.indices[place] = static_cast<int32_t>(first_row + i);
    }
    above += __popc(above_mask);
    ties += __popc(tie_mask);
  }
}

// -1 in places [begin, end) of indices.
__device__ __forceinline__ void emit_nothing(int64_t begin, int64_t end,
                                             const CudaSelectParams& p) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) p.indices[i] = -1;
}

}  // namespace pruneops
