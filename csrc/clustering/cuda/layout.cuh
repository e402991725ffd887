// Where the rows of each segment are, how many clusters it has, and which tiles of its distance
// matrix are to be computed.

#pragma once

#include "clustering/cuda/clustering.h"
#include "clustering/cuda/segments.cuh"

namespace pruneops {

constexpr int kTile = 64;         // rows on either side of a tile of a distance matrix
constexpr int kRowThreads = 256;  // a warp a row
constexpr int kRowWarps = kRowThreads / kWarpSize;

struct SegmentRows {
  int64_t begin;  // packed row
  int64_t count;
};

// Rows of one segment, without those past max_seqlen.
__device__ __forceinline__ SegmentRows segment_rows(const CudaDpcKnnParams& p, int64_t segment) {
  const int64_t begin = p.bounds[segment];
  return {begin, at_most<int64_t>(p.bounds[segment + 1] - begin, p.max_seqlen)};
}

// The segment of a packed row; count 0 if it belongs to none.
struct RowPlace {
  int64_t segment;
  SegmentRows rows;
  int64_t row;  // within the segment
};

__device__ __forceinline__ RowPlace place_of_row(const CudaDpcKnnParams& p, int64_t row) {
  const int64_t segment = first_ending_past(p.bounds + 1, p.num_segments, row);
  if (segment == p.num_segments) return {segment, {0, 0}, 0};
  const SegmentRows rows = segment_rows(p, segment);
  const int64_t local = row - rows.begin;
  if (local < 0 || local >= rows.count) return {segment, {0, 0}, 0};
  return {segment, rows, local};
}

__device__ __forceinline__ int64_t tiles_of(int64_t num_rows) {
  return (num_rows + kTile - 1) / kTile;
}

// Tiles of a segment that are computed for the buffer.
__device__ __forceinline__ int64_t work_items(int64_t num_rows, bool whole) {
  const int64_t tiles = tiles_of(num_rows);
  return whole ? tiles * (tiles + 1) / 2 : tiles * tiles;
}

// One block: boundaries, clusters and work items of all segments.
static __global__ void __launch_bounds__(kLayoutThreads)
    dpc_knn_layout_kernel(CudaDpcKnnParams p, bool whole) {
  __shared__ LayoutShared s;
  write_bounds(p.cu_seqlens, p.num_segments, p.x.total, p.bounds, s);
  const auto rows = [&](int64_t b) { return segment_rows(p, b).count; };
  sum_over_segments(
      p.num_segments,
      [&](int64_t b) { return at_most(at_least<int64_t>(p.num_clusters[b], 1), rows(b)); },
      [&](int64_t b, int64_t sum) {
        p.cu_clusters[b + 1] = static_cast<int32_t>(at_most(sum, p.capacity));
      },
      s);
  sum_over_segments(
      p.num_segments, [&](int64_t b) { return work_items(rows(b), whole); },
      [&](int64_t b, int64_t sum) { p.items[b + 1] = sum; }, s);
  for (int64_t b = threadIdx.x; b < p.num_segments; b += kLayoutThreads) {
    p.max_distance[b] = 0;
    p.votes[b] = 0;
  }
  if (threadIdx.x == 0) {
    p.cu_clusters[0] = 0;
    p.items[0] = 0;
  }
}

// Packed rows whose distances to the rows of their segments are in the buffer.
struct Panel {
  int64_t begin;
  int64_t end;
};

// The first work item that is not before packed row `row`; tiles are in the order of their rows.
__device__ __forceinline__ int64_t first_item(const CudaDpcKnnParams& p, int64_t row) {
  const int64_t b = first_ending_past(p.bounds + 1, p.num_segments, row);
  if (b == p.num_segments) return p.items[b];
  const SegmentRows rows = segment_rows(p, b);
  const int64_t tile = at_least<int64_t>(row - rows.begin, 0) / kTile;
  return p.items[b] + at_most(tile, tiles_of(rows.count)) * tiles_of(rows.count);
}

// The first work item behind those of packed rows up to `last`.
__device__ __forceinline__ int64_t end_item(const CudaDpcKnnParams& p, int64_t last) {
  const int64_t b = first_ending_past(p.bounds + 1, p.num_segments, last);
  if (b == p.num_segments) return p.items[b];
  const SegmentRows rows = segment_rows(p, b);
  if (last < rows.begin) return p.items[b];
  const int64_t tile = (last - rows.begin) / kTile + 1;
  return p.items[b] + at_most(tile, tiles_of(rows.count)) * tiles_of(rows.count);
}

// Column `item` of the triangle whose column j has j + 1 items: the first j with more than `item`
// items up to it.
__device__ __forceinline__ int64_t triangle_column(int64_t item) {
  int64_t j = static_cast<int64_t>((sqrtf(8.0f * static_cast<float>(item) + 1.0f) - 1.0f) * 0.5f);
  while (j * (j + 1) / 2 > item) --j;
  while ((j + 1) * (j + 2) / 2 <= item) ++j;
  return j;
}

}  // namespace pruneops
