// Scores and weighted sums straight from keys and values where they lie, for so few rows that
// packing a tile would cost more than the products: decoding, short continuation chunks, last-query
// scores.

#pragma once

#include "attention/cpu/microkernel.h"
#include "attention/cpu/pack.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int64_t kDirectKeys = 64;  // keys in a tile
constexpr int64_t kDirectRows = 64;  // most rows (of all heads worked on together)

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

// Keys (or values) of one tile for some neighbouring heads, read where they lie. The heads of a
// token are contiguous in memory while the tokens of a head are not, so all of the heads are worked
// on together.
template <class T>
struct DirectTile {
  const T* data;
  int64_t key_stride;
  int64_t head_stride;
};

// Whether to ask for keys ahead. Where each byte takes much arithmetic (16-bit rows are widened,
// groups use a row several times) the hardware prefetcher is late; a plain fp32 stream it serves
// better alone.
template <class T>
PRUNEOPS_INLINE bool wants_prefetch(int64_t group) {
  return sizeof(T) == 2 || group > 1;
}

// Asks for 4 keys; addresses past the end of the tensor do no harm.
template <class T>
PRUNEOPS_INLINE void prefetch_keys(const T* key, int64_t key_stride, int64_t head_dim) {
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < 4; ++i) {
    const uintptr_t address =
        reinterpret_cast<uintptr_t>(key) +
        static_cast<uintptr_t>(i * key_stride * static_cast<int64_t>(sizeof(T)));
    for (int64_t b = 0; b < bytes; b += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(address + static_cast<uintptr_t>(b)));
    }
  }
}

// Scores of `heads` key heads, each with `group` query rows, with `keys` keys.
//   q  [heads * group, ld_q] fp32      s  [heads * group, ld_s], ld_s >= round_up(keys, 4)
template <class T>
void direct_scores_tile(const float* q, int64_t ld_q, int64_t heads, int64_t group,
                        const DirectTile<T>& k, int64_t keys, int64_t head_dim, float* s,
                        int64_t ld_s, float scale) {
  const bool prefetch = wants_prefetch<T>(group);
  for (int64_t j = 0; j < keys; j += 4) {
    for (int64_t h = 0; h < heads; ++h) {
      // Past the last key the last one is read again; what it gives lands in the row's padding.
      const T* head = k.data + h * k.head_stride;
      const T* four[4];
      for (int i = 0; i < 4; ++i) four[i] = head + min_of(j + i, keys - 1) * k.key_stride;
      if (prefetch) prefetch_keys(head + (j + 4) * k.key_stride, k.key_stride, head_dim);
      const int64_t end = (h + 1) * group;
      int64_t r = h * group;
      for (; r + 4 <= end; r += 4) {
        dot_block<T, 4>(q + r * ld_q, ld_q, four, head_dim, s + r * ld_s + j, ld_s, scale);
      }
      for (; r < end; ++r) {
        dot_block<T, 1>(q + r * ld_q, ld_q, four, head_dim, s + r * ld_s + j, ld_s, scale);
      }
    }
  }
}

// out [heads * group, ld_out] = alpha[row] * out + p [heads * group, ld_p] v
template <class T>
void direct_values_tile(const float* p, int64_t ld_p, int64_t heads, int64_t group,
                        const DirectTile<T>& v, int64_t keys, int64_t head_dim, float* out,
                        int64_t ld_out, const float* alpha) {
  constexpr int64_t kStepKeys = 8;  // keys added before moving on to the next head
  const bool prefetch = wants_prefetch<T>(group);
  const Panels panels(head_dim);
  for (int64_t j = 0; j < keys; j += kStepKeys) {
    const int64_t step = min_of(kStepKeys, keys - j);
    for (int64_t h = 0; h < heads; ++h) {
      const T* head = v.data + h * v.head_stride + j * v.key_stride;
      if (prefetch) {
        prefetch_keys(head + kStepKeys * v.key_stride, v.key_stride, head_dim);
        prefetch_keys(head + (kStepKeys + 4) * v.key_stride, v.key_stride, head_dim);
      }
      for (int64_t r = h * group; r < (h + 1) * group; r += kMicroRows) {
        const int64_t rows = min_of<int64_t>(kMicroRows, (h + 1) * group - r);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t begin = panels.begin(panel);
          const int64_t vectors = panels.begin(panel + 1) - begin;
          const T* b = head + begin * kVecWidth;
          float* c = out + r * ld_out + begin * kVecWidth;
          if (j == 0) {
            micro<FloatOps<T>, Update::kRescale, false>(rows, vectors, step, p + r * ld_p, ld_p, b,
                                                        v.key_stride, c, ld_out, 1.0f, alpha + r);
          } else {
            micro<FloatOps<T>, Update::kAdd, false>(rows, vectors, step, p + r * ld_p + j, ld_p, b,
                                                    v.key_stride, c, ld_out, 1.0f, nullptr);
          }
        }
      }
    }
  }
}

// How many neighbouring key heads to work on together: about two pages of a token, within
// kDirectRows rows of which each head has head_rows, in parts of nearly equal size. One where
// vectors do not divide head_dim, see with_direct_tile.
PRUNEOPS_INLINE int64_t heads_together(const RowView& k, const Heads& heads, int64_t head_rows) {
  if (heads.head_dim % kVecWidth != 0) return 1;
  constexpr int64_t kBytes = 8192;
  int64_t count = min_of(kBytes / (heads.head_dim * element_size(k.type)), kDirectRows / head_rows);
  count = min_of(max_of<int64_t>(count, 1), heads.num_heads_k);
  const int64_t parts = (heads.num_heads_k + count - 1) / count;
  return (heads.num_heads_k + parts - 1) / parts;
}

// Calls f(tile) with keys [first, first + count) of `rows`, the rows of the first head, as a
// DirectTile that may be read in whole vectors: in place where head_dim allows it, else a padded
// fp32 copy of one head.
//   staging: [kDirectKeys, round_up(head_dim, kVecWidth)]
template <class F>
PRUNEOPS_INLINE void with_direct_tile(const Rows& rows, int64_t first, int64_t count,
                                      int64_t head_dim, float* staging, const F& f) {
  if (head_dim % kVecWidth != 0) {
    const int64_t padded = round_up(head_dim, kVecWidth);
    Pack<FloatOps<float>>::rows(staging, padded, rows, first, count, head_dim);
    f(DirectTile<float>{staging, padded, 0});
    return;
  }
  const char* base = rows.at(first);
  switch (rows.type) {
    case FloatType::kFloat32:
      f(DirectTile<float>{reinterpret_cast<const float*>(base), rows.token_bytes / 4,
                          rows.head_bytes / 4});
      return;
    case FloatType::kBFloat16:
      f(DirectTile<BFloat16>{reinterpret_cast<const BFloat16*>(base), rows.token_bytes / 2,
                             rows.head_bytes / 2});
      return;
    default:
      f(DirectTile<Half>{reinterpret_cast<const Half*>(base), rows.token_bytes / 2,
                         rows.head_bytes / 2});
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
