// Selection, one block a segment.
//
// A score becomes a uint32 key that sorts like the score does: NaN lowest, -0.0 equal to +0.0; a
// protected row gets the highest key of all. A radix select over 11, 11 and 10 bits finds the cut:
// a cutoff key and how many of the rows that equal it stay, the first ones. Nothing is sorted: one
// ordered pass with ballots writes the kept rows in ascending order.
//
// Where a segment's rows go depends on how many rows the segments before it keep. Blocks publish
// their counts as soon as they know them and look back over those of their predecessors. Blocks
// take segments in the order in which they start, so a block only waits for blocks that already
// run.

#pragma once

#include "common/cuda_block.cuh"
#include "common/cuda_kernel.h"
#include "common/float_types.h"
#include "selection/cuda/select.h"

namespace pruneops {

constexpr uint32_t kNanKey = 0;
constexpr uint32_t kProtectedKey = 0xffffffffu;
constexpr int kMaxDigitBits = 11;
constexpr int kNumBins = 1 << kMaxDigitBits;

// Published counts: the upper half says what the lower half is.
constexpr unsigned long long kOwnCount = 1ull << 32;    // rows this segment keeps
constexpr unsigned long long kCountSoFar = 2ull << 32;  // rows it and all before it keep

struct SegmentCutoff {
  uint32_t key;       // rows with a higher key stay
  uint32_t num_ties;  // of the rows with this key, as many stay
  uint32_t count;     // rows that stay
};

struct SelectShared {
  uint32_t bins[kNumBins];
  uint32_t warp_sums[kMaxWarps];
  uint32_t more_warp_sums[kMaxWarps];
  uint32_t warp_above[kMaxWarps];
  uint32_t warp_ties[kMaxWarps];
  uint32_t digit;
  uint32_t before_digit;
  uint32_t in_digit;
  uint32_t segment;
  uint32_t offset;
};

__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = bits_of_float(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNanKey;
  if (magnitude == 0) return 0x80000000u;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The keys of one segment: from shared memory where they fit, else made anew from the scores.
template <typename Score, bool kCached>
struct SegmentKeys {
  static constexpr bool kIsCached = kCached;
  const Score* scores;     // [n]
  const uint8_t* protect;  // [n] or null
  uint32_t* cached;        // [n] in shared memory, if kCached
  int64_t n;

  __device__ __forceinline__ uint32_t make(int64_t i) const {
    if (protect != nullptr && protect[i] != 0) return kProtectedKey;
    return ordered_key(to_float(scores[i]));
  }

  __device__ __forceinline__ uint32_t operator[](int64_t i) const {
    return kCached ? cached[i] : make(i);
  }
};

// The cut that keeps the k highest keys, 0 < k < n.
template <typename Keys>
__device__ SegmentCutoff radix_cut(const Keys& keys, uint32_t k, SelectShared& s) {
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  uint32_t remaining = k;
  int shift = 32;
  while (shift > 0) {
    const int bits = shift < kMaxDigitBits ? shift : kMaxDigitBits;
    shift -= bits;
    const uint32_t num_bins = 1u << bits;
    for (uint32_t bin = threadIdx.x; bin < num_bins; bin += blockDim.x) s.bins[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < keys.n; i += blockDim.x) {
      const uint32_t key = keys[i];
      if ((key & prefix_mask) == prefix) atomicAdd(&s.bins[(key >> shift) & (num_bins - 1)], 1u);
    }
    __syncthreads();

    // Each thread owns neighbouring bins; thread 0 the highest ones.
    const uint32_t owned = num_bins / blockDim.x;
    const uint32_t top = num_bins - 1 - threadIdx.x * owned;
    uint32_t in_owned = 0;
    for (uint32_t j = 0; j < owned; ++j) in_owned += s.bins[top - j];
    uint32_t before = block_exclusive_sum(in_owned, s.warp_sums);
    if (before < remaining && remaining <= before + in_owned) {
      uint32_t digit = top;
      while (before + s.bins[digit] < remaining) before += s.bins[digit--];
      s.digit = digit;
      s.before_digit = before;
      s.in_digit = s.bins[digit];
    }
    __syncthreads();

    prefix |= s.digit << shift;
    prefix_mask |= (num_bins - 1) << shift;
    remaining -= s.before_digit;
    // The whole bin stays; with k < n some key is lower, so prefix is not 0.
    if (s.in_digit == remaining) return {prefix - 1, 0, k};
  }
  return {prefix, remaining, k};
}

// The cut of one segment; fills keys.cached.
//   min_keep  unprotected rows to keep at least
template <typename Keys>
__device__ SegmentCutoff find_cutoff(const Keys& keys, int64_t min_keep, const CudaSelectParams& p,
                                     SelectShared& s) {
  const uint32_t n = static_cast<uint32_t>(keys.n);
  // No score is above a NaN; only protected keys are above kProtectedKey - 1.
  const uint32_t threshold_key = p.use_threshold ? ordered_key(p.threshold) : kNanKey;
  const uint32_t threshold_cutoff = threshold_key == kNanKey ? kProtectedKey - 1 : threshold_key;
  uint32_t num_protected = 0;
  uint32_t above = 0;
  for (int64_t i = threadIdx.x; i < keys.n; i += blockDim.x) {
    const uint32_t key = keys.make(i);
    if (Keys::kIsCached) keys.cached[i] = key;
    num_protected += key == kProtectedKey;
    above += key > threshold_cutoff;
  }
  // Also makes the cached keys visible to the block.
  num_protected = block_sum(num_protected, s.warp_sums);
  above = block_sum(above, s.more_warp_sums);

  const uint32_t num_free = n - num_protected;
  uint32_t wanted = min_keep < 0 ? 0 : static_cast<uint32_t>(min_keep);
  wanted = wanted < num_free ? wanted : num_free;
  if (p.use_threshold && above - num_protected >= wanted) return {threshold_cutoff, 0, above};
  if (wanted == 0) return {kProtectedKey - 1, 0, num_protected};
  if (wanted == num_free) return {kNanKey, n, n};
  return radix_cut(keys, num_protected + wanted, s);
}

// Rows that the segments before this one keep; called by the first warp. Publishes the sum with
// this segment's own count.
__device__ __forceinline__ uint32_t look_back(uint32_t segment, uint32_t count,
                                              unsigned long long* progress) {
  // Each word says by itself all there is to know, so no fence is needed.
  volatile unsigned long long* published = progress;
  const int lane = threadIdx.x;
  uint32_t offset = 0;
  for (int64_t last = static_cast<int64_t>(segment) - 1; last >= 0; last -= kWarpSize) {
    const int64_t other = last - lane;
    unsigned long long word = kCountSoFar;
    if (other >= 0) {
      do {
        word = published[other];
      } while (word == 0);
    }
    const uint32_t complete = __ballot_sync(kAllLanes, word >= kCountSoFar);
    // Lanes up to the nearest predecessor that knows the sum of all before it.
    const bool counts = complete == 0 || lane < __ffs(complete);
    offset += warp_sum(counts ? static_cast<uint32_t>(word) : 0);
    if (complete != 0) break;
  }
  if (lane == 0) published[segment] = kCountSoFar | (offset + count);
  return offset;
}

// Rows [begin, end) of the segment that this warp looks at: whole rows of lanes.
struct Stretch {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Stretch stretch_of_warp(int64_t n) {
  const int64_t warp = threadIdx.x / kWarpSize;
  const int64_t per_block = blockDim.x;
  const int64_t length = (n + per_block - 1) / per_block * kWarpSize;
  const int64_t begin = warp * length;
  return {begin, begin + length < n ? begin + length : n};
}

// Counts the rows of each warp's stretch that lie above the cutoff and that equal it.
template <typename Keys>
__device__ void count_rows(const Keys& keys, uint32_t cutoff, SelectShared& s) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const Stretch stretch = stretch_of_warp(keys.n);
  uint32_t above = 0;
  uint32_t ties = 0;
  for (int64_t i = stretch.begin + lane; i < stretch.end; i += kWarpSize) {
    const uint32_t key = keys[i];
    above += key > cutoff;
    ties += key == cutoff;
  }
  above = warp_sum(above);
  ties = warp_sum(ties);
  if (lane == 0) {
    s.warp_above[warp] = above;
    s.warp_ties[warp] = ties;
  }
}

// Writes the kept rows in ascending order; after count_rows and a barrier.
//   first_row  the segment's first row in the packed tensor
//   offset     place of the segment's first kept row in indices
template <typename Keys>
__device__ void emit_rows(const Keys& keys, const SegmentCutoff& cut, int64_t first_row,
                          int64_t offset, const CudaSelectParams& p, const SelectShared& s) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const uint32_t lanes_before = (1u << lane) - 1;
  const Stretch stretch = stretch_of_warp(keys.n);
  // Rows before this one that lie above the cutoff, and that equal it.
  uint32_t above = warp_sum(lane < warp ? s.warp_above[lane] : 0);
  uint32_t ties = warp_sum(lane < warp ? s.warp_ties[lane] : 0);
  for (int64_t base = stretch.begin; base < stretch.end; base += kWarpSize) {
    const int64_t i = base + lane;
    const uint32_t key = i < stretch.end ? keys[i] : 0;
    const bool is_above = i < stretch.end && key > cut.key;
    const bool is_tie = i < stretch.end && key == cut.key;
    const uint32_t above_mask = __ballot_sync(kAllLanes, is_above);
    const uint32_t tie_mask = __ballot_sync(kAllLanes, is_tie);
    const uint32_t tie_rank = ties + __popc(tie_mask & lanes_before);
    const uint32_t kept_ties = tie_rank < cut.num_ties ? tie_rank : cut.num_ties;
    if (is_above || (is_tie && tie_rank < cut.num_ties)) {
      const int64_t place = offset + above + __popc(above_mask & lanes_before) + kept_ties;
      if (place < p.capacity) p.indices[place] = static_cast<int32_t>(first_row + i);
    }
    above += __popc(above_mask);
    ties += __popc(tie_mask);
  }
}

// One segment, rows [begin, begin + keys.n).
template <typename Keys>
__device__ void select_segment(const Keys& keys, int64_t segment, int64_t begin,
                               const CudaSelectParams& p, SelectShared& s) {
  const bool alone = p.num_segments == 1;
  const int64_t min_keep = p.keep_counts == nullptr ? 0 : p.keep_counts[segment];
  const SegmentCutoff cut = find_cutoff(keys, min_keep, p, s);
  if (!alone && threadIdx.x == 0) {
    *static_cast<volatile unsigned long long*>(p.progress + segment) =
        (segment == 0 ? kCountSoFar : kOwnCount) | cut.count;
  }
  count_rows(keys, cut.key, s);
  if (!alone && segment > 0 && threadIdx.x < kWarpSize) {
    const uint32_t offset = look_back(static_cast<uint32_t>(segment), cut.count, p.progress);
    if (threadIdx.x == 0) s.offset = offset;
  }
  __syncthreads();
  const int64_t offset = alone || segment == 0 ? 0 : s.offset;
  emit_rows(keys, cut, begin, offset, p, s);

  const int64_t end = offset + cut.count < p.capacity ? offset + cut.count : p.capacity;
  if (threadIdx.x == 0) {
    if (segment == 0) p.cu_seqlens_out[0] = 0;
    p.cu_seqlens_out[segment + 1] = static_cast<int32_t>(end);
  }
  if (segment + 1 == p.num_segments) {
    for (int64_t i = end + threadIdx.x; i < p.capacity; i += blockDim.x) p.indices[i] = -1;
  }
}

__device__ __forceinline__ int32_t clamp_boundary(int32_t boundary, int64_t total) {
  if (boundary < 0) return 0;
  return boundary < total ? boundary : static_cast<int32_t>(total);
}

// Fills bounds with the sanitized cu_seqlens and clears progress. One block.
__global__ void prepare_select_kernel(CudaSelectParams p) {
  __shared__ int32_t warp_max[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  int32_t carry = 0;
  for (int64_t base = 0; base <= p.num_segments; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    int32_t bound = i <= p.num_segments ? clamp_boundary(p.cu_seqlens[i], p.total) : 0;
    bound = warp_inclusive_max(bound);
    if (lane == kWarpSize - 1) warp_max[warp] = bound;
    __syncthreads();
    for (int other = 0; other < num_warps; ++other) {
      if (other == warp && carry > bound) bound = carry;
      if (warp_max[other] > carry) carry = warp_max[other];
    }
    if (i <= p.num_segments) {
      p.bounds[i] = bound;
      p.progress[i] = 0;
    }
    __syncthreads();
  }
}

// One block a segment; threads a power of two from 32 to 1024.
//   key_capacity  keys that fit into the dynamic shared memory; longer segments make them anew
template <typename Score>
__global__ void __launch_bounds__(1024, 1) select_kernel(CudaSelectParams p, int64_t key_capacity) {
  PRUNEOPS_DYNAMIC_SHARED(uint32_t, cached_keys);
  __shared__ SelectShared s;
  if (p.num_segments == 0) {
    if (threadIdx.x == 0) p.cu_seqlens_out[0] = 0;
    for (int64_t i = threadIdx.x; i < p.capacity; i += blockDim.x) p.indices[i] = -1;
    return;
  }
  int64_t segment = 0;
  int64_t begin = 0;
  int64_t end = 0;
  if (p.num_segments == 1) {
    begin = clamp_boundary(p.cu_seqlens[0], p.total);
    end = clamp_boundary(p.cu_seqlens[1], p.total);
  } else {
    if (threadIdx.x == 0) {
      s.segment = static_cast<uint32_t>(atomicAdd(p.progress + p.num_segments, 1ull));
    }
    __syncthreads();
    segment = s.segment;
    begin = p.bounds[segment];
    end = p.bounds[segment + 1];
  }
  const int64_t n = end > begin ? end - begin : 0;
  const Score* scores = static_cast<const Score*>(p.scores) + begin;
  const uint8_t* protect = p.protect == nullptr ? nullptr : p.protect + begin;
  if (n <= key_capacity) {
    select_segment(SegmentKeys<Score, true>{scores, protect, cached_keys, n}, segment, begin, p, s);
  } else {
    select_segment(SegmentKeys<Score, false>{scores, protect, nullptr, n}, segment, begin, p, s);
  }
}

}  // namespace pruneops
