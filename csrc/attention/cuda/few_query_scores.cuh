// Scores from a few chosen query rows a segment: bound by reading the keys, which are read where
// they lie, once for the softmax denominators and once for the probabilities (from the L2 cache,
// where they fit). Correct for any number of query rows.

#pragma once

#include "attention/cuda/rows.cuh"
#include "attention/cuda/scores.h"
#include "attention/cuda/segments.cuh"

namespace pruneops {

constexpr int kUnroll = 4;  // keys whose loads a thread has in flight

// Groups of kLanes threads hold one key row, 8 elements each. Dot products of `rows` with kUnroll
// keys: put(row, u, dot) is called by one thread of the group.
//   q_rows  [rows, kLanes * 8] fp32 in shared memory, zero past head_dim
template <int kLanes, class T, class Put>
__device__ __forceinline__ void dot_keys(const HeadRows<T>& keys, const int64_t (&key)[kUnroll],
                                         int64_t num_keys, int64_t head_dim, const float* q_rows,
                                         int rows, const Put& put) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float x[kUnroll][kVector];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    // A key past the last one is not read.
    const int64_t count = key[u] < num_keys ? head_dim - lane * kVector : 0;
    load_vector(keys.data + key[u] * keys.stride + lane * kVector, count, keys.vectors, x[u]);
  }
  for (int r = 0; r < rows; ++r) {
    const float4* q = reinterpret_cast<const float4*>(q_rows + (r * kLanes + lane) * kVector);
    const float4 low = q[0], high = q[1];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float dot = x[u][0] * low.x;
      dot = fmaf(x[u][1], low.y, dot);
      dot = fmaf(x[u][2], low.z, dot);
      dot = fmaf(x[u][3], low.w, dot);
      dot = fmaf(x[u][4], high.x, dot);
      dot = fmaf(x[u][5], high.y, dot);
      dot = fmaf(x[u][6], high.z, dot);
      dot = fmaf(x[u][7], high.w, dot);
#pragma unroll
      for (int flip = kLanes / 2; flip > 0; flip /= 2) dot += __shfl_xor_sync(kAllLanes, dot, flip);
      if (lane == 0) put(r, u, dot);
    }
  }
}

// Copies one query row to shared memory as fp32, by the whole block.
//   out  [padded] zero past head_dim
template <class T>
__device__ __forceinline__ void stage_query(const HeadRows<T>& row, int64_t head_dim, int padded,
                                            float* out) {
  for (int d = static_cast<int>(threadIdx.x); d < padded; d += static_cast<int>(blockDim.x)) {
    out[d] = d < head_dim ? widen(row.data[d]) : 0.0f;
  }
}

constexpr int kPartialThreads = 128;
constexpr int kPartialRows =
    16;  // (query, head of the group) rows handled in one pass over the keys
constexpr int kPartialKeys = 64;  // keys in a tile

// Where the partial denominator of (query row, split, head) is.
__device__ __forceinline__ int64_t partial_index(const CudaScoreParams& p, int32_t num_splits,
                                                 int64_t row, int64_t split, int64_t head) {
  return (row * num_splits + split) * p.heads.num_heads_q + head;
}

// partial [total_q, num_splits, num_heads_q]. One work item is (segment, key head, split of its
// keys).
template <class T, int kLanes>
__global__ void __launch_bounds__(kPartialThreads, 4)
    partial_lse_kernel(CudaScoreParams p, int32_t num_splits, bool k_vectors, PartialLse* partial) {
  constexpr int kPadded = kLanes * kVector;
  constexpr int kGroups = kPartialThreads / kLanes;
  __shared__ __align__(16) float q_rows[kPartialRows * kPadded];
  __shared__ float logits[kPartialRows][kPartialKeys + 1];
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int group_of_lanes = static_cast<int>(threadIdx.x) / kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr int kWarps = kPartialThreads / kWarpSize, kRowsOfWarp = kPartialRows / kWarps;
  const float log2_scale = p.softmax_scale * kLog2OfE;

  const int64_t num_items = p.num_segments * p.heads.num_heads_k * num_splits;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t split = item % num_splits;
    const int64_t head_k = item / num_splits % p.heads.num_heads_k;
    const Segment segment = segments[item / num_splits / p.heads.num_heads_k];
    const int64_t keys_of_split = (segment.k_len + num_splits - 1) / num_splits;
    const int64_t begin = at_most(split * keys_of_split, segment.k_len);
    const int64_t end = at_most(begin + keys_of_split, segment.k_len);
    const HeadRows<T> keys = head_rows<T>(p.k, segment.k_begin, head_k, k_vectors);
    const int64_t num_rows = segment.q_len * p.heads.group;

    for (int64_t first = 0; first < num_rows; first += kPartialRows) {
      const int rows = static_cast<int>(at_most<int64_t>(kPartialRows, num_rows - first));
      for (int r = 0; r < rows; ++r) {
        const int64_t query = (first + r) / p.heads.group, head = (first + r) % p.heads.group;
        stage_query(
            head_rows<T>(p.q, segment.q_begin + query, head_k * p.heads.group + head, false),
            p.heads.head_dim, kPadded, q_rows + r * kPadded);
      }
      PartialLse state[kRowsOfWarp];  // of rows warp, warp + kWarps, ...; in every lane
      for (PartialLse& s : state) s = {-INFINITY, 0.0f};
      for (int64_t tile = begin; tile < end; tile += kPartialKeys) {
        __syncthreads();
        for (int j = group_of_lanes; j < kPartialKeys; j += kGroups * kUnroll) {
          int64_t key[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) key[u] = tile + j + u * kGroups;
          dot_keys<kLanes>(keys, key, end, p.heads.head_dim, q_rows, rows,
                           [&](int r, int u, float dot) { logits[r][j + u * kGroups] = dot; });
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
          const int r = warp + i * kWarps;
          if (r >= rows) continue;
          const int64_t limit =
              at_most(key_limit(p.visibility, segment, (first + r) / p.heads.group), end);
          const int64_t left = limit - tile;  // keys of the tile that the row sees, or more
          const float a = lane < left ? logits[r][lane] * log2_scale : -INFINITY;
          const float b =
              lane + kWarpSize < left ? logits[r][lane + kWarpSize] * log2_scale : -INFINITY;
          float max = fmaxf(a, b);
          for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
            max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, flip));
          }
          const float shift = shift_of(max);
          float sum = exp2f(a - shift) + exp2f(b - shift);
          for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
            sum += __shfl_xor_sync(kAllLanes, sum, flip);
          }
          state[i] = merge(state[i], PartialLse{max, sum});
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int r = warp + i * kWarps;
        if (r >= rows || lane != 0) continue;
        const int64_t query = (first + r) / p.heads.group, head = (first + r) % p.heads.group;
        partial[partial_index(p, num_splits, segment.q_begin + query, split,
                              head_k * p.heads.group + head)] = state[i];
      }
    }
  }
}

constexpr int kFewThreads = 256;
constexpr int kFewBlocks = 3;    // on a multiprocessor at once; what the compiler fits registers to
constexpr int kFewHeads = 16;    // query heads handled at once
constexpr int kFewMaxKeys = 64;  // most keys of a block

// One block has tile_keys packed keys. Thread t < tile_keys adds up key t: heads first, then query
// rows, in order.
template <class T, int kLanes>
__global__ void __launch_bounds__(kFewThreads, kFewBlocks)
    few_query_scores_kernel(CudaScoreParams p, int32_t num_splits, int32_t tile_keys,
                            bool k_vectors, const PartialLse* partial) {
  constexpr int kPadded = kLanes * kVector;
  constexpr int kGroups = kWarpSize / kLanes;  // key rows that a warp holds at a time
  constexpr int kUnitKeys = kGroups * kUnroll;
  constexpr int kWarps = kFewThreads / kWarpSize;
  __shared__ __align__(16) float q_rows[kFewHeads * kPadded];
  __shared__ float probability[kFewHeads][kFewMaxKeys + 1];
  __shared__ float lse[kFewHeads];
  const DeviceSegments segments(p.bounds, p.num_segments);
  const Heads& heads = p.heads;
  const int t = static_cast<int>(threadIdx.x);
  const int warp = t / kWarpSize, group_of_lanes = t % kWarpSize / kLanes;
  const float log2_scale = p.softmax_scale * kLog2OfE;
  const int64_t tile_begin = static_cast<int64_t>(blockIdx.x) * tile_keys;
  const int64_t tile_end = at_most(tile_begin + tile_keys, p.total_k);
  // Keys of no segment; the pieces below overwrite theirs.
  if (tile_begin + t < tile_end) p.scores[tile_begin + t] = 0.0f;
  __syncthreads();

  for_pieces(segments, segments.k, tile_begin, tile_end,
             [&](const Segment& segment, int64_t begin, int64_t end) {
               float column = 0.0f;  // of key begin + t
               for (int64_t query = 0; query < segment.q_len; ++query) {
                 const int64_t row = segment.q_begin + query;
                 const int64_t visible_end = at_most(end, key_limit(p.visibility, segment, query));
                 if (visible_end <= begin) continue;
                 const int num_keys = static_cast<int>(visible_end - begin);
                 float of_heads = 0.0f;
                 for (int64_t head = 0; head < heads.num_heads_q; head += kFewHeads) {
                   const int num_heads =
                       static_cast<int>(at_most<int64_t>(kFewHeads, heads.num_heads_q - head));
                   for (int h = 0; h < num_heads; ++h) {
                     stage_query(head_rows<T>(p.q, row, head + h, false), heads.head_dim, kPadded,
                                 q_rows + h * kPadded);
                   }
                   if (t < num_heads) {
                     PartialLse all{-INFINITY, 0.0f};
                     for (int32_t s = 0; s < num_splits; ++s) {
                       all = merge(all, partial[partial_index(p, num_splits, row, s, head + t)]);
                     }
                     lse[t] = log2_sum(all);
                   }
                   __syncthreads();
                   // A warp's unit: some keys of one key head, against those of its query heads
                   // that are at hand.
                   const int64_t first_k = head / heads.group;
                   const int num_heads_k =
                       static_cast<int>((head + num_heads - 1) / heads.group - first_k + 1);
                   const int num_units = num_heads_k * ((num_keys + kUnitKeys - 1) / kUnitKeys);
                   for (int unit = warp; unit < num_units; unit += kWarps) {
                     const int64_t head_k = first_k + unit % num_heads_k;
                     const int j = unit / num_heads_k * kUnitKeys + group_of_lanes;
                     const int h_begin =
                         static_cast<int>(at_least<int64_t>(head_k * heads.group - head, 0));
                     const int h_end = static_cast<int>(
                         at_most<int64_t>((head_k + 1) * heads.group - head, num_heads));
                     int64_t key[kUnroll];
#pragma unroll
                     for (int u = 0; u < kUnroll; ++u) key[u] = begin + j + u * kGroups;
                     dot_keys<kLanes>(head_rows<T>(p.k, segment.k_begin, head_k, k_vectors), key,
                                      visible_end, heads.head_dim, q_rows + h_begin * kPadded,
                                      h_end - h_begin, [&](int h, int u, float dot) {
                                        const int at = j + u * kGroups;
                                        if (at < num_keys) {
                                          probability[h_begin + h][at] =
                                              exp2f(fmaf(dot, log2_scale, -lse[h_begin + h]));
                                        }
                                      });
                   }
                   __syncthreads();
                   if (t < num_keys) {
                     for (int h = 0; h < num_heads; ++h)
                       of_heads = reduce(p.head_reduce, of_heads, probability[h][t]);
                   }
                 }
                 if (t < num_keys) column = reduce(p.query_reduce, column, of_heads);
               }
               if (begin + t < end) {
                 p.scores[segment.k_begin + begin + t] =
                     column * mean_factor(p.head_reduce, heads.num_heads_q) *
                     mean_factor(p.query_reduce, segment.q_len);
               }
             });
}

}  // namespace pruneops
