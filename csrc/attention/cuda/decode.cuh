// What the decode kernels share: which keys a block has, and how the parts of its warps become one
// result.
//
// A block has a split of the keys of one cache row, and up to 8 query heads of one key head, so
// that keys and values are read once for all of them; of a larger group every 8 heads have a block
// of their own, neighbours in the grid, which meet in the L2 cache.

#pragma once

#include "attention/cuda/decode.h"
#include "attention/cuda/rows.cuh"
#include "common/cuda_block.cuh"
#include "common/cuda_packs.cuh"
#include "common/cuda_segments.cuh"

namespace pruneops {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarpSize;
constexpr int kDecodeHeads = 8;  // query heads of a block: the columns of a tensor core product
constexpr int kDecodeSplitKeys = 64;  // splits are whole multiples: all warps have work
constexpr float kLnOf2 = 0.6931471805599453f;

struct DecodeScratch {
  int32_t num_splits;
  int64_t out_stride;    // head_dim, rounded up to 16 bytes
  int64_t logit_stride;  // capacity, likewise
  // Of splits with keys. Two or more splits only: sums of exp2(logit - max) * value.
  float* out;       // [batch, num_heads_q, num_splits, out_stride]
  PartialLse* lse;  // [batch, num_heads_q, num_splits]
  float* logits;    // [batch, num_heads_q, logit_stride] base-2 exponents; null without scores
};

__device__ __forceinline__ int64_t decode_length(const CudaDecodeParams& p, int64_t row) {
  return at_most<int64_t>(at_least<int64_t>(p.lengths[row], 0), p.capacity);
}

// Whole multiples a split, so that the order of additions depends on num_splits only.
__device__ __forceinline__ int64_t keys_of_split(int64_t length, int32_t num_splits) {
  const uint32_t units = static_cast<uint32_t>((length + kDecodeSplitKeys - 1) / kDecodeSplitKeys);
  const uint32_t splits = static_cast<uint32_t>(num_splits);
  return static_cast<int64_t>((units + splits - 1) / splits) * kDecodeSplitKeys;
}

// Splits that have keys: the leading ones.
__device__ __forceinline__ int32_t used_splits(int64_t length, int32_t num_splits) {
  if (length == 0) return 0;
  const uint32_t keys = static_cast<uint32_t>(keys_of_split(length, num_splits));
  return static_cast<int32_t>((static_cast<uint32_t>(length) + keys - 1) / keys);
}

struct DecodeWork {
  int64_t row;
  int64_t head_k;
  int64_t head;   // the first query head
  int num_heads;  // 1 to kDecodeHeads
  int32_t split;
  int64_t begin, end;  // keys
};

// Blocks of one row: the x of the grid is row * this + key head and tile of its query heads, its y
// the split. So blocks that run at the same time read neighbouring bytes of a cache.
PRUNEOPS_HOST_DEVICE inline int64_t decode_head_tiles(const Heads& heads) {
  return heads.num_heads_k * ((heads.group + kDecodeHeads - 1) / kDecodeHeads);
}

__device__ __forceinline__ DecodeWork decode_work(const CudaDecodeParams& p, int32_t num_splits) {
  const unsigned all_tiles = static_cast<unsigned>(decode_head_tiles(p.heads));
  const unsigned tiles = all_tiles / static_cast<unsigned>(p.heads.num_heads_k);
  const unsigned tile = blockIdx.x % all_tiles;
  const int64_t first = static_cast<int64_t>(tile % tiles) * kDecodeHeads;  // of the group
  DecodeWork work;
  work.row = blockIdx.x / all_tiles;
  work.head_k = tile / tiles;
  work.head = work.head_k * p.heads.group + first;
  work.num_heads = static_cast<int>(at_most<int64_t>(p.heads.group - first, kDecodeHeads));
  work.split = static_cast<int32_t>(blockIdx.y);
  const int64_t length = decode_length(p, work.row), keys = keys_of_split(length, num_splits);
  work.begin = at_most(work.split * keys, length);
  work.end = at_most(work.begin + keys, length);
  return work;
}

// Whether the block has a result: keys, or all of a row that has none.
__device__ __forceinline__ bool has_result(const DecodeWork& work, int32_t num_splits) {
  return work.begin < work.end || num_splits == 1;
}

// Rows of one head of a cache row, or the query heads of a key head.
template <class T>
__device__ __forceinline__ const T* decode_rows(const RowView& view, int64_t slot, int64_t row,
                                                int64_t head) {
  return static_cast<const T*>(view.data) + slot * view.slot_stride + row * view.row_stride +
         head * view.head_stride;
}

__device__ __forceinline__ void store_rounded(const RowView& view, int64_t at, float x) {
  switch (view.type) {
    case FloatType::kBFloat16:
      return round_to(x, static_cast<BFloat16*>(view.data) + at);
    case FloatType::kFloat16:
      return round_to(x, static_cast<Half*>(view.data) + at);
    default:
      return round_to(x, static_cast<float*>(view.data) + at);
  }
}

// Results of the parts of a block, each from keys of its own.
template <int kParts, int kDim>
struct DecodeParts {
  float out[kParts][kDecodeHeads][kDim];
  PartialLse lse[kParts][kDecodeHeads];
  float weight[kParts][kDecodeHeads];
};

// The result of the block: to the scratch, or with one split to the output. Every thread calls it,
// when the parts have been written; begins with a barrier.
template <int kParts, int kDim>
__device__ __forceinline__ void store_decode_parts(const CudaDecodeParams& p,
                                                   const DecodeScratch& scratch,
                                                   const DecodeWork& work,
                                                   DecodeParts<kParts, kDim>& parts) {
  static_assert(kParts * kDecodeHeads <= kDecodeThreads);
  const bool whole = scratch.num_splits == 1;
  const int t = static_cast<int>(threadIdx.x);
  const int64_t first = work.row * p.heads.num_heads_q + work.head;
  __syncthreads();
  const int part = t / kDecodeHeads, of_group = t % kDecodeHeads;
  if (part < kParts && of_group < work.num_heads) {
    PartialLse all{-INFINITY, 0.0f};
    for (int i = 0; i < kParts; ++i) all = merge(all, parts.lse[i][of_group]);
    float weight = exp2f(parts.lse[part][of_group].max - shift_of(all.max));
    if (whole) weight = all.sum == 0.0f ? 0.0f : weight / all.sum;
    parts.weight[part][of_group] = weight;
    if (part == 0) {
      scratch.lse[(first + of_group) * scratch.num_splits + work.split] = all;
      if (whole) {
        p.softmax_lse[(work.head + of_group) * p.batch + work.row] = log2_sum(all) * kLnOf2;
      }
    }
  }
  __syncthreads();
  for (int i = t; i < work.num_heads * kDim; i += kDecodeThreads) {
    const int h = i / kDim, d = i % kDim;
    if (d >= p.heads.head_dim) continue;
    float x = 0.0f;
#pragma unroll
    for (int j = 0; j < kParts; ++j) x = fmaf(parts.weight[j][h], parts.out[j][h][d], x);
    if (whole) {
      store_rounded(p.out, work.row * p.out.row_stride + (work.head + h) * p.out.head_stride + d,
                    x);
    } else {
      scratch.out[((first + h) * scratch.num_splits + work.split) * scratch.out_stride + d] = x;
    }
  }
}

}  // namespace pruneops
