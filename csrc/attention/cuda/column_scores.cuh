// Scores from all query rows, in two passes over tiles of query x key scores: softmax denominators
// (unless given), then probabilities, reduced over heads and rows where they are made. No tile
// outlives its block.
//
// Plain multiply-adds from shared memory, bf16 and fp16 widened to fp32: as accurate as fp32, for
// any head dim and alignment, but far from what tensor cores give (tile_scores.cuh).

#pragma once

#include "attention/cuda/rows.cuh"
#include "attention/cuda/scores.h"
#include "attention/cuda/segments.cuh"
#include "attention/cuda/tiles.cuh"

namespace pruneops {

// softmax_lse [num_heads_q, total_q], natural logarithms. One work item is (tile of packed queries,
// query head). Every thread keeps the denominators of its rows over its own keys; they meet at the
// end.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    lse_kernel(CudaScoreParams p, bool q_vectors, bool k_vectors, float* softmax_lse) {
  __shared__ __align__(16) TileShared shared;
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const float log2_scale = p.softmax_scale * kLog2OfE;
  const int64_t num_items = (p.total_q + kTile - 1) / kTile * p.heads.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t head = item % p.heads.num_heads_q;
    const int64_t tile_begin = item / p.heads.num_heads_q * kTile;
    for_pieces(segments, segments.q, tile_begin, at_most(tile_begin + kTile, p.total_q),
               [&](const Segment& segment, int64_t begin, int64_t end) {
                 const int num_rows = static_cast<int>(end - begin);
                 const HeadRows<T> q = head_rows<T>(p.q, segment.q_begin + begin, head, q_vectors);
                 int64_t limit[kRowsOfThread], largest;
                 thread_limits(p.visibility, segment, begin, num_rows, limit, largest);
                 PartialLse state[kRowsOfThread];
#pragma unroll
                 for (PartialLse& s : state) s = {-INFINITY, 0.0f};
                 for (int64_t first = 0; __syncthreads_or(first < largest); first += kTile) {
                   const int num_keys =
                       static_cast<int>(at_most<int64_t>(kTile, segment.k_len - first));
                   float products[kRowsOfThread][kKeysOfThread];
                   multiply_tile(
                       q, num_rows,
                       head_rows<T>(p.k, segment.k_begin + first, head / p.heads.group, k_vectors),
                       num_keys, p.heads.head_dim, shared, products);
#pragma unroll
                   for (int i = 0; i < kRowsOfThread; ++i) {
                     float max = state[i].max;
#pragma unroll
                     for (int j = 0; j < kKeysOfThread; ++j) {
                       products[i][j] =
                           first + key + j < limit[i] ? products[i][j] * log2_scale : -INFINITY;
                       max = fmaxf(max, products[i][j]);
                     }
                     const float shift = shift_of(max);
                     float sum = state[i].sum * exp2f(state[i].max - shift);
#pragma unroll
                     for (int j = 0; j < kKeysOfThread; ++j) sum += exp2f(products[i][j] - shift);
                     state[i] = {max, sum};
                   }
                 }
#pragma unroll
                 for (int i = 0; i < kRowsOfThread; ++i) {
                   for (int flip = kKeyThreads / 2; flip > 0; flip /= 2) {
                     PartialLse other;
                     other.max = __shfl_xor_sync(kAllLanes, state[i].max, flip);
                     other.sum = __shfl_xor_sync(kAllLanes, state[i].sum, flip);
                     state[i] = merge(state[i], other);
                   }
                   if (key == 0 && row + i < num_rows) {
                     softmax_lse[head * p.total_q + segment.q_begin + begin + row + i] =
                         log2_sum(state[i]) * (1.0f / kLog2OfE);
                   }
                 }
               });
  }
}

// Sums over query rows, without the factors of means. One block has kTile packed keys and every
// num_splits-th tile of their segments' queries, from tile blockIdx.y on.
//   sums  [num_splits, total_k]
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    column_scores_kernel(CudaScoreParams p, bool q_vectors, bool k_vectors,
                         const float* softmax_lse, float* sums) {
  __shared__ __align__(16) TileShared shared;
  __shared__ float of_threads[kRowThreads][kTile];
  const DeviceSegments segments(p.bounds, p.num_segments);
  const Heads& heads = p.heads;
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const float log2_scale = p.softmax_scale * kLog2OfE;
  const int64_t tile_begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t tile_end = at_most(tile_begin + kTile, p.total_k);
  float* out = sums + static_cast<int64_t>(blockIdx.y) * p.total_k;
  // Keys of no segment; the pieces below overwrite theirs.
  if (tile_begin + threadIdx.x < tile_end) out[tile_begin + threadIdx.x] = 0.0f;

  for_pieces(
      segments, segments.k, tile_begin, tile_end,
      [&](const Segment& segment, int64_t begin, int64_t end) {
        const int num_keys = static_cast<int>(end - begin);
        float column[kKeysOfThread] = {};  // over the thread's rows, in ascending order
        for (int64_t first = blockIdx.y * kTile; first < segment.q_len;
             first += gridDim.y * kTile) {
          const int num_rows = static_cast<int>(at_most<int64_t>(kTile, segment.q_len - first));
          int64_t limit[kRowsOfThread], largest;
          thread_limits(p.visibility, segment, first, num_rows, limit, largest);
          if (!__syncthreads_or(begin < largest)) continue;
          float of_heads[kRowsOfThread][kKeysOfThread] = {};
          for (int64_t head = 0; head < heads.num_heads_q; ++head) {
            float products[kRowsOfThread][kKeysOfThread];
            multiply_tile(head_rows<T>(p.q, segment.q_begin + first, head, q_vectors), num_rows,
                          head_rows<T>(p.k, segment.k_begin + begin, head / heads.group, k_vectors),
                          num_keys, heads.head_dim, shared, products);
            const float* lse = softmax_lse + head * p.total_q + segment.q_begin + first;
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) {
              const float log2_lse = row + i < num_rows ? lse[row + i] * kLog2OfE : 0.0f;
#pragma unroll
              for (int j = 0; j < kKeysOfThread; ++j) {
                if (begin + key + j < limit[i]) {
                  of_heads[i][j] = reduce(p.head_reduce, of_heads[i][j],
                                          exp2f(fmaf(products[i][j], log2_scale, -log2_lse)));
                }
              }
            }
          }
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
            for (int j = 0; j < kKeysOfThread; ++j) {
              column[j] = reduce(p.query_reduce, column[j], of_heads[i][j]);
            }
          }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kKeysOfThread; ++j)
          of_threads[row / kRowsOfThread][key + j] = column[j];
        __syncthreads();
        const int t = static_cast<int>(threadIdx.x);
        if (t < num_keys) {
          float sum = 0.0f;
          for (int r = 0; r < kRowThreads; ++r) sum = reduce(p.query_reduce, sum, of_threads[r][t]);
          out[segment.k_begin + begin + t] = sum;
        }
      });
}

constexpr int kFinishThreads = 256;

// scores = splits put together, and the factors of means. Memory bound and small.
//   sums  [num_splits, total_k]
static __global__ void __launch_bounds__(kFinishThreads)
    finish_scores_kernel(CudaScoreParams p, int32_t num_splits, const float* sums) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (key >= p.total_k) return;
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int64_t b = first_ending_past(segments.k + 1, p.num_segments, key);
  float sum = 0.0f;
  for (int32_t s = 0; s < num_splits; ++s)
    sum = reduce(p.query_reduce, sum, sums[s * p.total_k + key]);
  const int64_t q_len = b < p.num_segments ? segments[b].q_len : 0;
  p.scores[key] =
      sum * mean_factor(p.head_reduce, p.heads.num_heads_q) * mean_factor(p.query_reduce, q_len);
}

}  // namespace pruneops
