// Reading rows of any dtype and stride, and writing means, four channels at a time.

#pragma once

#include <cuda_fp16.h>

#include "clustering/cuda/clustering.h"
#include "common/cuda_kernel.h"

namespace pruneops {

constexpr int kQuad = 4;

// Four neighbouring channels as they are in memory.
template <class T>
struct Quad;
template <>
struct Quad<float> {
  float4 raw;
};
template <>
struct Quad<BFloat16> {
  ushort4 raw;
};
template <>
struct Quad<Half> {
  ushort4 raw;
};

__device__ __forceinline__ float channel_as_float(float x) { return x; }
__device__ __forceinline__ float channel_as_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float channel_as_float(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}

__device__ __forceinline__ float4 as_floats(const Quad<float>& q) { return q.raw; }
template <class T>
__device__ __forceinline__ float4 as_floats(const Quad<T>& q) {
  return make_float4(channel_as_float(T{q.raw.x}), channel_as_float(T{q.raw.y}),
                     channel_as_float(T{q.raw.z}), channel_as_float(T{q.raw.w}));
}

__device__ __forceinline__ uint16_t raw_bits(BFloat16 x) { return x.bits; }
__device__ __forceinline__ uint16_t raw_bits(Half x) { return x.bits; }

// p[0, 4), of which only `count` exist; the others are 0.
//   vectors  p is aligned to four elements
template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* p, int64_t count, bool vectors) {
  Quad<T> quad{};
  if (vectors && count >= kQuad) {
    quad.raw = __ldg(reinterpret_cast<const decltype(quad.raw)*>(p));
    return quad;
  }
  if constexpr (sizeof(T) == 4) {
    if (count > 0) quad.raw.x = p[0];
    if (count > 1) quad.raw.y = p[1];
    if (count > 2) quad.raw.z = p[2];
    if (count > 3) quad.raw.w = p[3];
  } else {
    if (count > 0) quad.raw.x = raw_bits(p[0]);
    if (count > 1) quad.raw.y = raw_bits(p[1]);
    if (count > 2) quad.raw.z = raw_bits(p[2]);
    if (count > 3) quad.raw.w = raw_bits(p[3]);
  }
  return quad;
}

// Whether every fourth element of every row is aligned for load_quad.
inline bool reads_quads(const CudaRows& rows) {
  const int64_t size = element_size(rows.type), bytes = kQuad * size;
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && rows.row_stride * size % bytes == 0;
}

template <class T>
__device__ __forceinline__ const T* row_of(const CudaRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.row_stride;
}

__device__ __forceinline__ Quad<float> rounded(float4 x, float*) { return {x}; }
template <class T>
__device__ __forceinline__ Quad<T> rounded(float4 x, T*) {
  T channels[kQuad];
  from_float(x.x, &channels[0]);
  from_float(x.y, &channels[1]);
  from_float(x.z, &channels[2]);
  from_float(x.w, &channels[3]);
  return {make_ushort4(channels[0].bits, channels[1].bits, channels[2].bits, channels[3].bits)};
}

// out[0, 4) = x rounded to T, as far as `count` goes.
//   vectors  out is aligned to four elements
template <class T>
__device__ __forceinline__ void store_quad(float4 x, T* out, int64_t count, bool vectors) {
  if (vectors && count >= kQuad) {
    *reinterpret_cast<Quad<T>*>(out) = rounded(x, out);
    return;
  }
  from_float(x.x, out);
  if (count > 1) from_float(x.y, out + 1);
  if (count > 2) from_float(x.z, out + 2);
  if (count > 3) from_float(x.w, out + 3);
}

__device__ __forceinline__ float4 divided(float4 x, float by) {
  return make_float4(x.x / by, x.y / by, x.z / by, x.w / by);
}

}  // namespace pruneops
