// One vector of floats on each instruction set. A per-ISA source file defines exactly one of
// PRUNEOPS_ISA_{SCALAR,AVX2,AVX512,AVX512BF16} before it includes this header; all code that uses
// Vec then lives in `pruneops::PRUNEOPS_ISA_NAMESPACE` and an anonymous namespace inside it, so
// that no function compiled for one ISA can be merged by the linker with its namesake of another.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/float_types.h"

#if defined(PRUNEOPS_ISA_AVX512BF16)
#define PRUNEOPS_ISA_NAMESPACE avx512bf16
#define PRUNEOPS_VEC_AVX512 1
#if !defined(__AVX512BF16__)
#error "this file needs -mavx512bf16"
#endif
#elif defined(PRUNEOPS_ISA_AVX512)
#define PRUNEOPS_ISA_NAMESPACE avx512
#define PRUNEOPS_VEC_AVX512 1
#elif defined(PRUNEOPS_ISA_AVX2)
#define PRUNEOPS_ISA_NAMESPACE avx2
#define PRUNEOPS_VEC_AVX2 1
#elif defined(PRUNEOPS_ISA_SCALAR)
#define PRUNEOPS_ISA_NAMESPACE scalar
#else
#error "define one of PRUNEOPS_ISA_{SCALAR,AVX2,AVX512,AVX512BF16} before including vec.h"
#endif

#if defined(PRUNEOPS_VEC_AVX512) && !(defined(__AVX512F__) && defined(__AVX512BW__) && \
                                      defined(__AVX512VL__) && defined(__AVX512DQ__))
#error "this file needs -mavx512f -mavx512bw -mavx512vl -mavx512dq"
#endif
#if defined(PRUNEOPS_VEC_AVX2) && !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#error "this file needs -mavx2 -mfma -mf16c"
#endif

#define PRUNEOPS_INLINE inline __attribute__((always_inline))

// What every vec_<isa>.h defines, W being kVecWidth:
//   Vec                       W floats
//   load(p) / store(p, v)     unaligned, from and to float, BFloat16 and Half
//   broadcast(x), zero()
//   + - *, fma(a, b, c)       a * b + c
//   vmax(a, b), vmin(a, b)    b where either is NaN, so vmax(limit, x) keeps the NaN of x
//   less_mask(a, b), equal_mask(a, b), at_least_mask(a, b)   one bit a lane, 0 where either is NaN
//   where_less(a, b, x, y)    x where a < b, else y
//   round_even(v)
//   scale_pow2(v, n)          v * 2^n for integral kLowestExponent <= n <= 128; 0 for
//   kLowestExponent first_lane(v), reduce_max(v), reduce_sum(v) reduce_sum4(a, b, c, d, out)    the
//   four sums to out[0..3] transpose_block(src, ld_src, dst, ld_dst, rows)   W x W floats, the
//   first `rows` rows of the result
#if defined(PRUNEOPS_VEC_AVX512)
#include "common/vec_avx512.h"
#elif defined(PRUNEOPS_VEC_AVX2)
#include "common/vec_avx2.h"
#else
#include "common/vec_scalar.h"
#endif

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

// 2^x with a relative error of about 1e-7. -inf gives exactly 0, and NaN stays NaN.
// 2^round(x) is exact; 2^(x - round(x)) is a degree-6 minimax polynomial on [-0.5, 0.5].
PRUNEOPS_INLINE Vec exp2(Vec x) {
  x = vmin(broadcast(128.0f), vmax(broadcast(kLowestExponent), x));
  const Vec n = round_even(x);
  const Vec f = x - n;
  Vec p = broadcast(1.53533620e-4f);
  p = fma(p, f, broadcast(1.33988747e-3f));
  p = fma(p, f, broadcast(9.61843736e-3f));
  p = fma(p, f, broadcast(5.55033247e-2f));
  p = fma(p, f, broadcast(2.40226479e-1f));
  p = fma(p, f, broadcast(6.93147203e-1f));
  p = fma(p, f, broadcast(1.0f));
  return scale_pow2(p, n);
}

// The bits of a mask that stand for lanes.
constexpr uint32_t kAllLanes = (1u << kVecWidth) - 1u;

PRUNEOPS_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
PRUNEOPS_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}

template <class T>
PRUNEOPS_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
