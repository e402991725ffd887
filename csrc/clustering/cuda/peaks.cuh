// Density peaks from the rows of a distance matrix: density, distance to the nearest denser row,
// rank of the score, nearest centre. One warp a row; what a step needs of other rows is complete
// when its kernel starts. No result depends on the order of blocks or threads.

#pragma once

#include <math.h>

#include "clustering/cuda/layout.cuh"
#include "common/cuda_score_order.cuh"

namespace pruneops {

// The packed row of a warp in a grid over a panel; panel.end if there is none for it.
__device__ __forceinline__ int64_t row_of_warp(const Panel& panel) {
  const int64_t row =
      panel.begin + static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  return at_most(row, panel.end);
}

// f(column, distance) for every column of this lane.
//   distances  [num_rows], 16-byte aligned
template <class F>
__device__ __forceinline__ void for_distances(const float* distances, int64_t num_rows,
                                              const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float4* quads = reinterpret_cast<const float4*>(distances);
  const int64_t num_quads = num_rows / 4;
  for (int64_t q = lane; q < num_quads; q += kWarpSize) {
    const float4 d = quads[q];
    f(4 * q, d.x);
    f(4 * q + 1, d.y);
    f(4 * q + 2, d.z);
    f(4 * q + 3, d.w);
  }
  const int64_t column = 4 * num_quads + lane;
  if (column < num_rows) f(column, distances[column]);
}

// Distances are not negative, so their bits are ordered as they are.
__device__ __forceinline__ uint32_t ordered_bits(float distance) {
  return __float_as_uint(distance);
}

constexpr int kFewNeighbours = 8;

// Sum of the squares of the k smallest distances, k at most kFewNeighbours and num_rows, smallest
// first. Every lane keeps the smallest ones of its own; then the smallest of all is taken k times.
__device__ __forceinline__ float sum_of_few(const float* distances, int64_t num_rows, int k) {
  float nearest[kFewNeighbours];  // ascending
#pragma unroll
  for (float& d : nearest) d = INFINITY;
  for_distances(distances, num_rows, [&](int64_t, float d) {
    if (!(d < nearest[kFewNeighbours - 1])) return;
    nearest[kFewNeighbours - 1] = d;
#pragma unroll
    for (int i = kFewNeighbours - 1; i > 0; --i) {
      const float low = fminf(nearest[i - 1], nearest[i]);
      nearest[i] = fmaxf(nearest[i - 1], nearest[i]);
      nearest[i - 1] = low;
    }
  });
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float sum = 0.0f;
  for (int taken = 0; taken < k; ++taken) {
    const uint32_t own = ordered_bits(nearest[0]);
    const uint32_t least = __reduce_min_sync(kAllLanes, own);
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, own == least))) - 1;
    if (lane == owner) {
#pragma unroll
      for (int i = 0; i + 1 < kFewNeighbours; ++i) nearest[i] = nearest[i + 1];
      nearest[kFewNeighbours - 1] = INFINITY;
    }
    const float d = __uint_as_float(least);
    sum = __fadd_rn(sum, __fmul_rn(d, d));
  }
  return sum;
}

constexpr int kBins = 256;

// The same for any k up to num_rows: the k-th smallest distance is found digit by digit.
//   bins  scratch of the warp in shared memory, [kBins]
__device__ __forceinline__ float sum_of_many(const float* distances, int64_t num_rows, int64_t k,
                                             uint32_t* bins) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr int kBinsOfLane = kBins / kWarpSize;
  uint32_t found = 0, mask = 0;  // leading digits of the k-th smallest
  uint32_t rest = static_cast<uint32_t>(k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = lane; bin < kBins; bin += kWarpSize) bins[bin] = 0;
    __syncwarp();
    for_distances(distances, num_rows, [&](int64_t, float d) {
      const uint32_t bits = ordered_bits(d);
      if ((bits & mask) == found) atomicAdd(&bins[bits >> shift & (kBins - 1)], 1u);
    });
    __syncwarp();
    uint32_t own = 0;
    for (int i = 0; i < kBinsOfLane; ++i) own += bins[lane * kBinsOfLane + i];
    const uint32_t up_to = warp_inclusive_sum(own);
    uint32_t before = up_to - own, digit = 0;
    const bool here = before < rest && rest <= up_to;
    if (here) {
      digit = lane * kBinsOfLane;
      while (before + bins[digit] < rest) before += bins[digit++];
    }
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
    found |= __shfl_sync(kAllLanes, digit, owner) << shift;
    mask |= uint32_t{kBins - 1} << shift;
    rest -= __shfl_sync(kAllLanes, before, owner);
  }
  float sum = 0.0f;
  for_distances(distances, num_rows, [&](int64_t, float d) {
    if (ordered_bits(d) < found) sum = __fadd_rn(sum, __fmul_rn(d, d));
  });
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
  const float last = __uint_as_float(found);
  return sum + static_cast<float>(rest) * (last * last);
}

// Density of the panel's rows, and the largest distance of each segment.
static __global__ void __launch_bounds__(kRowThreads)
    density_kernel(CudaDpcKnnParams p, Panel panel, int64_t pitch) {
  __shared__ uint32_t bins[kRowWarps][kBins];
  const int64_t row = row_of_warp(panel);
  if (row == panel.end) return;
  const RowPlace place = place_of_row(p, row);
  if (place.rows.count == 0) return;
  const float* distances = p.distances + (row - panel.begin) * pitch;
  const int64_t k = at_most(p.k, place.rows.count);
  const float sum =
      k <= kFewNeighbours
          ? sum_of_few(distances, place.rows.count, static_cast<int>(k))
          : sum_of_many(distances, place.rows.count, k, bins[threadIdx.x / kWarpSize]);
  float largest = 0.0f;
  for_distances(distances, place.rows.count,
                [&](int64_t, float d) { largest = fmaxf(largest, d); });
  const uint32_t most = __reduce_max_sync(kAllLanes, ordered_bits(largest));
  if (threadIdx.x % kWarpSize != 0) return;
  float density = expf(-(sum / static_cast<float>(k)));
  if (p.noise != nullptr) density = __fadd_rn(density, __fmul_rn(p.noise[row], 1e-6f));
  p.density[row] = density;
  // Most rows need not write: an old value is never above the present one.
  if (most > __ldcg(p.max_distance + place.segment))
    atomicMax(p.max_distance + place.segment, most);
}

// Delta and score of the panel's rows.
static __global__ void __launch_bounds__(kRowThreads)
    delta_kernel(CudaDpcKnnParams p, Panel panel, int64_t pitch) {
  const int64_t row = row_of_warp(panel);
  if (row == panel.end) return;
  const RowPlace place = place_of_row(p, row);
  if (place.rows.count == 0) return;
  const float* densities = p.density + place.rows.begin;
  const float own = densities[place.row];
  const bool by_row = p.noise == nullptr;  // of equally dense rows the first one is denser
  float nearest = INFINITY;
  bool found = false;
  for_distances(p.distances + (row - panel.begin) * pitch, place.rows.count,
                [&](int64_t column, float d) {
                  const float other = densities[column];
                  if (other > own || (by_row && other == own && column < place.row)) {
                    nearest = fminf(nearest, d);
                    found = true;
                  }
                });
  const uint32_t least = __reduce_min_sync(kAllLanes, ordered_bits(nearest));
  found = __any_sync(kAllLanes, found) != 0;
  if (threadIdx.x % kWarpSize != 0) return;
  const float delta = __uint_as_float(found ? least : p.max_distance[place.segment]);
  p.delta[row] = delta;
  p.score[row] = __fmul_rn(delta, own);
}

// The rank of every row in its segment, by counting the rows before it; and the best ones as
// centres.
static __global__ void __launch_bounds__(kRowThreads) rank_kernel(CudaDpcKnnParams p) {
  const Panel all{0, p.x.total};
  const int64_t row = row_of_warp(all);
  if (row == all.end) return;
  const RowPlace place = place_of_row(p, row);
  if (place.rows.count == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float* scores = p.score + place.rows.begin;
  const uint32_t own = ordered_key(scores[place.row]);
  uint32_t before = 0;
  for (int64_t i = lane; i < place.rows.count; i += kWarpSize) {
    const uint32_t key = ordered_key(scores[i]);
    before += key > own || (key == own && i < place.row);
  }
  const int32_t rank = static_cast<int32_t>(warp_sum(before));
  if (lane != 0) return;
  p.ranks[row] = rank;
  const int32_t first = p.cu_clusters[place.segment];
  if (rank < p.cu_clusters[place.segment + 1] - first) {
    p.center_indices[first + rank] = static_cast<int32_t>(row);
  }
}

// The nearest centre of the panel's rows. With few centres their distances are looked up, with many
// the whole row is read in its order.
static __global__ void __launch_bounds__(kRowThreads)
    assign_kernel(CudaDpcKnnParams p, Panel panel, int64_t pitch) {
  constexpr int64_t kManyCenters = 8;  // one for so many rows
  const int64_t row = row_of_warp(panel);
  if (row == panel.end) return;
  const RowPlace place = place_of_row(p, row);
  if (place.rows.count == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t first = p.cu_clusters[place.segment];
  const int32_t num_centers = p.cu_clusters[place.segment + 1] - first;
  int32_t cluster = p.ranks[row];
  if (cluster >= num_centers) {
    const float* distances = p.distances + (row - panel.begin) * pitch;
    constexpr uint32_t kNone = 0xffffffffu;
    uint32_t nearest = kNone, nearest_rank = kNone;
    const auto consider = [&](float d, int32_t rank) {
      const uint32_t bits = ordered_bits(d), of_center = static_cast<uint32_t>(rank);
      if (bits < nearest || (bits == nearest && of_center < nearest_rank)) {
        nearest = bits;
        nearest_rank = of_center;
      }
    };
    if (num_centers * kManyCenters < place.rows.count) {
      for (int32_t rank = lane; rank < num_centers; rank += kWarpSize) {
        consider(distances[p.center_indices[first + rank] - place.rows.begin], rank);
      }
    } else {
      const int32_t* ranks = p.ranks + place.rows.begin;
      for_distances(distances, place.rows.count, [&](int64_t column, float d) {
        if (ranks[column] < num_centers) consider(d, ranks[column]);
      });
    }
    const uint32_t least = __reduce_min_sync(kAllLanes, nearest);
    cluster =
        static_cast<int32_t>(__reduce_min_sync(kAllLanes, nearest == least ? nearest_rank : kNone));
  }
  if (lane == 0) p.cluster_ids[row] = cluster;
}

}  // namespace pruneops
