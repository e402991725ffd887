// Packing rows into panels and the squared distances between two panels.
//
// |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, with x.y from a register-blocked matrix product. Where the
// three terms cancel to less than kCancellation of the norms, which near duplicates do, the
// distance is computed again from the differences. Each value depends on its two rows alone, not on
// the tile it falls into, so equal rows have equal distances to everything.

#pragma once

#include <string.h>

#include "clustering/clustering.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int64_t kPanelRows = kVecWidth;
// Register block of the product: kMicroRows rows of one panel times kTilePanels panels.
#if defined(PRUNEOPS_VEC_AVX512)
constexpr int kMicroRows = 8;
#else
constexpr int kMicroRows = 4;
#endif
constexpr int kTilePanels = 3;
constexpr int64_t kTileColumns = kTilePanels * kPanelRows;
// Sums over channels are added up in blocks of this many, which keeps their rounding error small.
constexpr int64_t kBlockChannels = 256;
constexpr float kCancellation = 1.0f / 16.0f;
constexpr int64_t kOriginRows = 16;

static_assert(kPanelRows % kMicroRows == 0, "a panel is a whole number of register blocks");

template <class T>
PRUNEOPS_INLINE void load_row_as(float* dst, const T* src, int64_t count) {
  int64_t i = 0;
  for (; i + kVecWidth <= count; i += kVecWidth) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = to_float(src[i]);
}

// dst[0, count) = src[first, first + count) in float.
PRUNEOPS_INLINE void load_row(float* dst, const char* src, FloatType type, int64_t first,
                              int64_t count) {
  switch (type) {
    case FloatType::kFloat32:
      return load_row_as(dst, reinterpret_cast<const float*>(src) + first, count);
    case FloatType::kBFloat16:
      return load_row_as(dst, reinterpret_cast<const BFloat16*>(src) + first, count);
    case FloatType::kFloat16:
      return load_row_as(dst, reinterpret_cast<const Half*>(src) + first, count);
  }
}

PRUNEOPS_INLINE const char* source_row(const SourceRows& source, int64_t row) {
  return source.data + (source.indices == nullptr ? row : source.indices[row]) * source.row_bytes;
}

PRUNEOPS_INLINE bool is_finite(const float* row, int64_t count) {
  Vec zeros = zero();  // NaN in a lane with a value that is not finite
  int64_t c = 0;
  for (; c + kVecWidth <= count; c += kVecWidth) zeros = fma(load(row + c), zero(), zeros);
  bool finite = equal_mask(zeros, zero()) == kAllLanes;
  for (; c < count; ++c) finite = finite && row[c] * 0.0f == 0.0f;
  return finite;
}

// The mean of the finite ones among a few rows, each channel rounded to a fraction of its spread.
// The rounding keeps differences of values with few bits exact, and with them ties.
void choose_origin(const SourceRows& source, int64_t rows, int64_t channels, float* origin,
                   float* scratch) {
  float* row = scratch;
  float* low = row + channels;
  float* high = low + channels;
  float* sum = high + channels;
  const int64_t samples = min_of(rows, kOriginRows);
  int64_t used = 0;
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t index = samples > 1 ? s * (rows - 1) / (samples - 1) : 0;
    load_row(row, source_row(source, index), source.type, 0, channels);
    if (!is_finite(row, channels)) continue;
    for (int64_t c = 0; c < channels; ++c) {
      low[c] = used == 0 || row[c] < low[c] ? row[c] : low[c];
      high[c] = used == 0 || row[c] > high[c] ? row[c] : high[c];
      sum[c] = used == 0 ? row[c] : sum[c] + row[c];
    }
    ++used;
  }
  if (used == 0) {
    memset(origin, 0, static_cast<size_t>(channels) * sizeof(float));
    return;
  }
  const float share = 1.0f / static_cast<float>(used);
  for (int64_t c = 0; c < channels; ++c) {
    const float mean = sum[c] * share;
    // A quarter of the spread, rounded down to a power of two. Dividing by it is exact, and adding
    // and taking away 1.5 * 2^23 rounds to a whole number.
    uint32_t bits;
    const float spread = high[c] - low[c];
    memcpy(&bits, &spread, sizeof(bits));
    bits &= 0x7f800000u;
    float step;
    memcpy(&step, &bits, sizeof(step));
    step *= 0.25f;
    const float steps = mean / step;
    const float rounded = ((steps + 0x1.8p23f) - 0x1.8p23f) * step;
    const bool fits = step > 0x1p-100f && steps < 0x1p22f && steps > -0x1p22f;
    const float value = fits ? rounded : spread == 0.0f ? low[c] : mean;
    origin[c] = value - value == 0.0f ? value : 0.0f;
  }
}

// The sum of squares of each row of a panel, in the order in which the product adds up.
PRUNEOPS_INLINE void panel_norms(const float* panel, int64_t channels, float* norms) {
  Vec total = zero();
  for (int64_t first = 0; first < channels; first += kBlockChannels) {
    const int64_t last = min_of(first + kBlockChannels, channels);
    Vec sum = zero();
    for (int64_t c = first; c < last; ++c) {
      const Vec v = load(panel + c * kPanelRows);
      sum = fma(v, v, sum);
    }
    total = first == 0 ? sum : total + sum;
  }
  store(norms, total);
}

constexpr int64_t kPackScratch = kPanelRows * kBlockChannels;

void pack(const SourceRows& source, const float* origin, const Panels& panels, int64_t begin,
          int64_t end, float* scratch) {
  const int64_t channels = panels.channels;
  for (int64_t p = begin; p < end; ++p) {
    float* panel = panels.values + p * channels * kPanelRows;
    const int64_t valid = min_of(kPanelRows, panels.rows - p * kPanelRows);
    for (int64_t first = 0; first < channels; first += kBlockChannels) {
      const int64_t count = min_of(kBlockChannels, channels - first);
      const int64_t padded = round_up(count, kVecWidth);
      for (int64_t r = 0; r < kPanelRows; ++r) {
        float* row = scratch + r * kBlockChannels;
        if (r < valid) {
          load_row(row, source_row(source, p * kPanelRows + r), source.type, first, count);
          for (int64_t c = 0; c < count; ++c) row[c] -= origin[first + c];
        }
        const int64_t filled = r < valid ? count : 0;
        memset(row + filled, 0, static_cast<size_t>(padded - filled) * sizeof(float));
      }
      for (int64_t c = 0; c < padded; c += kVecWidth) {
        transpose_block(scratch + c, kBlockChannels, panel + (first + c) * kPanelRows, kPanelRows,
                        count - c);
      }
    }
    panel_norms(panel, channels, panels.norms + p * kPanelRows);
  }
}

struct Products {
  static PRUNEOPS_INLINE Vec step(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

struct SquaredDifferences {
  static PRUNEOPS_INLINE Vec step(Vec a, Vec b, Vec sum) {
    const Vec difference = b - a;
    return fma(difference, difference, sum);
  }
};

// A register block over one block of channels.
//   a    row m at channel c: a[c * kPanelRows + m]
//   b    vector j at channel c: b[j * panel_size + c * kPanelRows]
//   out  (m, j) at out[m * kTileColumns + j * kVecWidth], set or added to
template <class Op, int kVectors>
PRUNEOPS_INLINE void micro_channels(const float* a, const float* b, int64_t panel_size,
                                    int64_t channels, bool add, float* out) {
  Vec sum[kMicroRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[m][j] = zero();
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * panel_size + c * kPanelRows);
#pragma GCC unroll 8
    for (int m = 0; m < kMicroRows; ++m) {
      const Vec x = broadcast(a[c * kPanelRows + m]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[m][j] = Op::step(x, row[j], sum[m][j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* p = out + m * kTileColumns + j * kVecWidth;
      store(p, add ? load(p) + sum[m][j] : sum[m][j]);
    }
  }
}

template <class Op, int kVectors>
void micro(const float* a, const float* b, int64_t channels, float* out) {
  const int64_t panel_size = channels * kPanelRows;
  int64_t first = 0;
  do {  // once for no channels at all, which leaves zeros
    const int64_t count = min_of(kBlockChannels, channels - first);
    micro_channels<Op, kVectors>(a + first * kPanelRows, b + first * kPanelRows, panel_size, count,
                                 first > 0, out);
    first += kBlockChannels;
  } while (first < channels);
}

// Turns the products of a register row of blocks into mean squared distances.
//   a, b          as in micro
//   norms_a       [kMicroRows]
//   norms_b       [vectors * kVecWidth]
//   columns       columns that are no padding
//   same          column at which row 0 meets itself, or something out of reach
//   out           products on entry
void finish_block(const float* a, const float* b, int64_t channels, const float* norms_a,
                  const float* norms_b, int64_t vectors, int64_t columns, int64_t same, float scale,
                  float* out) {
  const Vec infinity = broadcast(__builtin_inff());
  for (int64_t j = 0; j < vectors; ++j) {
    uint32_t cancelled[kMicroRows];
    uint32_t any = 0;
    for (int m = 0; m < kMicroRows; ++m) {
      float* p = out + m * kTileColumns + j * kVecWidth;
      const Vec norms = broadcast(norms_a[m]) + load(norms_b + j * kVecWidth);
      const Vec squared = fma(broadcast(-2.0f), load(p), norms);
      store(p, squared);
      // Written so that NaN counts as cancelled: finite rows may have norms that overflow.
      cancelled[m] = ~at_least_mask(squared, norms * broadcast(kCancellation)) & kAllLanes;
      const int64_t own = same + m - j * kVecWidth;
      if (own >= 0 && own < kVecWidth) cancelled[m] &= ~(1u << own);
      any |= cancelled[m];
    }
    float exact[kMicroRows * kTileColumns];
    if (any != 0) {
      micro<SquaredDifferences, 1>(a, b + j * channels * kPanelRows, channels, exact);
    }
    for (int m = 0; m < kMicroRows; ++m) {
      float* p = out + m * kTileColumns + j * kVecWidth;
      for (uint32_t left = cancelled[m]; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        p[lane] = exact[m * kTileColumns + lane];
      }
      store(p, vmin(load(p) * broadcast(scale), infinity));  // NaN becomes +inf
      const int64_t own = same + m - j * kVecWidth;
      if (own >= 0 && own < kVecWidth) p[own] = 0.0f;
      for (int64_t i = max_of<int64_t>(columns - j * kVecWidth, 0); i < kVecWidth; ++i) {
        p[i] = __builtin_inff();
      }
    }
  }
}

// See ClusterKernels::tile_distances.
void tile_distances(const Panels& a, int64_t p, const Panels& b, int64_t q, int64_t count,
                    float* out) {
  const int64_t channels = a.channels;
  const float scale = 1.0f / static_cast<float>(max_of<int64_t>(channels, 1));
  const int64_t rows = min_of(kPanelRows, a.rows - p * kPanelRows);
  const float* right = b.values + q * channels * kPanelRows;
  for (int64_t m = 0; m < rows; m += kMicroRows) {
    const float* left = a.values + p * channels * kPanelRows + m;
    float* block = out + m * kTileColumns;
    if (count == 3) {
      micro<Products, 3>(left, right, channels, block);
    } else if (count == 2) {
      micro<Products, 2>(left, right, channels, block);
    } else {
      micro<Products, 1>(left, right, channels, block);
    }
    const int64_t same = a.values == b.values ? (p - q) * kPanelRows + m : -kPanelRows;
    finish_block(left, right, channels, a.norms + p * kPanelRows + m, b.norms + q * kPanelRows,
                 count, b.rows - q * kPanelRows, same, scale, block);
  }
}

// See ClusterKernels::store_distances.
void store_distances(const Panels& panels, int64_t p_begin, int64_t p_end, int64_t q_begin,
                     int64_t q_end, float* out) {
  float tile[kPanelRows * kTileColumns];
  memset(tile, 0, sizeof(tile));  // transposing reads rows that the last panel does not have
  for (int64_t p = p_begin; p < p_end; ++p) {
    const int64_t rows = min_of(kPanelRows, panels.rows - p * kPanelRows);
    for (int64_t q = max_of(p, q_begin); q < q_end; q += kTilePanels) {
      const int64_t count = min_of<int64_t>(kTilePanels, q_end - q);
      tile_distances(panels, p, panels, q, count, tile);
      for (int64_t m = 0; m < rows; ++m) {
        float* row = out + (p * kPanelRows + m) * panels.padded + q * kPanelRows;
        for (int64_t j = 0; j < count; ++j) {
          store(row + j * kVecWidth, load(tile + m * kTileColumns + j * kVecWidth));
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        if (q + j == p) continue;
        const int64_t first = (q + j) * kPanelRows;
        transpose_block(tile + j * kVecWidth, kTileColumns,
                        out + first * panels.padded + p * kPanelRows, panels.padded,
                        panels.rows - first);
      }
    }
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
