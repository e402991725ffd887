// Segments longer than the rows that one block holds: several blocks share one, a stretch of rows
// each, and take it four times.
//
// Once for each digit of the cut: the blocks add up their counts in global memory, and the one that
// is the last to do so finds the digit and publishes it. And once to write the rows, which needs
// the rows above the cutoff and the ties in the stretches before: they look back over those.
//
// A block waits only for blocks that have taken their ticket before it: for the counts of the digit
// before, and, to write, for the segment's cut and offset and the stretches before its own.

#pragma once

#include "selection/cuda/look_back.cuh"
#include "selection/cuda/select_emit.cuh"
#include "selection/cuda/select_work.cuh"

namespace pruneops {

struct Stretch {
  int64_t segment;
  int64_t place;   // of the segment's state
  int64_t begin;   // first row in the packed tensor
  int64_t n;       // rows
  uint32_t first;  // first stretch of the segment, counted over all long segments
  uint32_t count;  // stretches of the segment
};

// Where a stretch lies; by the whole block, ends with a barrier.
//   index  counted over all long segments
__device__ __forceinline__ Stretch find_stretch(uint32_t index, uint32_t num_long,
                                                const SelectWork& w) {
  __shared__ LongSegment of_stretch;
  if (threadIdx.x < kWarpSize) {
    LongSegment found{0, 0};
    for (uint32_t base = 0; base < num_long; base += kWarpSize) {
      const uint32_t i = base + threadIdx.x;
      const LongSegment own = i < num_long ? w.long_segments[i] : LongSegment{0, ~0u};
      // The last segment that begins at or before the stretch.
      const uint32_t mask = __ballot_sync(kAllLanes, own.first_stretch <= index);
      if (mask == 0) break;
      found.segment = __shfl_sync(kAllLanes, own.segment, __popc(mask) - 1);
      found.first_stretch = __shfl_sync(kAllLanes, own.first_stretch, __popc(mask) - 1);
    }
    if (threadIdx.x == 0) of_stretch = found;
  }
  __syncthreads();
  const LongSegment found = of_stretch;
  const int64_t begin = w.bounds[found.segment];
  const int64_t end = w.bounds[found.segment + 1];
  Stretch stretch;
  stretch.segment = found.segment;
  stretch.place = long_place(begin, w);
  stretch.begin = begin + (index - found.first_stretch) * w.stretch_rows;
  stretch.n = end - stretch.begin < w.stretch_rows ? end - stretch.begin : w.stretch_rows;
  stretch.first = found.first_stretch;
  stretch.count = num_stretches_of(end - begin, w);
  return stretch;
}

// Waits until so many digits of the cut are known, and makes what was written before that visible
// to the block. Returns how many there are.
__device__ __forceinline__ uint32_t wait_for_digits(const LongState& state, uint32_t wanted) {
  const volatile uint32_t* known = &state.digits_known;
  if (threadIdx.x == 0) {
    while (*known < wanted) {
    }
    __threadfence();
  }
  __syncthreads();
  return *known;
}

__device__ __forceinline__ SegmentCutoff cut_of(const LongState& state) {
  return {__ldcg(&state.cut.key), __ldcg(&state.cut.num_ties), __ldcg(&state.cut.count)};
}

// Called by the block that has brought the last counts of a digit.
__device__ __forceinline__ void finish_digit(int digit, const Stretch& stretch,
                                             const CudaSelectParams& p, const SelectWork& w,
                                             SelectShared& s) {
  LongState& state = w.states[stretch.place];
  uint32_t* bins = w.bins + stretch.place * kNumBins;
  for (int bin = threadIdx.x; bin < num_bins_of(digit); bin += blockDim.x) {
    s.bins[bin] = __ldcg(bins + bin);
    bins[bin] = 0;  // for the next digit
  }
  __syncthreads();
  SegmentCutoff cut = cut_of(state);
  bool complete = false;
  if (digit == 0) {
    const KeyCounts counts{__ldcg(&state.num_protected), __ldcg(&state.above)};
    const int64_t n = w.bounds[stretch.segment + 1] - w.bounds[stretch.segment];
    complete = cut_by_counts(counts, static_cast<uint32_t>(n), stretch.segment, p, cut);
  }
  if (!complete) complete = next_digit(cut, digit, s);
  if (threadIdx.x == 0) {
    state.cut = cut;
    __threadfence();
    *static_cast<volatile uint32_t*>(&state.digits_known) = complete ? kNumDigits : digit + 1;
  }
}

// One digit of the cut, as far as one stretch is concerned.
//   room  [w.stretch_rows + kKeyPadding] in shared memory
template <typename Score>
__device__ void count_stretch(int digit, uint32_t index, const LongTotals& totals,
                              const CudaSelectParams& p, const SelectWork& w, uint32_t* room,
                              SelectShared& s) {
  const Stretch stretch = find_stretch(index, totals.num_long, w);
  LongState& state = w.states[stretch.place];
  SegmentCutoff cut{0, 0, 0};
  if (digit > 0) {
    if (wait_for_digits(state, digit) == kNumDigits) return;
    cut = cut_of(state);
  }
  const BlockKeys<Score> keys(p.scores, p.protect, stretch.begin, stretch.n, room);
  const KeyCounts counts = load_keys(keys, threshold_key(p));
  // Its first barrier makes the keys visible to the block.
  count_digit(keys, cut, digit, s);
  uint32_t* bins = w.bins + stretch.place * kNumBins;
  for (int bin = threadIdx.x; bin < num_bins_of(digit); bin += blockDim.x) {
    if (s.bins[bin] != 0) atomicAdd(bins + bin, s.bins[bin]);
  }
  if (digit == 0) {
    const uint32_t num_protected = block_sum(counts.num_protected, s.warp_sums);
    const uint32_t above = block_sum(counts.above, s.more_warp_sums);
    if (threadIdx.x == 0) {
      atomicAdd(&state.num_protected, num_protected);
      atomicAdd(&state.above, above);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // Whoever sees the arrival sees the counts.
    __threadfence();
    s.is_last = atomicAdd(&state.arrived, 1u) + 1 == (digit + 1) * stretch.count;
    __threadfence();
  }
  __syncthreads();
  if (s.is_last != 0) finish_digit(digit, stretch, p, w, s);
}

// Writes the rows that a stretch keeps, and its share of what is left of indices behind the last
// row of all.
//   room  [w.stretch_rows + kKeyPadding] in shared memory
template <typename Score>
__device__ void emit_stretch(uint32_t index, const LongTotals& totals, const CudaSelectParams& p,
                             const SelectWork& w, uint32_t* room, SelectShared& s) {
  const Stretch stretch = find_stretch(index, totals.num_long, w);
  const BlockKeys<Score> keys(p.scores, p.protect, stretch.begin, stretch.n, room);
  load_keys(keys, threshold_key(p));
  // Its barrier makes the keys visible to the block, too.
  wait_for_digits(w.states[stretch.place], kNumDigits);
  const SegmentCutoff cut = cut_of(w.states[stretch.place]);
  count_rows(keys, cut.key, s);
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    const bool is_warp = lane < static_cast<int>(blockDim.x) / kWarpSize;
    const uint32_t above = warp_sum(is_warp ? s.warp_above[lane] : 0);
    const uint32_t ties = warp_sum(is_warp ? s.warp_ties[lane] : 0);
    const unsigned long long own = pair_of(above, ties);
    if (lane == 0) publish(w.stretch_progress + index, kOwn | own);
    const unsigned long long before = look_back(w.stretch_progress, stretch.first, index, own);
    if (lane == 0) {
      s.above_before = high_of(before);
      s.ties_before = low_of(before);
      s.offset = low_of(published(w.segment_progress + stretch.segment, kSoFar)) - cut.count;
      s.all_rows = low_of(published(w.segment_progress + p.num_segments - 1, kSoFar));
    }
  }
  __syncthreads();
  emit_rows(keys, cut, {s.above_before, s.ties_before}, stretch.begin, s.offset, p, s);

  const int64_t end = s.all_rows < p.capacity ? s.all_rows : p.capacity;
  const int64_t share = (p.capacity - end + totals.num_stretches - 1) / totals.num_stretches;
  const int64_t begin = end + index * share;
  emit_nothing(begin, begin + share < p.capacity ? begin + share : p.capacity, p);
}

}  // namespace pruneops
