// Reading rows of any dtype and stride as float, and the reductions that scores are made of.

#pragma once

#include <cuda_fp16.h>
#include <math.h>

#include "attention/attention.h"
#include "common/cuda_kernel.h"

namespace pruneops {

constexpr float kLog2OfE = 1.4426950408889634f;
constexpr int kVector = 8;  // elements a thread reads at once

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

// Row 0 of one head; the other rows follow at `stride` elements.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  bool vectors;  // every 8th element of a row is 16-byte aligned
};

template <class T>
__device__ __forceinline__ HeadRows<T> head_rows(const RowView& view, int64_t row, int64_t head,
                                                 bool vectors) {
  return {static_cast<const T*>(view.data) + row * view.row_stride + head * view.head_stride,
          view.row_stride, vectors};
}

__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kVector], BFloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kVector], Half) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widen(Half{static_cast<uint16_t>(words[i] & 0xffffu)});
    x[2 * i + 1] = widen(Half{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// x = p[0, 8), of which only `count` exist; the others are 0.
template <class T>
__device__ __forceinline__ void load_vector(const T* p, int64_t count, bool vectors,
                                            float (&x)[kVector]) {
  if (vectors && count >= kVector) {
    if constexpr (sizeof(T) == 4) {
      const float4 low = __ldg(reinterpret_cast<const float4*>(p));
      const float4 high = __ldg(reinterpret_cast<const float4*>(p) + 1);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
      unpack(__ldg(reinterpret_cast<const uint4*>(p)), x, T{});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = i < count ? widen(p[i]) : 0.0f;
}

// accumulated op value. Probabilities are not negative, so both ops start at 0. A NaN wins over any
// number.
__device__ __forceinline__ float reduce(Reduce op, float accumulated, float value) {
  if (op != Reduce::kMax) return accumulated + value;
  return value > accumulated || value != value ? value : accumulated;
}

__device__ __forceinline__ float mean_factor(Reduce op, int64_t count) {
  return op == Reduce::kMean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
}

// Part of a row's softmax denominator: sum of exp2(score - max), scores being base-2 exponents.
struct PartialLse {
  float max;  // -inf without keys
  float sum;
};

// What a row's maximum is taken off by: a row that has seen only -inf has none to take away.
__device__ __forceinline__ float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ PartialLse merge(PartialLse a, PartialLse b) {
  const float max = fmaxf(a.max, b.max), shift = shift_of(max);
  return {max, a.sum * exp2f(a.max - shift) + b.sum * exp2f(b.max - shift)};
}

// Base-2 logarithm of the denominator.
__device__ __forceinline__ float log2_sum(PartialLse p) {
  return p.sum == 0.0f ? -INFINITY : p.max + log2f(p.sum);
}

}  // namespace pruneops
