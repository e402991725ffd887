// Which tile a block works on. One block a pass writes the schedule (flash_schedule.cu): the
// segments, those of the most work first, and how many tiles lie before each, in O(segments). A
// work item is a tile of one key head; the blocks find theirs by its number, in time logarithmic in
// the number of segments, whether they have one item each or take the next one from a counter.
//
// Order within a segment: heads in sections whose keys and values fit in the L2 cache together, in
// a section first the tiles of the most work and of those all heads. So the last items of the pass
// are small ones.

#pragma once

#include "attention/cuda/flash.h"
#include "attention/cuda/segment_limits.cuh"

namespace pruneops {

// What one pass knows of one segment: a record of the schedule.
//   x, y  first row and number of rows of the queries
//   z, w  first row (with slots the number of the slot) and number of keys
using SegmentRecord = int4;

// The schedule's scratch, as its parts.
struct FlashSchedule {
  int32_t* num_tiles;      // [1] of all segments together
  int32_t* next_item;      // [1] 0 when the pass begins; for kernels that stay
  SegmentRecord* records;  // [num_segments + 2] in order of work
  int32_t* first_tile;     // [num_segments + 3] tiles of the records before
  int32_t* bounds;         // [2, num_segments + 1] of queries and packed keys, clamped
  int32_t num_records;

  PRUNEOPS_HOST_DEVICE FlashSchedule(int32_t* scratch, int64_t num_segments)
      : num_tiles(scratch),
        next_item(scratch + 1),
        records(reinterpret_cast<SegmentRecord*>(scratch + 4)),
        first_tile(scratch + 4 + 4 * (num_segments + 2)),
        bounds(first_tile + num_segments + 3),
        num_records(static_cast<int32_t>(num_segments + 2)) {}
};

// The work item of a block.
struct FlashTile {
  Segment segment;
  int64_t begin;  // first packed row or first key, counted from the segment's
  int32_t size;   // packed rows or keys, at least 1, at most the order's tile
  int32_t head_k;
};

// Packed rows, or keys, that the tiles of a segment cut.
PRUNEOPS_HOST_DEVICE inline int64_t tiled_rows(const Segment& segment, const FlashOrder& order) {
  return order.keys ? segment.k_len : segment.q_len * order.group;
}

PRUNEOPS_HOST_DEVICE inline int64_t tiles_of(const Segment& segment, const FlashOrder& order) {
  return (tiled_rows(segment, order) + order.tile - 1) / order.tile;
}

// Segments are sorted by what their largest tile goes through, to an eighth: 0 for the most.
constexpr int kWorkClasses = 256;
PRUNEOPS_HOST_DEVICE inline int work_class(const Segment& segment, const FlashOrder& order) {
  uint32_t work = static_cast<uint32_t>(order.keys ? segment.q_len : segment.k_len);
  int eighths = 0;  // of a doubling, as far as there are that many numbers
  while (work >= 16) work /= 2, ++eighths;
  return kWorkClasses - 1 - static_cast<int>(8 * eighths + work);
}

// Number `item` of the tiles x heads of a segment.
struct PlaceInSegment {
  int32_t tile, head_k;
};
PRUNEOPS_HOST_DEVICE inline PlaceInSegment place_in_segment(int32_t item, int32_t tiles,
                                                            int32_t num_heads_k,
                                                            int32_t heads_together, bool keys) {
  const int32_t first_head = item / (tiles * heads_together) * heads_together;
  const int32_t in_section = item - first_head * tiles;
  const int32_t left = num_heads_k - first_head;
  const int32_t heads = left < heads_together ? left : heads_together;
  const int32_t n = in_section / heads;
  // The last queries see the most keys, the first keys are seen by the most queries.
  return {keys ? n : tiles - 1 - n, first_head + in_section - n * heads};
}

// Heads whose streamed rows (keys and values; for keys, queries and gradients of the output) take
// half of the smallest L2 cache in question, the 40 MB of an A100 in two halves.
constexpr int64_t kSectionBytes = int64_t{10} << 20;
PRUNEOPS_HOST_DEVICE inline int32_t heads_together(const Segment& segment, const FlashOrder& order,
                                                   const Heads& heads) {
  const int64_t rows = order.keys ? segment.q_len * heads.group : segment.k_len;
  const int64_t bytes = 4 * heads.head_dim * rows;
  if (bytes * heads.num_heads_k <= kSectionBytes) return static_cast<int32_t>(heads.num_heads_k);
  if (bytes >= kSectionBytes) return 1;
  return static_cast<int32_t>(kSectionBytes) / static_cast<int32_t>(bytes);
}

PRUNEOPS_HOST_DEVICE inline Segment segment_of(const SegmentRecord& r, bool slots) {
  return {r.x, r.y, slots ? 0 : r.z, r.w, slots ? r.z : 0};
}

// Item number `item` of a segment.
PRUNEOPS_HOST_DEVICE inline FlashTile tile_of(const Segment& segment, int32_t tiles, int32_t item,
                                              const FlashOrder& order, const Heads& heads) {
  const PlaceInSegment place =
      place_in_segment(item, tiles, static_cast<int32_t>(heads.num_heads_k),
                       heads_together(segment, order, heads), order.keys);
  const int64_t begin = int64_t{place.tile} * order.tile;
  const int64_t left = tiled_rows(segment, order) - begin;
  return {segment, begin, left < order.tile ? static_cast<int32_t>(left) : order.tile,
          place.head_k};
}

// The first entry above x, `count` if there is none. Every lane of the warp asks the same: each
// round they look at 32 entries at once.
//   ends  [count] non-decreasing
__device__ __forceinline__ int32_t warp_first_above(const int32_t* ends, int32_t count, int32_t x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int32_t low = 0, size = count;  // the answer is in [low, low + size]
  while (size > 0) {
    const int32_t step = (size + kWarpSize - 1) / kWarpSize;
    const int32_t probe = (lane + 1) * step - 1;
    const unsigned above = __ballot_sync(kAllLanes, probe >= size || ends[low + probe] > x);
    if (above == 0) return low + size;
    const int32_t skipped = (__ffs(static_cast<int>(above)) - 1) * step;
    low += skipped;
    size = size - skipped < step - 1 ? size - skipped : step - 1;
  }
  return low;
}

// Finds work item `item` of a pass; false from the last one on. Every lane of the warp must call it
// with the same item. A grid has less than 2^31 blocks, so there are no more items.
__device__ __forceinline__ bool find_tile(const FlashOrder& order, const FlashSegments& segments,
                                          const Heads& heads, uint32_t item, FlashTile& tile) {
  const FlashSchedule schedule(order.scratch, segments.num_segments);
  const int32_t num_heads_k = static_cast<int32_t>(heads.num_heads_k);
  const int32_t n = static_cast<int32_t>(item) / num_heads_k;
  if (n >= *schedule.num_tiles) return false;
  const int32_t i = warp_first_above(schedule.first_tile + 1, schedule.num_records, n);
  const int32_t before = schedule.first_tile[i];
  tile = tile_of(segment_of(schedule.records[i], segments.seqused_k != nullptr),
                 schedule.first_tile[i + 1] - before,
                 static_cast<int32_t>(item) - before * num_heads_k, order, heads);
  return true;
}

}  // namespace pruneops
