// Where segments begin and end, and how far their queries see, whatever the caller's numbers say.

#pragma once

#include "attention/attention.h"
#include "common/cuda_block.cuh"
#include "common/cuda_segments.cuh"

namespace pruneops {

// Boundaries clamped to [0, total], each at least the one before. The whole block takes part.
//   cu_seqlens  [num_entries] any values
//   bounds      [num_entries]
template <int kThreads>
__device__ __forceinline__ void clamp_boundaries(const int32_t* cu_seqlens, int64_t num_entries,
                                                 int64_t total, int32_t* bounds) {
  __shared__ int32_t warp_max[kThreads / kWarpSize];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int32_t before = 0;  // highest entry so far
  for (int64_t first = 0; first < num_entries; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t own = i < num_entries ? at_most(cu_seqlens[i], static_cast<int32_t>(total)) : 0;
    int32_t highest = warp_inclusive_max(own);
    if (threadIdx.x % kWarpSize == kWarpSize - 1) warp_max[warp] = highest;
    __syncthreads();
    for (int w = 0; w < warp; ++w) highest = at_least(highest, warp_max[w]);
    highest = at_least(highest, before);
    if (i < num_entries) bounds[i] = highest;
    for (int w = 0; w < kThreads / kWarpSize; ++w) before = at_least(before, warp_max[w]);
    __syncthreads();
  }
}

// Leading keys of the segment that query row `query` of it sees.
__device__ __forceinline__ int64_t key_limit(const Visibility& visibility, const Segment& segment,
                                             int64_t query) {
  int64_t limit = segment.k_len;
  if (visibility.kv_limit != nullptr) {
    limit = visibility.kv_limit[segment.q_begin + query];
  } else if (visibility.causal) {
    limit = segment.k_len - segment.q_len + query + 1;
  }
  return at_most(at_least<int64_t>(limit, 0), segment.k_len);
}

}  // namespace pruneops
