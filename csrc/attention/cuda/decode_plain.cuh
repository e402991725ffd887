// Decode in fp32, on plain multiply-adds, as accurate as fp32 is: tensor cores would round the
// operands to 11 bits.
//
// An element of fp32 has twice the bytes, so an SM of an H200 gets 5 a cycle, for 8 heads 37 of its
// 128 multiply-adds and, the lanes of a key adding up, 9 of its 32 shuffles: memory bounds it for
// every group.

#pragma once

#include "attention/cuda/decode.cuh"

namespace pruneops {

constexpr int kPlainKeys = 4;    // of a group of lanes at a time: loads on their way
constexpr int kPlainBlocks = 2;  // on a multiprocessor: 255 registers a thread

// The lane's 8 elements of a row: 4 * lane + [0, 4) of its first half and of its second one; 0 past
// head_dim, and nothing is read of a row that is not `valid`.
//   wide  the row lies on 16 bytes and head_dim is a multiple of 4
template <int kLanes>
__device__ __forceinline__ void load_plain(const float* row, int lane, int head_dim, bool wide,
                                           bool valid, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int d = half * kLanes * 4 + lane * 4;
    float4 part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (wide) {
      if (valid && d < head_dim) part = __ldg(reinterpret_cast<const float4*>(row + d));
    } else {
      if (valid && d < head_dim) part.x = row[d];
      if (valid && d + 1 < head_dim) part.y = row[d + 1];
      if (valid && d + 2 < head_dim) part.z = row[d + 2];
      if (valid && d + 3 < head_dim) part.w = row[d + 3];
    }
    x[4 * half] = part.x, x[4 * half + 1] = part.y;
    x[4 * half + 2] = part.z, x[4 * half + 3] = part.w;
  }
}

// kLanes lanes hold a row; each such group of lanes is a part, with keys and sums of its own.
template <int kLanes>
__global__ void __launch_bounds__(kDecodeThreads, kPlainBlocks)
    decode_plain_kernel(CudaDecodeParams p, DecodeScratch scratch, bool wide) {
  constexpr int kDim = kLanes * 8;
  constexpr int kParts = kDecodeThreads / kLanes;
  constexpr int kStep = kParts * kPlainKeys;
  static_assert(kDecodeSplitKeys % kStep == 0);
  __shared__ __align__(16) DecodeParts<kParts, kDim> parts;
  __shared__ __align__(16) float q[kDecodeHeads][kDim];
  const int part = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int head_dim = static_cast<int>(p.heads.head_dim);
  const float log2_scale = p.softmax_scale * kLog2OfE;

  const DecodeWork work = decode_work(p, scratch.num_splits);
  if (!has_result(work, scratch.num_splits)) return;
  for (int i = static_cast<int>(threadIdx.x); i < work.num_heads * kDim; i += kDecodeThreads) {
    const int h = i / kDim, d = i % kDim;
    q[h][d] = d < head_dim ? decode_rows<float>(p.q, 0, work.row, work.head + h)[d] : 0.0f;
  }
  __syncthreads();

  const float* k = decode_rows<float>(p.k, work.row, 0, work.head_k);
  const float* v = decode_rows<float>(p.v, work.row, 0, work.head_k);
  float out[kDecodeHeads][8] = {};
  PartialLse state[kDecodeHeads];
#pragma unroll
  for (int h = 0; h < kDecodeHeads; ++h) state[h] = {-INFINITY, 0.0f};
  float keys[kPlainKeys][8], values[kPlainKeys][8];
  const auto read = [&](const float* rows, int64_t stride, int64_t first,
                        float(&x)[kPlainKeys][8]) {
#pragma unroll
    for (int u = 0; u < kPlainKeys; ++u) {
      const int64_t key = first + part + u * kParts;
      load_plain<kLanes>(rows + key * stride, lane, head_dim, wide, key < work.end, x[u]);
    }
  };
  if (work.begin < work.end) {
    read(k, p.k.row_stride, work.begin, keys);
    read(v, p.v.row_stride, work.begin, values);
  }
  for (int64_t first = work.begin; first < work.end; first += kStep) {
    const int keys_left = static_cast<int>(work.end - first) - part;
    float x[kDecodeHeads][kPlainKeys];
#pragma unroll
    for (int h = 0; h < kDecodeHeads; ++h) {
      if (h >= work.num_heads) break;
      const float4* of_lane = reinterpret_cast<const float4*>(q[h]) + lane;
      const float4 low = of_lane[0], high = of_lane[kLanes];
      const float of_q[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int u = 0; u < kPlainKeys; ++u) {
        float dot = keys[u][0] * of_q[0];
#pragma unroll
        for (int i = 1; i < 8; ++i) dot = fmaf(keys[u][i], of_q[i], dot);
#pragma unroll
        for (int flip = kLanes / 2; flip > 0; flip /= 2) {
          dot += __shfl_xor_sync(kAllLanes, dot, flip);
        }
        x[h][u] = u * kParts < keys_left ? dot * log2_scale : -INFINITY;
      }
    }
    read(k, p.k.row_stride, first + kStep, keys);

#pragma unroll
    for (int h = 0; h < kDecodeHeads; ++h) {
      if (h >= work.num_heads) break;
      if (scratch.logits != nullptr && lane < kPlainKeys) {
        float own = x[h][0];  // lane u writes key u
#pragma unroll
        for (int u = 1; u < kPlainKeys; ++u) own = lane == u ? x[h][u] : own;
        if (lane * kParts < keys_left) {
          scratch.logits[(work.row * p.heads.num_heads_q + work.head + h) * scratch.logit_stride +
                         first + part + lane * kParts] = own;
        }
      }
      float max = state[h].max;
#pragma unroll
      for (int u = 0; u < kPlainKeys; ++u) max = fmaxf(max, x[h][u]);
      const float shift = shift_of(max), alpha = exp2f(state[h].max - shift);
      float sum = state[h].sum * alpha;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[h][i] *= alpha;
#pragma unroll
      for (int u = 0; u < kPlainKeys; ++u) {
        const float weight = exp2f(x[h][u] - shift);
        sum += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[h][i] = fmaf(weight, values[u][i], out[h][i]);
      }
      state[h] = {max, sum};
    }
    read(v, p.v.row_stride, first + kStep, values);
  }

#pragma unroll
  for (int h = 0; h < kDecodeHeads; ++h) {
    if (lane == 0) parts.lse[part][h] = state[h];
    float4* rows = reinterpret_cast<float4*>(parts.out[part][h]);
    rows[lane] = make_float4(out[h][0], out[h][1], out[h][2], out[h][3]);
    rows[kLanes + lane] = make_float4(out[h][4], out[h][5], out[h][6], out[h][7]);
  }
  store_decode_parts(p, scratch, work, parts);
}

}  // namespace pruneops
