// What a segment keeps, as a cut: a cutoff key and how many of the rows that equal it stay, the
// first ones. A radix select over 11, 11 and 10 bits finds it, from the highest bits down.

#pragma once

#include "common/cuda_block.cuh"
#include "selection/cuda/select.h"
#include "selection/cuda/select_keys.cuh"

namespace pruneops {

constexpr int kNumDigits = 3;
constexpr int kMaxDigitBits = 11;
constexpr int kNumBins = 1 << kMaxDigitBits;

// During the search for it: the digits that are known, and of the rows that begin with them as many
// as are still to be kept.
struct SegmentCutoff {
  uint32_t key;       // rows with a higher key stay
  uint32_t num_ties;  // of the rows with this key, as many stay
  uint32_t count;     // rows that stay
};

// Shared memory of a block.
struct SelectShared {
  uint32_t bins[kNumBins];
  uint32_t warp_sums[kMaxWarps];
  uint32_t more_warp_sums[kMaxWarps];
  uint32_t warp_above[kMaxWarps];
  uint32_t warp_ties[kMaxWarps];
  uint32_t digit;
  uint32_t before_digit;
  uint32_t in_digit;
  uint32_t offset;
  uint32_t above_before;
  uint32_t ties_before;
  uint32_t all_rows;
  uint32_t is_last;
  uint64_t ticket;
};

// Digit 0 holds the highest bits.
__device__ __forceinline__ int bits_right_of(int digit) {
  return digit + 1 < kNumDigits ? 32 - kMaxDigitBits * (digit + 1) : 0;
}
__device__ __forceinline__ int num_bins_of(int digit) {
  return digit + 1 < kNumDigits ? kNumBins : 1 << (32 - kMaxDigitBits * (kNumDigits - 1));
}

// No score is above a NaN; only protected keys are above kProtectedKey - 1.
__device__ __forceinline__ uint32_t threshold_key(const CudaSelectParams& p) {
  const uint32_t key = p.use_threshold ? ordered_key(p.threshold) : kNanKey;
  return key == kNanKey ? kProtectedKey - 1 : key;
}

// Sets how many rows stay and, if no search is needed for it, the whole cut. Returns whether that
// was so; if not, the cut is ready for next_digit.
//   counts  of the whole segment, with threshold_key(p)
//   n       rows of the segment
__device__ __forceinline__ bool cut_by_counts(const KeyCounts& counts, uint32_t n, int64_t segment,
                                              const CudaSelectParams& p, SegmentCutoff& cut) {
  const int32_t min_keep = p.keep_counts == nullptr ? 0 : p.keep_counts[segment];
  const uint32_t num_free = n - counts.num_protected;
  uint32_t wanted = min_keep < 0 ? 0 : static_cast<uint32_t>(min_keep);
  wanted = wanted < num_free ? wanted : num_free;
  if (p.use_threshold && counts.above - counts.num_protected >= wanted) {
    cut = {threshold_key(p), 0, counts.above};
  } else if (wanted == 0) {
    cut = {kProtectedKey - 1, 0, counts.num_protected};
  } else if (wanted == num_free) {
    cut = {kNanKey, n, n};
  } else {
    const uint32_t keep = counts.num_protected + wanted;  // 0 < keep < n
    cut = {0, keep, keep};
    return false;
  }
  return true;
}

// Counts into s.bins the keys that begin with the known digits, by their next one. Ends with a
// barrier.
template <typename Keys>
__device__ void count_digit(const Keys& keys, const SegmentCutoff& cut, int digit,
                            SelectShared& s) {
  const int shift = bits_right_of(digit);
  const uint32_t num_bins = num_bins_of(digit);
  const uint32_t known = digit == 0 ? 0 : ~0u << bits_right_of(digit - 1);
  for (uint32_t bin = threadIdx.x; bin < num_bins; bin += blockDim.x) s.bins[bin] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < keys.n; i += blockDim.x) {
    const uint32_t key = keys[i];
    if ((key & known) == cut.key) atomicAdd(&s.bins[(key >> shift) & (num_bins - 1)], 1u);
  }
  __syncthreads();
}

// Finds the next digit from the counts in s.bins. Returns whether the cut is complete.
__device__ __forceinline__ bool next_digit(SegmentCutoff& cut, int digit, SelectShared& s) {
  // Each thread owns neighbouring bins; thread 0 the highest ones.
  const uint32_t num_bins = num_bins_of(digit);
  const uint32_t owned = num_bins / blockDim.x;
  const uint32_t top = num_bins - 1 - threadIdx.x * owned;
  uint32_t in_owned = 0;
  for (uint32_t j = 0; j < owned; ++j) in_owned += s.bins[top - j];
  uint32_t before = block_exclusive_sum(in_owned, s.warp_sums);
  if (before < cut.num_ties && cut.num_ties <= before + in_owned) {
    uint32_t bin = top;
    while (before + s.bins[bin] < cut.num_ties) before += s.bins[bin--];
    s.digit = bin;
    s.before_digit = before;
    s.in_digit = s.bins[bin];
  }
  __syncthreads();

  cut.key |= s.digit << bits_right_of(digit);
  cut.num_ties -= s.before_digit;
  if (s.in_digit == cut.num_ties) {
    // The whole bin stays; as not all rows do, some key is lower, so cut.key is not 0.
    --cut.key;
    cut.num_ties = 0;
    return true;
  }
  return digit + 1 == kNumDigits;
}

}  // namespace pruneops
