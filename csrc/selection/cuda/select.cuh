// Selection of rows, segment by segment, in one launch.
//
// One block takes a segment: it makes its keys, finds the cut and writes the rows that stay. A
// segment with more rows than the block can hold is shared by several (select_long.cuh).
//
// Where a segment's rows go depends on how many rows the segments before it keep. Blocks publish
// their counts as soon as they know them and look back over those of their predecessors.
//
// Blocks take tickets in the order in which they start, and the tickets say what they do: first
// everything that leads to the cuts of long segments, digit by digit, then the segments in order,
// then the rows of long segments. A block waits only for ones with an earlier ticket, which already
// run, so it does not matter how many blocks run at once.

#pragma once

#include "selection/cuda/select_long.cuh"

namespace pruneops {

// Says where the segment ends, and after the last one that nothing follows.
//   offset  rows that the segments before keep
__device__ __forceinline__ void finish_segment(int64_t segment, int64_t offset, uint32_t count,
                                               bool fill_rest, const CudaSelectParams& p) {
  const int64_t end = offset + count < p.capacity ? offset + count : p.capacity;
  if (threadIdx.x == 0) {
    if (segment == 0) p.cu_seqlens_out[0] = 0;
    p.cu_seqlens_out[segment + 1] = static_cast<int32_t>(end);
  }
  if (fill_rest && segment + 1 == p.num_segments) emit_nothing(end, p.capacity, p);
}

__device__ __forceinline__ void publish_count(int64_t segment, uint32_t count,
                                              const SelectWork& w) {
  if (threadIdx.x == 0) {
    publish(w.segment_progress + segment, (segment == 0 ? kSoFar : kOwn) | count);
  }
}

// Rows that the segments before keep; ends with a barrier.
__device__ __forceinline__ int64_t offset_of(int64_t segment, uint32_t count, const SelectWork& w,
                                             SelectShared& s) {
  if (segment > 0 && threadIdx.x < kWarpSize) {
    const unsigned long long offset = look_back(w.segment_progress, 0, segment, count);
    if (threadIdx.x == 0) s.offset = low_of(offset);
  }
  __syncthreads();
  return segment > 0 ? s.offset : 0;
}

// The cut of a segment that one block holds; fills keys.cached. Ends with a barrier.
template <typename Keys>
__device__ SegmentCutoff find_cut(const Keys& keys, int64_t segment, const CudaSelectParams& p,
                                  SelectShared& s) {
  KeyCounts counts = load_keys(keys, threshold_key(p));
  counts.num_protected = block_sum(counts.num_protected, s.warp_sums);
  counts.above = block_sum(counts.above, s.more_warp_sums);
  SegmentCutoff cut;
  bool complete = cut_by_counts(counts, static_cast<uint32_t>(keys.n), segment, p, cut);
  for (int digit = 0; !complete; ++digit) {
    count_digit(keys, cut, digit, s);
    complete = next_digit(cut, digit, s);
  }
  return cut;
}

// A segment that one block holds, rows [begin, begin + keys.n).
//   alone  no other segment, so nothing to publish or to look back over
template <typename Keys>
__device__ void select_segment(const Keys& keys, int64_t segment, int64_t begin, bool alone,
                               bool fill_rest, const CudaSelectParams& p, const SelectWork& w,
                               SelectShared& s) {
  const SegmentCutoff cut = find_cut(keys, segment, p, s);
  if (!alone) publish_count(segment, cut.count, w);
  count_rows(keys, cut.key, s);
  int64_t offset = 0;
  if (alone) {
    __syncthreads();
  } else {
    offset = offset_of(segment, cut.count, w, s);
  }
  emit_rows(keys, cut, {0, 0}, begin, offset, p, s);
  finish_segment(segment, offset, cut.count, fill_rest, p);
}

// The place of a long segment among the others; its rows are written by others.
__device__ __forceinline__ void place_long_segment(int64_t segment, int64_t begin,
                                                   const CudaSelectParams& p, const SelectWork& w,
                                                   SelectShared& s) {
  const LongState& state = w.states[long_place(begin, w)];
  wait_for_digits(state, kNumDigits);
  const uint32_t count = cut_of(state).count;
  publish_count(segment, count, w);
  finish_segment(segment, offset_of(segment, count, w, s), count, false, p);
}

// Threads of a block: a power of two from 32 to 1024. Without a workspace w.bounds is null, and
// there is at most one segment, of at most w.key_capacity rows.
template <typename Score>
__global__ void __launch_bounds__(1024, 1) select_kernel(CudaSelectParams p, SelectWork w) {
  PRUNEOPS_DYNAMIC_SHARED(uint32_t, room);
  __shared__ SelectShared s;
  if (p.num_segments == 0) {
    if (threadIdx.x == 0) p.cu_seqlens_out[0] = 0;
    return emit_nothing(0, p.capacity, p);
  }
  if (w.bounds == nullptr) {
    const int64_t begin = clamp_boundary(p.cu_seqlens[0], p.total);
    const int64_t end = clamp_boundary(p.cu_seqlens[1], p.total);
    const BlockKeys<Score> keys(p.scores, p.protect, begin, end > begin ? end - begin : 0, room);
    return select_segment(keys, 0, begin, true, true, p, w, s);
  }
  // Both ways to memory at once.
  const LongTotals totals = w.max_long > 0 ? *w.totals : LongTotals{0, 0};
  if (threadIdx.x == 0) s.ticket = atomicAdd(w.ticket, 1ull);
  __syncthreads();
  int64_t ticket = static_cast<int64_t>(s.ticket);
  const int64_t num_counts = static_cast<int64_t>(kNumDigits) * totals.num_stretches;
  if (ticket < num_counts) {
    const uint32_t item = static_cast<uint32_t>(ticket);
    const int digit = static_cast<int>(item / totals.num_stretches);
    return count_stretch<Score>(digit, item % totals.num_stretches, totals, p, w, room, s);
  }
  ticket -= num_counts;
  if (ticket < p.num_segments) {
    const int64_t begin = w.bounds[ticket];
    const int64_t n = w.bounds[ticket + 1] - begin;
    if (n > w.key_capacity) return place_long_segment(ticket, begin, p, w, s);
    const BlockKeys<Score> keys(p.scores, p.protect, begin, n, room);
    return select_segment(keys, ticket, begin, false, totals.num_stretches == 0, p, w, s);
  }
  ticket -= p.num_segments;
  if (ticket < totals.num_stretches) {
    emit_stretch<Score>(static_cast<uint32_t>(ticket), totals, p, w, room, s);
  }
}

}  // namespace pruneops
