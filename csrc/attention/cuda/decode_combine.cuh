// The end of decode: splits are put together, and logits become scores. Both need the denominator
// of all splits, which is cheaper computed twice than waited for in a launch of its own.

#pragma once

#include "attention/cuda/decode.cuh"

namespace pruneops {

constexpr int kScoreLanes = 8;  // lanes that add up the denominator of one head
constexpr int kScoreHeads = kDecodeThreads / kScoreLanes;  // heads at a time

// All of lse[0, count), by kLanes neighbouring lanes; the same in each of them.
template <int kLanes>
__device__ __forceinline__ PartialLse merge_splits(const PartialLse* lse, int32_t count) {
  PartialLse all{-INFINITY, 0.0f};
#pragma unroll 4
  for (int32_t s = static_cast<int32_t>(threadIdx.x % kLanes); s < count; s += kLanes) {
    all = merge(all, lse[s]);
  }
#pragma unroll
  for (int flip = kLanes / 2; flip > 0; flip /= 2) {
    all = merge(all, PartialLse{__shfl_xor_sync(kAllLanes, all.max, flip),
                                __shfl_xor_sync(kAllLanes, all.sum, flip)});
  }
  // Merging is commutative but for the last bit.
  return {__shfl_sync(kAllLanes, all.max, 0, kLanes), __shfl_sync(kAllLanes, all.sum, 0, kLanes)};
}

// Output and LSE of one query head. Threads side by side have 4 columns each, and as many such rows
// of threads as fit take turns with the splits.
__device__ __forceinline__ void combine_head(const CudaDecodeParams& p,
                                             const DecodeScratch& scratch, int64_t row,
                                             int64_t head) {
  __shared__ __align__(16) float4 of_turn[kDecodeThreads];
  const int32_t used = used_splits(decode_length(p, row), scratch.num_splits);
  const int64_t first = (row * p.heads.num_heads_q + head) * scratch.num_splits;
  const PartialLse* lse = scratch.lse + first;
  const PartialLse all = merge_splits<kWarpSize>(lse, used);
  const float shift = shift_of(all.max);
  const float factor = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;

  const int t = static_cast<int>(threadIdx.x);
  const int quads = static_cast<int>(scratch.out_stride / 4), turns = kDecodeThreads / quads;
  const int quad = t % quads, turn = t / quads;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (turn < turns) {
    const float4* parts = reinterpret_cast<const float4*>(scratch.out) + first * quads + quad;
#pragma unroll 4
    for (int32_t s = turn; s < used; s += turns) {
      const float weight = exp2f(lse[s].max - shift);
      const float4 part = parts[static_cast<int64_t>(s) * quads];
      x.x = fmaf(weight, part.x, x.x);
      x.y = fmaf(weight, part.y, x.y);
      x.z = fmaf(weight, part.z, x.z);
      x.w = fmaf(weight, part.w, x.w);
    }
  }
  of_turn[t] = x;
  __syncthreads();
  const float* columns = reinterpret_cast<const float*>(of_turn);
  const int64_t out = row * p.out.row_stride + head * p.out.head_stride;
  for (int d = t; d < p.heads.head_dim; d += kDecodeThreads) {
    float sum = 0.0f;
    for (int i = 0; i < turns; ++i) sum += columns[i * 4 * quads + d];
    store_rounded(p.out, out + d, sum * factor);
  }
  if (t == 0) p.softmax_lse[head * p.batch + row] = log2_sum(all) * kLnOf2;
  __syncthreads();
}

// Scores of the slots [first, first + kDecodeThreads) of a row: one slot a thread, heads in order.
__device__ __forceinline__ void score_slots(const CudaDecodeParams& p, const DecodeScratch& scratch,
                                            int64_t row, int64_t first) {
  __shared__ float log2_sums[kScoreHeads];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t length = decode_length(p, row), slot = first + t;
  const int64_t heads = p.heads.num_heads_q;
  float score = 0.0f;
  if (first < length) {
    const int32_t used = used_splits(length, scratch.num_splits);
    for (int64_t head = 0; head < heads; head += kScoreHeads) {
      const int64_t own = at_most(head + t / kScoreLanes, heads - 1);
      const PartialLse all =
          merge_splits<kScoreLanes>(scratch.lse + (row * heads + own) * scratch.num_splits, used);
      if (t % kScoreLanes == 0) log2_sums[t / kScoreLanes] = log2_sum(all);
      __syncthreads();
      if (slot < length) {
        const float* logits = scratch.logits + (row * heads + head) * scratch.logit_stride + slot;
#pragma unroll 8
        for (int h = 0; h < kScoreHeads; ++h) {
          if (head + h < heads) score += exp2f(logits[h * scratch.logit_stride] - log2_sums[h]);
        }
      }
      __syncthreads();
    }
  }
  if (slot < p.capacity) {
    p.scores[row * p.capacity + slot] = score / static_cast<float>(heads);
  }
}

// Blocks of a row, x in the grid: one for each of `combined` query heads, then those of its slots.
static __global__ void __launch_bounds__(kDecodeThreads)
    decode_combine_kernel(CudaDecodeParams p, DecodeScratch scratch, unsigned combined) {
  for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
    if (blockIdx.x < combined) {
      combine_head(p, scratch, row, blockIdx.x);
    } else {
      score_slots(p, scratch, row, static_cast<int64_t>(blockIdx.x - combined) * kDecodeThreads);
    }
  }
}

}  // namespace pruneops
