// Matrix products on packed tiles. The left matrix A is read one element at a time and broadcast,
// the right matrix B is stored in panels of a few vectors, [panel][depth][panel columns], and a
// block of C stays in registers while the depth runs.

#pragma once

#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// Block of C held in registers: kMicroRows x kMicroVectors accumulators, plus the vectors of one B
// row and a broadcast.
#if defined(PRUNEOPS_VEC_AVX512)
constexpr int kMicroRows = 6;
constexpr int kMicroVectors = 4;
#elif defined(PRUNEOPS_VEC_AVX2)
constexpr int kMicroRows = 6;
constexpr int kMicroVectors = 2;
#else
constexpr int kMicroRows = 4;
constexpr int kMicroVectors = 2;
#endif

// How `cols` columns are cut into panels of nearly equal width, at most kMicroVectors vectors each.
struct Panels {
  int64_t vectors;  // in all
  int64_t count;

  PRUNEOPS_INLINE explicit Panels(int64_t cols)
      : vectors((cols + kVecWidth - 1) / kVecWidth),
        count((vectors + kMicroVectors - 1) / kMicroVectors) {}
  // First vector of panel p; panel p ends where p + 1 begins.
  PRUNEOPS_INLINE int64_t begin(int64_t p) const { return vectors * p / count; }
};

// Element types of a product: what A and B hold and how one depth step is done.
template <class T>
struct FloatOps {  // depth step = one index; B may be bf16 or fp16 and is widened on load
  using A = float;
  using B = T;
  using Loaded = Vec;
  static PRUNEOPS_INLINE Vec load_b(const T* p) { return load(p); }
  static PRUNEOPS_INLINE Vec load_a(const float* p) { return broadcast(*p); }
  static PRUNEOPS_INLINE Vec mac(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};

#if defined(PRUNEOPS_ISA_AVX512BF16)
struct PairOps {  // depth step = two indices: each 32-bit element holds two neighbouring bf16
                  // values
  using A = uint32_t;
  using B = uint32_t;
  using Loaded = __m512bh;
  static PRUNEOPS_INLINE __m512bh load_b(const uint32_t* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static PRUNEOPS_INLINE __m512bh load_a(const uint32_t* p) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*p)));
  }
  static PRUNEOPS_INLINE Vec mac(__m512bh a, __m512bh b, Vec acc) {
    return {_mm512_dpbf16_ps(acc.v, a, b)};
  }
};
#endif

enum class Update {
  kScale,    // C = scale * A B
  kAdd,      // C += A B
  kRescale,  // C = alpha[row] * C + A B
};

// One register block over depth [0, depth).
//   a  (m, k) at a[m * lda + k], or a[k * lda + m] if kTransA
//   b  (k, vector j) at b[k * ldb + j * kVecWidth]
//   c  (m, vector j) at c[m * ldc + j * kVecWidth]
template <class Ops, int kRows, int kVectors, Update kUpdate, bool kTransA>
void micro_block(int64_t depth, const typename Ops::A* a, int64_t lda, const typename Ops::B* b,
                 int64_t ldb, float* c, int64_t ldc, float scale, const float* alpha) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[m][j] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Ops::Loaded row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row[j] = Ops::load_b(b + j * kVecWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const typename Ops::Loaded x = Ops::load_a(kTransA ? a + m : a + m * lda);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[m][j] = Ops::mac(x, row[j], acc[m][j]);
    }
    a += kTransA ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* p = c + m * ldc + j * kVecWidth;
      if (kUpdate == Update::kScale) store(p, acc[m][j] * broadcast(scale));
      if (kUpdate == Update::kAdd) store(p, load(p) + acc[m][j]);
      if (kUpdate == Update::kRescale) store(p, fma(load(p), broadcast(alpha[m]), acc[m][j]));
    }
  }
}

template <class Ops, int kRows, Update kUpdate, bool kTransA>
PRUNEOPS_INLINE void micro_row(int64_t vectors, int64_t depth, const typename Ops::A* a,
                               int64_t lda, const typename Ops::B* b, int64_t ldb, float* c,
                               int64_t ldc, float scale, const float* alpha) {
#define PRUNEOPS_MICRO(V)                                                                        \
  micro_block<Ops, kRows, (V <= kMicroVectors ? V : 1), kUpdate, kTransA>(depth, a, lda, b, ldb, \
                                                                          c, ldc, scale, alpha)
  switch (vectors) {
    case 1:
      return PRUNEOPS_MICRO(1);
    case 2:
      return PRUNEOPS_MICRO(2);
    case 3:
      return PRUNEOPS_MICRO(3);
    default:
      return PRUNEOPS_MICRO(4);
  }
#undef PRUNEOPS_MICRO
}

// A register block of any size up to kMicroRows x kMicroVectors.
template <class Ops, Update kUpdate, bool kTransA>
PRUNEOPS_INLINE void micro(int64_t rows, int64_t vectors, int64_t depth, const typename Ops::A* a,
                           int64_t lda, const typename Ops::B* b, int64_t ldb, float* c,
                           int64_t ldc, float scale, const float* alpha) {
#define PRUNEOPS_MICRO(R)                                                                        \
  micro_row<Ops, (R <= kMicroRows ? R : 1), kUpdate, kTransA>(vectors, depth, a, lda, b, ldb, c, \
                                                              ldc, scale, alpha)
  switch (rows) {
    case 1:
      return PRUNEOPS_MICRO(1);
    case 2:
      return PRUNEOPS_MICRO(2);
    case 3:
      return PRUNEOPS_MICRO(3);
    case 4:
      return PRUNEOPS_MICRO(4);
    case 5:
      return PRUNEOPS_MICRO(5);
    default:
      return PRUNEOPS_MICRO(6);
  }
#undef PRUNEOPS_MICRO
}

// C [rows, cols] from A [rows, depth] and B packed with Panels(cols). The optional arrays hold one
// entry for each group of kMicroRows rows of C and leave out work that is known to be masked.
template <class Ops>
struct Product {
  const typename Ops::A* a;
  int64_t lda;
  const typename Ops::B* b;  // [panel][b_depth][panel columns]
  int64_t b_depth;           // depth that b was packed with
  float* c;
  int64_t ldc;
  int64_t rows;
  int64_t cols;
  int64_t depth;
  const int32_t* col_limit = nullptr;    // leading columns of C that are needed
  const int32_t* depth_begin = nullptr;  // first and
  const int32_t* depth_end = nullptr;    // end of the depth that is not zero
  float scale = 1.0f;                    // Update::kScale
  const float* alpha = nullptr;          // [rows], Update::kRescale
};

template <class Ops, Update kUpdate, bool kTransA>
void multiply(const Product<Ops>& p) {
  const Panels panels(p.cols);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.begin(panel);
    const int64_t vectors = panels.begin(panel + 1) - first;
    const int64_t width = vectors * kVecWidth;
    const typename Ops::B* b = p.b + first * kVecWidth * p.b_depth;
    for (int64_t m = 0, g = 0; m < p.rows; m += kMicroRows, ++g) {
      if (p.col_limit != nullptr && first * kVecWidth >= p.col_limit[g]) continue;
      const int64_t begin = p.depth_begin != nullptr ? p.depth_begin[g] : 0;
      const int64_t end = p.depth_end != nullptr ? p.depth_end[g] : p.depth;
      const typename Ops::A* a = kTransA ? p.a + begin * p.lda + m : p.a + m * p.lda + begin;
      micro<Ops, kUpdate, kTransA>(min_of<int64_t>(kMicroRows, p.rows - m), vectors,
                                   max_of<int64_t>(end - begin, 0), a, p.lda, b + begin * width,
                                   width, p.c + m * p.ldc + first * kVecWidth, p.ldc, p.scale,
                                   p.alpha != nullptr ? p.alpha + m : nullptr);
    }
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
