// Segments on the device: boundaries that kernels may rely on, and the way from a packed row to its
// segment. Blocks own tiles of the packed dimension, which need no knowledge of lengths on the
// host; a tile holds pieces of one or more segments.

#pragma once

#include "attention/attention.h"
#include "common/cuda_block.cuh"
#include "common/cuda_segments.cuh"

namespace pruneops {

constexpr int kBoundsThreads = 256;

// One block for the queries' boundaries, one for the keys'.
//   cu_seqlens_q, cu_seqlens_k  [num_entries] any values
//   bounds                      [2, num_entries] clamped to [0, total], each at least the one
//   before
static __global__ void __launch_bounds__(kBoundsThreads)
    bounds_kernel(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_entries,
                  int64_t total_q, int64_t total_k, int32_t* bounds) {
  __shared__ int32_t warp_max[kBoundsThreads / kWarpSize];
  const bool keys = blockIdx.x == 1;
  const int32_t* in = keys ? cu_seqlens_k : cu_seqlens_q;
  const int32_t total = static_cast<int32_t>(keys ? total_k : total_q);
  int32_t* out = bounds + (keys ? num_entries : 0);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int32_t before = 0;  // highest entry so far
  for (int64_t first = 0; first < num_entries; first += kBoundsThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t own = i < num_entries ? at_most(in[i], total) : 0;
    int32_t highest = warp_inclusive_max(own);
    if (threadIdx.x % kWarpSize == kWarpSize - 1) warp_max[warp] = highest;
    __syncthreads();
    for (int w = 0; w < warp; ++w) highest = at_least(highest, warp_max[w]);
    highest = at_least(highest, before);
    if (i < num_entries) out[i] = highest;
    for (int w = 0; w < kBoundsThreads / kWarpSize; ++w) before = at_least(before, warp_max[w]);
    __syncthreads();
  }
}

struct DeviceSegments {
  const int32_t* q;  // [num_segments + 1] from bounds_kernel
  const int32_t* k;  // [num_segments + 1]
  int64_t num_segments;

  __device__ DeviceSegments(const int32_t* bounds, int64_t num_segments)
      : q(bounds), k(bounds + num_segments + 1), num_segments(num_segments) {}

  __device__ Segment operator[](int64_t b) const {
    return {q[b], q[b + 1] - q[b], k[b], k[b + 1] - k[b], 0};
  }
};

// Calls f(segment, begin, end) for the pieces of packed rows [tile_begin, tile_end), begin and end
// counted from the segment's first row. All threads of a block take the same way.
//   bounds  [num_segments + 1], segments.q or segments.k
template <class F>
__device__ __forceinline__ void for_pieces(const DeviceSegments& segments, const int32_t* bounds,
                                           int64_t tile_begin, int64_t tile_end, const F& f) {
  int64_t b = first_ending_past(bounds + 1, segments.num_segments, tile_begin);
  for (; b < segments.num_segments && bounds[b] < tile_end; ++b) {
    const int64_t begin = at_least<int64_t>(bounds[b], tile_begin);
    const int64_t end = at_most<int64_t>(bounds[b + 1], tile_end);
    if (begin < end) f(segments[b], begin - bounds[b], end - bounds[b]);
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
