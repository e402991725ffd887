// Reading and writing rows of any float type 16 bytes at a time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include "common/cuda_kernel.h"
#include "common/float_types.h"
#include "common/rows.h"

namespace pruneops {

// Neighbouring elements of a row that one thread moves at once.
template <class T, int kElements>
struct alignas(kElements * sizeof(T)) Pack {
  T values[kElements];
};

// 16 bytes, or one element where alignment asks for it.
template <class T, bool kWide>
constexpr int kPackElements = kWide ? static_cast<int>(16 / sizeof(T)) : 1;

template <int kElements, class T>
__device__ __forceinline__ Pack<T, kElements> load_pack(const T* p) {
  Pack<T, kElements> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&pack, &raw, sizeof(pack));
  } else {
    pack.values[0] = *p;
  }
  return pack;
}

template <int kElements, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kElements>& pack) {
  if constexpr (sizeof(pack) == 16) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(pack));
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
    *p = pack.values[0];
  }
}

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(BFloat16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}
__device__ __forceinline__ float as_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void round_to(float x, float* out) { *out = x; }
__device__ __forceinline__ void round_to(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void round_to(float x, Half* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

// Whether every row begins on 16 bytes.
inline bool begin_on_16_bytes(const void* data, int64_t stride, FloatType type) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size(type) % 16 == 0;
}
inline bool begin_on_16_bytes(const Rows& rows, FloatType type) {
  return begin_on_16_bytes(rows.data, rows.stride, type);
}

}  // namespace pruneops
