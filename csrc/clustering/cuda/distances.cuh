// The kernels that fill the distance buffer: norms first, then tiles.

#pragma once

#include "clustering/cuda/distance_tiles.cuh"

namespace pruneops {

__device__ __forceinline__ double warp_total(double value) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, flip);
  }
  return value;
}

// Squared norms of each row, shifted in norms[0, total) and as it is in norms[total, 2 total), and
// the segment's votes for shifting; what rows of no segment get; and the end of center_indices.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows_kernel(CudaDpcKnnParams p, bool vectors) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kRowThreads;
  for (int64_t i = p.cu_clusters[p.num_segments] + thread; i < p.capacity; i += num_threads) {
    p.center_indices[i] = -1;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = thread / kWarpSize;
  if (row >= p.x.total) return;
  const RowPlace place = place_of_row(p, row);
  if (place.rows.count == 0) {
    if (lane == 0) {
      p.density[row] = p.delta[row] = p.score[row] = 0.0f;
      p.cluster_ids[row] = -1;
    }
    return;
  }
  const Middle<T> middle{p.x, place.rows};
  const T* x = row_of<T>(p.x, row);
  double shifted = 0, plain = 0;
  for (int64_t c = lane * kQuad; c < p.x.channels; c += kWarpSize * kQuad) {
    const int64_t count = p.x.channels - c;
    const float4 v = as_floats(load_quad(x + c, count, vectors));
    const float4 d = minus(v, middle.at(c, count, vectors));
    shifted += double{d.x} * d.x + double{d.y} * d.y + double{d.z} * d.z + double{d.w} * d.w;
    plain += double{v.x} * v.x + double{v.y} * v.y + double{v.z} * v.z + double{v.w} * v.w;
  }
  shifted = warp_total(shifted);
  plain = warp_total(plain);
  if (lane == 0) {
    p.norms[row] = static_cast<float>(shifted);
    p.norms[p.x.total + row] = static_cast<float>(plain);
    if (sizeof(T) == 2 && plain > kWorthShifting * shifted) atomicAdd(p.votes + place.segment, 1);
  }
}

// The tile of a work item.
__device__ __forceinline__ TileWork tile_work(const CudaDpcKnnParams& p, int64_t item, bool whole,
                                              bool half_precision) {
  const int64_t b = first_ending_past(p.items + 1, p.num_segments, item);
  const int64_t of_segment = item - p.items[b];
  TileWork work;
  work.segment = segment_rows(p, b);
  // One way for the whole segment, so that equal rows have equal distances.
  work.shift = !half_precision || p.votes[b] > work.segment.count / 2;
  if (whole) {
    work.j = triangle_column(of_segment);
    work.i = of_segment - work.j * (work.j + 1) / 2;
    work.turned = false;
  } else {
    const int64_t tiles = tiles_of(work.segment.count);
    const int64_t row = of_segment / tiles, column = of_segment % tiles;
    work.i = at_most(row, column);
    work.j = at_least(row, column);
    work.turned = row > column;
  }
  return work;
}

// Puts the tile, or its mirror image, into the panel's rows of the buffer.
__device__ __forceinline__ void store_tile(const CudaDpcKnnParams& p, const TileWork& work,
                                           bool mirrored, const Panel& panel, int64_t pitch,
                                           const TileShared& s) {
  const int64_t first_row = (mirrored ? work.j : work.i) * kTile;
  const int64_t first_column = (mirrored ? work.i : work.j) * kTile;
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kTile; e += kTileThreads) {
    const int r = e / kTile, c = e % kTile;
    const int64_t row = work.segment.begin + first_row + r, column = first_column + c;
    if (first_row + r < work.segment.count && column < work.segment.count && row >= panel.begin &&
        row < panel.end) {
      p.distances[(row - panel.begin) * pitch + column] =
          mirrored ? s.distances[c][r] : s.distances[r][c];
    }
  }
}

// Fills the buffer with the distances of the panel's rows.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    distances_kernel(CudaDpcKnnParams p, Panel panel, bool whole, int64_t pitch, bool vectors) {
  __shared__ __align__(16) TileShared s;
  __shared__ TileWork work;
  const int64_t end = whole ? p.items[p.num_segments] : end_item(p, panel.end - 1);
  int64_t item = (whole ? 0 : first_item(p, panel.begin)) + blockIdx.x;
  for (; item < end; item += gridDim.x) {
    if (threadIdx.x == 0) work = tile_work(p, item, whole, sizeof(T) == 2);
    __syncthreads();
    compute_tile<T>(p, work, vectors, s);
    if (!work.turned) store_tile(p, work, false, panel, pitch, s);
    if (work.turned || (whole && work.i != work.j)) store_tile(p, work, true, panel, pitch, s);
    __syncthreads();
  }
}

}  // namespace pruneops
