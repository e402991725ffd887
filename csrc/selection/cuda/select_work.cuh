// What the blocks of a selection share in global memory, and the kernel that prepares it.

#pragma once

#include "common/cuda_block.cuh"
#include "selection/cuda/select_cut.cuh"

namespace pruneops {

// A segment that several blocks share, a stretch of rows each.
struct LongSegment {
  int32_t segment;
  uint32_t first_stretch;  // stretches of long segments before it
};

struct LongTotals {
  uint32_t num_long;
  uint32_t num_stretches;
};

// How far the search for the cut of a long segment is.
struct LongState {
  uint32_t num_protected;  // complete after digit 0, like the next
  uint32_t above;
  uint32_t arrived;       // stretches counted so far, those of all digits together
  uint32_t digits_known;  // kNumDigits once the cut is complete; written after everything else
  SegmentCutoff cut;
  uint32_t unused;
};

struct SelectWork {
  int64_t key_capacity;  // of the plan, like the next two
  int64_t stretch_rows;
  int64_t max_long;

  // Zero before the selection.
  unsigned long long* ticket;            // [1]
  unsigned long long* segment_progress;  // [num_segments] kept rows, as in look_back.cuh
  unsigned long long* stretch_progress;  // [max_stretches] rows above the cut and ties, likewise
  LongState* states;                     // [max_long], at long_place
  uint32_t* bins;                        // [max_long, kNumBins] of the digit searched for

  LongSegment* long_segments;  // [max_long], of which totals->num_long are used, ascending
  LongTotals* totals;          // [1]
  int32_t* bounds;             // [num_segments + 1] cu_seqlens, clamped and made monotone
};

// Where the state of a long segment lies: such segments begin more than key_capacity apart.
__device__ __forceinline__ int64_t long_place(int64_t begin, const SelectWork& w) {
  return begin / (w.key_capacity + 1);
}

__device__ __forceinline__ uint32_t num_stretches_of(int64_t n, const SelectWork& w) {
  return static_cast<uint32_t>((n + w.stretch_rows - 1) / w.stretch_rows);
}

__device__ __forceinline__ int32_t clamp_boundary(int32_t boundary, int64_t total) {
  if (boundary < 0) return 0;
  return boundary < total ? boundary : static_cast<int32_t>(total);
}

// Fills w.bounds; by one block.
__device__ __forceinline__ void sanitize_bounds(const CudaSelectParams& p, const SelectWork& w) {
  __shared__ int32_t warp_max[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  int32_t carry = 0;
  for (int64_t base = 0; base <= p.num_segments; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    int32_t bound = i <= p.num_segments ? clamp_boundary(p.cu_seqlens[i], p.total) : 0;
    bound = warp_inclusive_max(bound);
    if (lane == kWarpSize - 1) warp_max[warp] = bound;
    __syncthreads();
    for (int other = 0; other < num_warps; ++other) {
      if (other == warp && carry > bound) bound = carry;
      if (warp_max[other] > carry) carry = warp_max[other];
    }
    if (i <= p.num_segments) w.bounds[i] = bound;
    __syncthreads();
  }
}

// Fills w.long_segments and w.totals; by one block, after sanitize_bounds.
__device__ __forceinline__ void list_long_segments(const CudaSelectParams& p, const SelectWork& w) {
  __shared__ uint32_t warp_sums[kMaxWarps];
  __shared__ uint32_t more_warp_sums[kMaxWarps];
  __shared__ LongTotals totals;
  if (threadIdx.x == 0) totals = {0, 0};
  for (int64_t base = 0; base < p.num_segments; base += blockDim.x) {
    const int64_t segment = base + threadIdx.x;
    const int64_t n =
        segment < p.num_segments ? w.bounds[segment + 1] - w.bounds[segment] : int64_t{0};
    const bool is_long = n > w.key_capacity;
    if (__syncthreads_or(is_long) == 0) continue;
    const uint32_t stretches = is_long ? num_stretches_of(n, w) : 0;
    const uint32_t place =
        totals.num_long + block_exclusive_sum(static_cast<uint32_t>(is_long), warp_sums);
    const uint32_t first = totals.num_stretches + block_exclusive_sum(stretches, more_warp_sums);
    if (is_long) w.long_segments[place] = {static_cast<int32_t>(segment), first};
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) totals = {place + is_long, first + stretches};
  }
  __syncthreads();
  if (threadIdx.x == 0) *w.totals = totals;
}

// Block 0 looks at the boundaries, the others clear what has to be zero.
//   clear        [num_clear] that start at w.ticket
__global__ void prepare_select_kernel(CudaSelectParams p, SelectWork w, uint4* clear,
                                      int64_t num_clear) {
  if (blockIdx.x == 0) {
    sanitize_bounds(p, w);
    if (w.max_long > 0) list_long_segments(p, w);
    return;
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x - 1) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x - 1) * blockDim.x + threadIdx.x;
  for (; i < num_clear; i += stride) clear[i] = uint4{0, 0, 0, 0};
}

}  // namespace pruneops
