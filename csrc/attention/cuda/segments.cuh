// Segments on the device: boundaries that kernels may rely on, and the way from a packed row to its
// segment. Blocks own tiles of the packed dimension, which need no knowledge of lengths on the
// host; a tile holds pieces of one or more segments.

#pragma once

#include "attention/cuda/segment_limits.cuh"

namespace pruneops {

constexpr int kBoundsThreads = 256;

// One block for the queries' boundaries, one for the keys'.
//   cu_seqlens_q, cu_seqlens_k  [num_entries] any values
//   bounds                      [2, num_entries] as clamp_boundaries makes them
static __global__ void __launch_bounds__(kBoundsThreads)
    bounds_kernel(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_entries,
                  int64_t total_q, int64_t total_k, int32_t* bounds) {
  const bool keys = blockIdx.x == 1;
  clamp_boundaries<kBoundsThreads>(keys ? cu_seqlens_k : cu_seqlens_q, num_entries,
                                   keys ? total_k : total_q, bounds + (keys ? num_entries : 0));
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

}  // namespace pruneops
