// Stands in for CUDA's cuda_fp16.h: conversions only, arithmetic is done in float.

#pragma once

#include "common/float_types.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return pruneops::to_float(pruneops::Half{x.bits}); }
inline __half __float2half_rn(float x) {
  pruneops::Half h;
  pruneops::from_float(x, &h);
  return {h.bits};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
