// Sums and scans across a warp and across a block, without CUB, so that the kernels also run on the
// host (csrc/tests/cuda_on_host). Blocks are one-dimensional, with a multiple of 32 threads.

#pragma once

#include "common/cuda_kernel.h"

namespace pruneops {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Sum over this lane and the lanes before it.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
  const int lane = threadIdx.x % kWarpSize;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// Highest value of this lane and the lanes before it.
__device__ __forceinline__ int32_t warp_inclusive_max(int32_t value) {
  const int lane = threadIdx.x % kWarpSize;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset && other > value) value = other;
  }
  return value;
}

// Sum over the threads before this one. Every thread of the block must call it; the caller puts a
// barrier between two calls with the same scratch.
//   warp_sums  scratch in shared memory, [kMaxWarps]
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* warp_sums) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const uint32_t inclusive = warp_inclusive_sum(value);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  const uint32_t before = warp_sum(lane < warp ? warp_sums[lane] : 0);
  return before + inclusive - value;
}

// Sum over the block, in every thread. Same conditions.
//   warp_sums  scratch in shared memory, [kMaxWarps]
__device__ __forceinline__ uint32_t block_sum(uint32_t value, uint32_t* warp_sums) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t of_warp = warp_sum(value);
  if (lane == 0) warp_sums[threadIdx.x / kWarpSize] = of_warp;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarpSize ? warp_sums[lane] : 0);
}

}  // namespace pruneops
