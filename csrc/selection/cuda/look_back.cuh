// Sums over all that comes before, while it is still being made.
//
// Every item of a sequence publishes in one word what it adds, as soon as that is known, and later
// the sum up to and with itself. Looking back, an item adds up single items until it meets such a
// sum. Whoever looks back must know that every item before it has a block that already runs.

#pragma once

#include "common/cuda_block.cuh"

namespace pruneops {

// Upper bits of a word; 0 says that nothing is published.
constexpr unsigned long long kOwn = 1ull << 62;
constexpr unsigned long long kSoFar = 2ull << 62;
constexpr unsigned long long kPublishedValue = kOwn - 1;

// Two numbers below 2^31 whose sums stay below it.
constexpr int kPairShift = 31;

__device__ __forceinline__ unsigned long long pair_of(uint32_t high, uint32_t low) {
  return static_cast<unsigned long long>(high) << kPairShift | low;
}
__device__ __forceinline__ uint32_t high_of(unsigned long long pair) {
  return static_cast<uint32_t>(pair >> kPairShift);
}
__device__ __forceinline__ uint32_t low_of(unsigned long long pair) {
  return static_cast<uint32_t>(pair & ((1ull << kPairShift) - 1));
}

// Each word says by itself all there is to know, so no fence is needed.
__device__ __forceinline__ void publish(unsigned long long* word, unsigned long long value) {
  *static_cast<volatile unsigned long long*>(word) = value;
}

// Waits until the item has published at least its own value (kOwn), or the sum (kSoFar).
__device__ __forceinline__ unsigned long long published(const unsigned long long* word,
                                                        unsigned long long at_least) {
  const volatile unsigned long long* place = word;
  unsigned long long value = 0;
  do {
    value = *place;
  } while (value < at_least);
  return value;
}

// The sum of the items in words [first, index); publishes the sum with `own`. Called by the first
// warp, after one of its lanes has published `own` alone.
__device__ __forceinline__ unsigned long long look_back(unsigned long long* words, int64_t first,
                                                        int64_t index, unsigned long long own) {
  const int lane = threadIdx.x;
  unsigned long long sum = 0;
  for (int64_t last = index - 1; last >= first; last -= kWarpSize) {
    const int64_t other = last - lane;
    const unsigned long long word = other >= first ? published(words + other, kOwn) : kSoFar;
    const uint32_t complete = __ballot_sync(kAllLanes, word >= kSoFar);
    // Lanes up to the nearest item that knows the sum.
    const bool counts = complete == 0 || lane < __ffs(complete);
    unsigned long long value = counts ? word & kPublishedValue : 0;
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    sum += value;
    if (complete != 0) break;
  }
  if (lane == 0) publish(words + index, kSoFar | (sum + own));
  return sum;
}

}  // namespace pruneops
