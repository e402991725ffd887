// Key limits of queries from the positions that tokens kept: a binary search a query row.

#pragma once

#include "attention/cuda/scores.h"
#include "attention/cuda/segments.cuh"

namespace pruneops {

constexpr int kLimitThreads = 128;

template <class Q, class K>
__global__ void __launch_bounds__(kLimitThreads) kv_limit_kernel(CudaKvLimitParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLimitThreads + threadIdx.x;
  if (row >= p.total_q) return;
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int64_t b = first_ending_past(segments.q + 1, p.num_segments, row);
  if (b == p.num_segments || segments.q[b] > row) {
    p.kv_limit[row] = 0;
    return;
  }
  const Segment segment = segments[b];
  const int64_t position = static_cast<const Q*>(p.positions_q.data)[row];
  const K* keys = static_cast<const K*>(p.positions_k.data) + segment.k_begin;
  int64_t low = 0, high = segment.k_len;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(keys[middle]) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  p.kv_limit[row] = static_cast<int32_t>(low);
}

}  // namespace pruneops
