// Finding the segment of a position on the device.

#pragma once

#include "common/cuda_kernel.h"

namespace pruneops {

template <class T>
__device__ __forceinline__ T at_most(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T at_least(T a, T b) {
  return a < b ? b : a;
}

// The first segment that ends past x, num_segments if none does.
//   ends  [num_segments] non-decreasing
template <class T>
__device__ __forceinline__ int64_t first_ending_past(const T* ends, int64_t num_segments,
                                                     int64_t x) {
  int64_t low = 0, high = num_segments;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ends[middle] > x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace pruneops
