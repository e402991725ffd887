// Selection within one segment, compiled once per instruction set. The including file defines
// PRUNEOPS_ISA_NAMESPACE and gets everything in it; nothing here may be shared between instruction
// sets, so no standard algorithm or container is used.
//
// The cutoff is found by bisecting the key range: each step counts the keys above a pivot, a loop
// that the compiler turns into compare-and-subtract at full vector width. Typical scores need about
// 15 steps, because the search ends as soon as the pivot separates exactly the wanted number; 32
// are the most there can be. The loops over `keys` below are kept plain so that they vectorise.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/float_types.h"
#include "selection/selection.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int32_t kNanKey = INT32_MIN;
constexpr int32_t kProtectedKey = INT32_MAX;
constexpr int32_t kInfinityBits = 0x7f800000;

inline int32_t bits_of(float value) { return static_cast<int32_t>(bits_of_float(value)); }

// Key of a float given by its bits: the magnitude with the sign of the float.
inline int32_t key_of_bits(int32_t bits) {
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t key = bits < 0 ? -magnitude : magnitude;
  return magnitude > kInfinityBits ? kNanKey : key;
}

inline int32_t float_bits(const float* scores, int64_t i) { return bits_of(scores[i]); }

inline int32_t float_bits(const BFloat16* scores, int64_t i) {
  return static_cast<int32_t>(static_cast<uint32_t>(scores[i].bits) << 16);
}

// Subnormals go through an integer conversion, so that flush-to-zero modes cannot change the order.
inline int32_t float_bits(const Half* scores, int64_t i) {
  const int32_t half = scores[i].bits;
  const int32_t magnitude = half & 0x7fff;
  const int32_t normal = (magnitude << 13) + (112 << 23);
  const int32_t subnormal = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
  const int32_t special = (magnitude << 13) | kInfinityBits;
  const int32_t finite = magnitude < 0x0400 ? subnormal : normal;
  const int32_t bits = magnitude >= 0x7c00 ? special : finite;
  return (half & 0x8000) != 0 ? bits | INT32_MIN : bits;
}

struct KeyRange {
  int32_t min;
  int32_t max;
};

// keys[i] = key of scores[i], i < n.
//   scores, keys  [n]
template <typename Score>
KeyRange make_keys(const Score* scores, int64_t n, int32_t* keys) {
  int32_t lowest = INT32_MAX;
  int32_t highest = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = key_of_bits(float_bits(scores, i));
    keys[i] = key;
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  return {lowest, highest};
}

// Gives protected rows the highest key. Returns how many there are.
//   protect, keys  [n]
int32_t apply_protect(const uint8_t* protect, int64_t n, int32_t* keys) {
  int32_t num_protected = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool is_protected = protect[i] != 0;
    keys[i] = is_protected ? kProtectedKey : keys[i];
    num_protected += is_protected;
  }
  return num_protected;
}

//   keys  [n]
int32_t count_above(const int32_t* keys, int64_t n, int32_t pivot) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] > pivot;
  return count;
}

// The cut that keeps the k highest keys, num_protected < k < n.
//   keys   [n]
//   range  holds every key that is not protected
SegmentCut find_cut(const int32_t* keys, int64_t n, int32_t num_protected, int32_t k,
                    KeyRange range) {
  // More than k keys lie above `low`, fewer than k above `high`.
  int64_t low = static_cast<int64_t>(range.min) - 1;
  int64_t high = range.max;
  int32_t above_high = num_protected;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int32_t above = count_above(keys, n, static_cast<int32_t>(middle));
    if (above == k) return {static_cast<int32_t>(middle), 0, k};
    if (above > k) {
      low = middle;
    } else {
      high = middle;
      above_high = above;
    }
  }
  return {static_cast<int32_t>(high), k - above_high, k};
}

SegmentCut cut_segment(const SelectParams& p, int64_t segment) {
  const int64_t start = p.cu_seqlens[segment];
  const int64_t n = p.cu_seqlens[segment + 1] - start;
  int32_t* keys = p.keys + start;
  KeyRange range{0, 0};
  switch (p.score_type) {
    case FloatType::kFloat32:
      range = make_keys(static_cast<const float*>(p.scores) + start, n, keys);
      break;
    case FloatType::kBFloat16:
      range = make_keys(static_cast<const BFloat16*>(p.scores) + start, n, keys);
      break;
    case FloatType::kFloat16:
      range = make_keys(static_cast<const Half*>(p.scores) + start, n, keys);
      break;
  }
  const int32_t num_rows = static_cast<int32_t>(n);
  const int32_t num_protected =
      p.protect == nullptr ? 0 : apply_protect(p.protect + start, n, keys);
  const int32_t num_free = num_rows - num_protected;
  int32_t wanted = p.keep_counts == nullptr ? 0 : p.keep_counts[segment];
  wanted = wanted < 0 ? 0 : wanted;
  wanted = wanted > num_free ? num_free : wanted;

  if (p.use_threshold) {
    // No score is above a NaN; only protected keys are above kProtectedKey - 1.
    const int32_t threshold_key = key_of_bits(bits_of(p.threshold));
    const int32_t cutoff = threshold_key == kNanKey ? kProtectedKey - 1 : threshold_key;
    const int32_t above = count_above(keys, n, cutoff);
    if (above - num_protected >= wanted) return {cutoff, 0, above};
  }
  if (wanted == 0) return {kProtectedKey - 1, 0, num_protected};
  if (wanted == num_free) return {kNanKey, num_rows, num_rows};
  return find_cut(keys, n, num_protected, num_protected + wanted, range);
}

// State of one ascending pass over a segment.
struct Emitter {
  int32_t* out;
  int32_t limit;
  int32_t written;
  int32_t ties_left;
};

// Rows [i, n) one by one.
//   keys  [n]
void emit_rows(const int32_t* keys, int64_t i, int64_t n, int32_t first_row, int32_t cutoff,
               Emitter& e) {
  for (; i < n && e.written < e.limit; ++i) {
    const bool tie = keys[i] == cutoff && e.ties_left > 0;
    e.out[e.written] = first_row + static_cast<int32_t>(i);
    e.ties_left -= tie;
    e.written += tie || keys[i] > cutoff;
  }
}

#if defined(__AVX2__)

// `ties` without all but its lowest ties_left bits; takes those from ties_left.
inline uint32_t take_ties(uint32_t ties, int32_t& ties_left) {
  uint32_t taken = 0;
  while (ties != 0 && ties_left > 0) {
    taken |= ties & (0u - ties);
    ties &= ties - 1;
    --ties_left;
  }
  return taken;
}

// How many of the kept rows of one block still fit.
inline int32_t clamped_count(uint32_t keep, const Emitter& e) {
  const int32_t count = __builtin_popcount(keep);
  const int32_t room = e.limit - e.written;
  return count < room ? count : room;
}

#endif

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;

// Sixteen rows at a time: a compare gives the mask of kept rows, a compress packs their numbers.
// Returns the first row that was not looked at.
//   keys  [n]
int64_t emit_blocks(const int32_t* keys, int64_t n, int32_t first_row, int32_t cutoff, Emitter& e) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pivot = _mm512_set1_epi32(cutoff);
  int64_t i = 0;
  for (; i + kLanes <= n && e.written < e.limit; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    uint32_t keep = _mm512_cmpgt_epi32_mask(key, pivot);
    const uint32_t ties = _mm512_cmpeq_epi32_mask(key, pivot);
    if (ties != 0) keep |= take_ties(ties, e.ties_left);
    const __m512i row =
        _mm512_add_epi32(lane, _mm512_set1_epi32(first_row + static_cast<int32_t>(i)));
    const int32_t count = clamped_count(keep, e);
    _mm512_mask_storeu_epi32(e.out + e.written, static_cast<__mmask16>((1u << count) - 1),
                             _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), row));
    e.written += count;
  }
  return i;
}

#elif defined(__AVX2__)

constexpr int64_t kLanes = 8;

// For each mask of eight lanes the numbers of its set lanes, packed to the front.
struct CompressTable {
  uint8_t lanes[256][8];
};

constexpr CompressTable make_compress_table() {
  CompressTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if ((mask >> bit) & 1) table.lanes[mask][count++] = static_cast<uint8_t>(bit);
    }
  }
  return table;
}

constexpr CompressTable kCompress = make_compress_table();

// Eight rows at a time: a compare gives the mask of kept rows, a table lookup packs their numbers.
// Returns the first row that was not looked at.
//   keys  [n]
int64_t emit_blocks(const int32_t* keys, int64_t n, int32_t first_row, int32_t cutoff, Emitter& e) {
  const __m256i pivot = _mm256_set1_epi32(cutoff);
  int64_t i = 0;
  for (; i + kLanes <= n && e.written < e.limit; i += kLanes) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i above = _mm256_cmpgt_epi32(key, pivot);
    const __m256i equal = _mm256_cmpeq_epi32(key, pivot);
    uint32_t keep = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
    const uint32_t ties = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
    if (ties != 0) keep |= take_ties(ties, e.ties_left);
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[keep]));
    const __m256i row = _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes),
                                         _mm256_set1_epi32(first_row + static_cast<int32_t>(i)));
    const int32_t count = clamped_count(keep, e);
    if (e.written + kLanes <= e.limit) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(e.out + e.written), row);
    } else {
      int32_t packed[kLanes];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), row);
      std::memcpy(e.out + e.written, packed, static_cast<size_t>(count) * sizeof(int32_t));
    }
    e.written += count;
  }
  return i;
}

#endif

void emit_segment(const SelectParams& p, int64_t segment, int32_t* out, int32_t limit) {
  const int32_t start = p.cu_seqlens[segment];
  const int64_t n = p.cu_seqlens[segment + 1] - start;
  const int32_t* keys = p.keys + start;
  const SegmentCut cut = p.cuts[segment];
  Emitter e{out, limit, 0, cut.num_ties};
  int64_t i = 0;
#if defined(__AVX2__)
  i = emit_blocks(keys, n, start, cut.cutoff, e);
#endif
  emit_rows(keys, i, n, start, cut.cutoff, e);
}

}  // namespace

SelectKernels kernels() { return {&cut_segment, &emit_segment}; }

}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
