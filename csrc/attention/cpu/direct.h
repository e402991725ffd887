// Scores and weighted sums straight from keys and values where they lie, for so few rows that packing a
// tile would cost more than the products: decoding, short continuation chunks, last-query scores.

#pragma once

#include "attention/cpu/microkernel.h"
#include "attention/cpu/pack.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int64_t kDirectRows = 8;    // rows handled in one pass over the keys
constexpr int64_t kDirectKeys = 64;  // keys in a tile

// Keys (or values) of one tile as a plain matrix of T.
template <class T>
struct DirectTile {
  const T* data;
  int64_t stride;
};

// s[r * ld_s + j] = scale * <q_r, k_j> for kRows rows and 4 keys.
template <class T, int kRows>
PRUNEOPS_INLINE void dot_block(const float* q, int64_t ld_q, const T* const (&keys)[4],
                               int64_t head_dim, float* s, int64_t ld_s, float scale) {
  Vec acc[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = zero();
  }
  for (int64_t d = 0; d < head_dim; d += kVecWidth) {
    Vec key[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) key[j] = load(keys[j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load(q + r * ld_q + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = fma(x, key[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float sums[4];
    reduce_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], sums);
    for (int j = 0; j < 4; ++j) s[r * ld_s + j] = sums[j] * scale;
  }
}

// Rows of one head lie a whole token apart, each on a page of its own, where hardware prefetchers do not
// follow; so rows are asked for this many keys ahead. Addresses past the end do no harm.
constexpr int64_t kPrefetchKeys = 8;

template <class T>
PRUNEOPS_INLINE void prefetch_rows(const T* row, int64_t stride, int64_t head_dim) {
  for (int64_t i = 0; i < 4; ++i) {
    const char* p = reinterpret_cast<const char*>(row + i * stride);
    const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b);
  }
}

// Scores of `rows` query rows with `keys` keys.
//   q  [rows, ld_q] fp32     k  [keys, stride]     s  [rows, ld_s], ld_s >= round_up(keys, 4)
template <class T>
void direct_scores_tile(const float* q, int64_t ld_q, int64_t rows, const DirectTile<T>& k,
                        int64_t keys, int64_t head_dim, float* s, int64_t ld_s, float scale,
                        const T* also = nullptr) {
  for (int64_t j = 0; j < keys; j += 4) {
    prefetch_rows(k.data + (j + kPrefetchKeys) * k.stride, k.stride, head_dim);
    if (also) prefetch_rows(also + j * k.stride, k.stride, head_dim);
    // Past the last key the last one is read again; what it gives lands in the row's padding.
    const T* four[4];
    for (int i = 0; i < 4; ++i) four[i] = k.data + min_of(j + i, keys - 1) * k.stride;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      dot_block<T, 4>(q + r * ld_q, ld_q, four, head_dim, s + r * ld_s + j, ld_s, scale);
    }
    for (; r < rows; ++r) {
      dot_block<T, 1>(q + r * ld_q, ld_q, four, head_dim, s + r * ld_s + j, ld_s, scale);
    }
  }
}

// out [rows, ld_out] = alpha[r] * out + p [rows, ld_p] v [keys, stride]
template <class T>
void direct_values_tile(const float* p, int64_t ld_p, int64_t rows, const DirectTile<T>& v,
                        int64_t keys, int64_t head_dim, float* out, int64_t ld_out,
                        const float* alpha) {
  const Panels panels(head_dim);
  for (int64_t r = 0; r < rows; r += kMicroRows) {
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t begin = panels.begin(panel);
      micro<FloatOps<T>, Update::kRescale, false>(
          min_of<int64_t>(kMicroRows, rows - r), panels.begin(panel + 1) - begin, keys,
          p + r * ld_p, ld_p, v.data + begin * kVecWidth, v.stride, out + r * ld_out + begin * kVecWidth,
          ld_out, 1.0f, alpha + r);
    }
  }
}

// Calls f(tile) with keys [first, first + count) of `rows` as a DirectTile whose rows may be read in
// whole vectors: in place where head_dim allows it, else from a padded fp32 copy.
//   staging: [kDirectKeys, round_up(head_dim, kVecWidth)]
template <class F>
PRUNEOPS_INLINE void with_direct_tile(const Rows& rows, int64_t first, int64_t count,
                                      int64_t head_dim, float* staging, const F& f) {
  if (head_dim % kVecWidth != 0) {
    const int64_t padded = round_up(head_dim, kVecWidth);
    Pack<FloatOps<float>>::rows(staging, padded, rows, first, count, head_dim);
    f(DirectTile<float>{staging, padded});
    return;
  }
  const char* base = rows.at(first);
  switch (rows.type) {
    case FloatType::kFloat32:
      f(DirectTile<float>{reinterpret_cast<const float*>(base), rows.token_bytes / 4});
      return;
    case FloatType::kBFloat16:
      f(DirectTile<BFloat16>{reinterpret_cast<const BFloat16*>(base), rows.token_bytes / 2});
      return;
    default:
      f(DirectTile<Half>{reinterpret_cast<const Half*>(base), rows.token_bytes / 2});
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
