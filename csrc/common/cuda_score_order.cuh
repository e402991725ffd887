// The order of scores on the device: NaN lowest, -0.0 equal to +0.0.

#pragma once

#include "common/cuda_kernel.h"
#include "common/float_types.h"

namespace pruneops {

constexpr uint32_t kNanKey = 0;

// A key that sorts like the score does.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = bits_of_float(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNanKey;
  if (magnitude == 0) return 0x80000000u;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace pruneops
