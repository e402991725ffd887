// Segments on the device: boundaries that kernels may rely on, and sums over the segments before
// one.

#pragma once

#include "common/cuda_block.cuh"
#include "common/cuda_segments.cuh"

namespace pruneops {

constexpr int kLayoutThreads = 256;
constexpr int kLayoutWarps = kLayoutThreads / kWarpSize;

struct LayoutShared {
  int64_t of_warps[kLayoutWarps];
};

// out[i] = fold of own(0), ..., own(i) for all i < count, by one block of kLayoutThreads. `fold` is
// associative and `start` its neutral element.
template <class Own, class Fold, class Write>
__device__ __forceinline__ void block_scan(int64_t count, int64_t start, const Own& own,
                                           const Fold& fold, const Write& write, LayoutShared& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int64_t before = start;
  for (int64_t first = 0; first < count; first += kLayoutThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t value = i < count ? own(i) : start;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(offset));
      if (lane >= offset) value = fold(other, value);
    }
    if (lane == kWarpSize - 1) s.of_warps[warp] = value;
    __syncthreads();
    int64_t below = before;
    for (int w = 0; w < warp; ++w) below = fold(below, s.of_warps[w]);
    if (i < count) write(i, fold(below, value));
    for (int w = 0; w < kLayoutWarps; ++w) before = fold(before, s.of_warps[w]);
    __syncthreads();
  }
}

// bounds = cu_seqlens, each clamped to [0, total] and at least the one before. One block; ends with
// a barrier, after which its threads may read all of them.
//   cu_seqlens, bounds  [num_segments + 1]
__device__ __forceinline__ void write_bounds(const int32_t* cu_seqlens, int64_t num_segments,
                                             int64_t total, int32_t* bounds, LayoutShared& s) {
  block_scan(
      num_segments + 1, 0,
      [&](int64_t i) { return at_most<int64_t>(at_least<int64_t>(cu_seqlens[i], 0), total); },
      [](int64_t a, int64_t b) { return at_least(a, b); },
      [&](int64_t i, int64_t bound) { bounds[i] = static_cast<int32_t>(bound); }, s);
}

// write(b, own(0) + ... + own(b)) for every segment b. One block.
template <class Own, class Write>
__device__ __forceinline__ void sum_over_segments(int64_t num_segments, const Own& own,
                                                  const Write& write, LayoutShared& s) {
  block_scan(num_segments, 0, own, [](int64_t a, int64_t b) { return a + b; }, write, s);
}

}  // namespace pruneops
