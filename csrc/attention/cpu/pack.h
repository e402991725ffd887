// Reading rows of any dtype and stride into the tiles that microkernel.h multiplies, and writing
// rows back. Rows are converted here and nowhere else, so the rest of the code knows no dtypes.

#pragma once

#include <string.h>

#include "attention/attention.h"
#include "attention/cpu/microkernel.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// The rows of one segment and key head. Row r is head r % group of token r / group.
struct Rows {
  char* base;
  int64_t token_bytes;
  int64_t head_bytes;
  int64_t group;
  FloatType type;

  PRUNEOPS_INLINE char* at(int64_t r) const {
    return group == 1 ? base + r * token_bytes
                      : base + (r / group) * token_bytes + (r % group) * head_bytes;
  }
};

// Tokens from `token` on of `slot`, `group` heads from `head` on.
PRUNEOPS_INLINE Rows rows_of(const RowView& view, int64_t slot, int64_t token, int64_t head,
                             int64_t group) {
  const int64_t size = element_size(view.type);
  const int64_t offset =
      slot * view.slot_stride + token * view.row_stride + head * view.head_stride;
  return {static_cast<char*>(view.data) + offset * size, view.row_stride * size,
          view.head_stride * size, group, view.type};
}

PRUNEOPS_INLINE Rows query_rows(const RowView& view, const Segment& segment, const Heads& heads,
                                int64_t head_k) {
  return rows_of(view, 0, segment.q_begin, head_k * heads.group, heads.group);
}

PRUNEOPS_INLINE Rows key_rows(const RowView& view, const Segment& segment, int64_t head_k) {
  return rows_of(view, segment.slot, segment.k_begin, head_k, 1);
}

template <class T>
void load_values(float* dst, const T* src, int64_t count, int64_t padded) {
  int64_t i = 0;
  for (; i + kVecWidth <= count; i += kVecWidth) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = to_float(src[i]);
  for (; i < padded; ++i) dst[i] = 0.0f;
}

template <class T>
void store_values(T* dst, const float* src, int64_t count, float scale) {
  const Vec factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kVecWidth <= count; i += kVecWidth) store(dst + i, load(src + i) * factor);
  for (; i < count; ++i) from_float(src[i] * scale, dst + i);
}

// dst[0, count) = src in float, dst[count, padded) = 0; `first` counts elements of src.
PRUNEOPS_INLINE void load_row(float* dst, const char* src, FloatType type, int64_t first,
                              int64_t count, int64_t padded) {
  switch (type) {
    case FloatType::kFloat32:
      return load_values(dst, reinterpret_cast<const float*>(src) + first, count, padded);
    case FloatType::kBFloat16:
      return load_values(dst, reinterpret_cast<const BFloat16*>(src) + first, count, padded);
    default:
      return load_values(dst, reinterpret_cast<const Half*>(src) + first, count, padded);
  }
}

// dst[0, count) = src * scale, rounded to `type`.
PRUNEOPS_INLINE void store_row(char* dst, FloatType type, const float* src, int64_t count,
                               float scale) {
  switch (type) {
    case FloatType::kFloat32:
      return store_values(reinterpret_cast<float*>(dst), src, count, scale);
    case FloatType::kBFloat16:
      return store_values(reinterpret_cast<BFloat16*>(dst), src, count, scale);
    default:
      return store_values(reinterpret_cast<Half*>(dst), src, count, scale);
  }
}

// How the operands of a product with element types Ops are laid out.
//   depth(n)     depth steps that n indices take
//   rows         A: rows [first, first + count) as dst [count, ld]
//   panels       B: rows are the depth, head_dim the columns
//   transposed   B: head_dim is the depth, rows are the columns
template <class Ops>
struct Pack;

template <>
struct Pack<FloatOps<float>> {
  static PRUNEOPS_INLINE int64_t depth(int64_t n) { return n; }

  static void rows(float* dst, int64_t ld, const Rows& src, int64_t first, int64_t count,
                   int64_t head_dim) {
    for (int64_t r = 0; r < count; ++r) {
      load_row(dst + r * ld, src.at(first + r), src.type, 0, head_dim, ld);
    }
  }

  static void panels(float* dst, const Rows& src, int64_t first, int64_t count, int64_t head_dim) {
    const Panels panels(head_dim);
    for (int64_t r = 0; r < count; ++r) {
      const char* row = src.at(first + r);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t begin = panels.begin(p) * kVecWidth;
        const int64_t width = panels.begin(p + 1) * kVecWidth - begin;
        load_row(dst + begin * count + r * width, row, src.type, begin,
                 min_of(width, head_dim - begin), width);
      }
    }
  }

  // staging: [kVecWidth, round_up(head_dim, kVecWidth)]
  static void transposed(float* dst, const Rows& src, int64_t first, int64_t count,
                         int64_t head_dim, float* staging) {
    const Panels panels(count);
    const int64_t padded = round_up(head_dim, kVecWidth);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t begin = panels.begin(p) * kVecWidth;
      const int64_t width = panels.begin(p + 1) * kVecWidth - begin;
      float* panel = dst + begin * head_dim;
      for (int64_t c = 0; c < width; c += kVecWidth) {
        for (int64_t i = 0; i < kVecWidth; ++i) {
          const int64_t r = begin + c + i;
          if (r < count) {
            load_row(staging + i * padded, src.at(first + r), src.type, 0, head_dim, padded);
          } else {
            memset(staging + i * padded, 0, static_cast<size_t>(padded) * sizeof(float));
          }
        }
        for (int64_t d = 0; d < head_dim; d += kVecWidth) {
          transpose_block(staging + d, padded, panel + d * width + c, width, head_dim - d);
        }
      }
    }
  }
};

#if defined(PRUNEOPS_ISA_AVX512BF16)
// Rows are bf16. One 32-bit element holds two neighbours along the depth.
template <>
struct Pack<PairOps> {
  static PRUNEOPS_INLINE int64_t depth(int64_t n) { return (n + 1) / 2; }

  static PRUNEOPS_INLINE void copy(uint32_t* dst, const char* src, int64_t head_dim, int64_t ld) {
    memcpy(dst, src, static_cast<size_t>(head_dim) * 2);
    memset(reinterpret_cast<char*>(dst) + head_dim * 2, 0,
           static_cast<size_t>(ld * 4 - head_dim * 2));
  }

  static void rows(uint32_t* dst, int64_t ld, const Rows& src, int64_t first, int64_t count,
                   int64_t head_dim) {
    for (int64_t r = 0; r < count; ++r) copy(dst + r * ld, src.at(first + r), head_dim, ld);
  }

  static PRUNEOPS_INLINE __m512i widen(const char* row, int64_t first, int64_t valid) {
    if (row == nullptr || valid <= 0) return _mm512_setzero_si512();
    const __mmask16 mask = valid >= 16 ? 0xffff : static_cast<__mmask16>((1u << valid) - 1u);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + first * 2));
  }

  static void panels(uint32_t* dst, const Rows& src, int64_t first, int64_t count,
                     int64_t head_dim) {
    const Panels panels(head_dim);
    const int64_t pairs = depth(count);
    for (int64_t r = 0; r < pairs; ++r) {
      const char* even = src.at(first + 2 * r);
      const char* odd = 2 * r + 1 < count ? src.at(first + 2 * r + 1) : nullptr;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t begin = panels.begin(p) * kVecWidth;
        const int64_t width = panels.begin(p + 1) * kVecWidth - begin;
        uint32_t* out = dst + begin * pairs + r * width;
        for (int64_t c = 0; c < width; c += kVecWidth) {
          const int64_t valid = head_dim - begin - c;
          const __m512i lo = widen(even, begin + c, valid);
          const __m512i hi = widen(odd, begin + c, valid);
          _mm512_storeu_si512(out + c, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
        }
      }
    }
  }

  static void transposed(uint32_t* dst, const Rows& src, int64_t first, int64_t count,
                         int64_t head_dim, float* staging) {
    const Panels panels(count);
    const int64_t steps = depth(head_dim);
    const int64_t padded = round_up(steps, kVecWidth);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t begin = panels.begin(p) * kVecWidth;
      const int64_t width = panels.begin(p + 1) * kVecWidth - begin;
      float* panel = reinterpret_cast<float*>(dst + begin * steps);
      for (int64_t c = 0; c < width; c += kVecWidth) {
        for (int64_t i = 0; i < kVecWidth; ++i) {
          const int64_t r = begin + c + i;
          uint32_t* row = reinterpret_cast<uint32_t*>(staging + i * padded);
          if (r < count) {
            copy(row, src.at(first + r), head_dim, padded);
          } else {
            memset(row, 0, static_cast<size_t>(padded) * sizeof(uint32_t));
          }
        }
        for (int64_t d = 0; d < steps; d += kVecWidth) {
          transpose_block(staging + d, padded, panel + d * width + c, width, steps - d);
        }
      }
    }
  }
};
#endif

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
