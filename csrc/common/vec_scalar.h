// Vec without any instruction set: four floats in the compiler's portable vector type. Included by
// vec.h only.

#pragma once

#include <math.h>

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int kVecWidth = 4;
constexpr float kLowestExponent = -127.0f;

typedef float Float4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};

PRUNEOPS_INLINE Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
PRUNEOPS_INLINE Vec zero() { return broadcast(0.0f); }

template <class T>
PRUNEOPS_INLINE Vec load(const T* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}

template <class T>
PRUNEOPS_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}

PRUNEOPS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
PRUNEOPS_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
PRUNEOPS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
PRUNEOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
PRUNEOPS_INLINE Vec vmax(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
PRUNEOPS_INLINE Vec vmin(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }

// Lanes of a comparison are all ones or all zeros; their bit pattern as one number.
typedef int32_t Int4 __attribute__((vector_size(16)));
PRUNEOPS_INLINE uint32_t mask_of(Int4 lanes) {
  const Int4 bits = lanes & Int4{1, 2, 4, 8};
  return static_cast<uint32_t>(bits[0] | bits[1] | bits[2] | bits[3]);
}
PRUNEOPS_INLINE uint32_t less_mask(Vec a, Vec b) { return mask_of(a.v < b.v); }
PRUNEOPS_INLINE uint32_t equal_mask(Vec a, Vec b) { return mask_of(a.v == b.v); }
PRUNEOPS_INLINE uint32_t at_least_mask(Vec a, Vec b) { return mask_of(a.v >= b.v); }
PRUNEOPS_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {a.v < b.v ? x.v : y.v}; }

// Adding and taking away 1.5 * 2^23 leaves the nearest integer; enough for |a| < 2^22.
PRUNEOPS_INLINE Vec round_even(Vec a) {
  const Vec magic = broadcast(0x1.8p23f);
  return (a + magic) - magic;
}

PRUNEOPS_INLINE Vec scale_pow2(Vec a, Vec n) {
  typedef uint32_t UInt4 __attribute__((vector_size(16)));
  // n + 127 in the low bits of a float of exponent 23; NaN lanes give bits that keep a's NaN.
  const Float4 biased = n.v + broadcast(0x1p23f + 127.0f).v;
  const UInt4 bits = reinterpret_cast<UInt4>(biased) << 23;
  return {a.v * reinterpret_cast<Float4>(bits)};
}

PRUNEOPS_INLINE float first_lane(Vec a) { return a.v[0]; }

PRUNEOPS_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] < a.v[1] ? a.v[1] : a.v[0];
  const float y = a.v[2] < a.v[3] ? a.v[3] : a.v[2];
  return x < y ? y : x;
}

PRUNEOPS_INLINE float reduce_sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

PRUNEOPS_INLINE void reduce_sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = reduce_sum(a);
  out[1] = reduce_sum(b);
  out[2] = reduce_sum(c);
  out[3] = reduce_sum(d);
}

PRUNEOPS_INLINE void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst,
                                     int64_t rows) {
  for (int64_t i = 0; i < rows && i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
