// Means of clusters. A block has one cluster and a stretch of channels: it looks through the ids of
// the segment for members, in order, and adds them up in that order. Nothing is sorted, nobody
// writes where another block does.

#pragma once

#include "clustering/cuda/rows.cuh"
#include "clustering/cuda/segments.cuh"

namespace pruneops {

// One block: boundaries, and clusters of the segments before each.
static __global__ void __launch_bounds__(kLayoutThreads)
    merge_layout_kernel(CudaMergeMeanParams p) {
  __shared__ LayoutShared s;
  write_bounds(p.cu_seqlens, p.num_segments, p.x.total, p.bounds, s);
  sum_over_segments(
      p.num_segments, [&](int64_t b) { return at_least<int64_t>(p.num_clusters[b], 0); },
      [&](int64_t b, int64_t sum) { p.offsets[b + 1] = sum; }, s);
  if (threadIdx.x == 0) p.offsets[0] = 0;
}

constexpr int kMergeThreads = 256;  // at most; a multiple of the warp size
constexpr int kIdsOfThread = 4;
constexpr int kIdsAtOnce = kMergeThreads * kIdsOfThread;
constexpr int kRowsInFlight = 4;  // that a thread loads before it adds the first

struct MergeShared {
  int32_t members[kIdsAtOnce];  // rows within the segment, ascending
  uint32_t warp_sums[kMaxWarps];
  uint32_t num_members;
};

// s.members = rows from `first` on, up to kIdsOfThread for each thread, whose id is `cluster`. Ends
// with a barrier, and has one before it touches the members there were.
//   ids  [num_rows] of the segment
__device__ __forceinline__ void find_members(const int32_t* ids, int64_t first, int64_t num_rows,
                                             int32_t cluster, MergeShared& s) {
  const int64_t own = first + static_cast<int64_t>(threadIdx.x) * kIdsOfThread;
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kIdsOfThread; ++i) {
    found |= own + i < num_rows && ids[own + i] == cluster ? 1u << i : 0u;
  }
  const uint32_t count = static_cast<uint32_t>(__popc(found));
  uint32_t place = block_exclusive_sum(count, s.warp_sums);
  if (threadIdx.x == blockDim.x - 1) s.num_members = place + count;
#pragma unroll
  for (int i = 0; i < kIdsOfThread; ++i) {
    if ((found >> i & 1) != 0) s.members[place++] = static_cast<int32_t>(own + i);
  }
  __syncthreads();
}

// sums += weight x
__device__ __forceinline__ void add_weighted(float4& sums, float weight, float4 x) {
  sums.x = __fadd_rn(sums.x, __fmul_rn(weight, x.x));
  sums.y = __fadd_rn(sums.y, __fmul_rn(weight, x.y));
  sums.z = __fadd_rn(sums.z, __fmul_rn(weight, x.z));
  sums.w = __fadd_rn(sums.w, __fmul_rn(weight, x.w));
}

// Grid: clusters, stretches of channels.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_mean_kernel(CudaMergeMeanParams p, bool vectors) {
  __shared__ MergeShared s;
  const int64_t slot = blockIdx.x;
  const int64_t b = first_ending_past(p.offsets + 1, p.num_segments, slot);
  const bool exists = b < p.num_segments;
  const int64_t begin = exists ? p.bounds[b] : 0;
  const int64_t num_rows = exists ? p.bounds[b + 1] - begin : 0;
  const int32_t cluster = exists ? static_cast<int32_t>(slot - p.offsets[b]) : 0;
  const int32_t* ids = p.cluster_ids + begin;
  const int64_t ids_at_once = static_cast<int64_t>(blockDim.x) * kIdsOfThread;
  const int64_t channels_at_once = static_cast<int64_t>(blockDim.x) * kQuad;

  int64_t stretch = blockIdx.y * channels_at_once;
  do {
    const int64_t channel = stretch + threadIdx.x * kQuad;
    const int64_t count = p.x.channels - channel;
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
    uint32_t num_members = 0;
    for (int64_t first = 0; first < num_rows; first += ids_at_once) {
      find_members(ids, first, num_rows, cluster, s);
      const uint32_t found = s.num_members;
      num_members += found;
      for (uint32_t m = 0; m < found; m += kRowsInFlight) {
        Quad<T> quads[kRowsInFlight];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          quads[i] =
              m + i < found && count > 0
                  ? load_quad(row_of<T>(p.x, begin + s.members[m + i]) + channel, count, vectors)
                  : Quad<T>{};
        }
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          if (m + i >= found) continue;
          const float weight = p.weights != nullptr ? p.weights[begin + s.members[m + i]] : 1.0f;
          add_weighted(sums, weight, as_floats(quads[i]));
          total = __fadd_rn(total, weight);
        }
      }
    }
    if (stretch == 0 && threadIdx.x == 0) p.counts[slot] = static_cast<int32_t>(num_members);
    if (count > 0) {
      T* out = static_cast<T*>(p.merged) + slot * p.x.channels + channel;
      const float4 mean =
          total == 0.0f ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : divided(sums, total);
      store_quad(mean, out, count, p.x.channels % kQuad == 0);
    }
    stretch += gridDim.y * channels_at_once;
  } while (stretch < p.x.channels);
}

}  // namespace pruneops
