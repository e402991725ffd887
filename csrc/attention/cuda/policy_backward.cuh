// Gradients of attention under a key policy, see attention/cpu/policy.h for the formulas. Scores
// are computed again for dq, tile of queries by tile of queries, and for dk, dv and dpolicy, tile
// of keys by tile of keys: no atomics, so the order of additions is fixed.

#pragma once

#include "attention/cuda/policy_forward.cuh"

namespace pruneops {

constexpr int kPolicyDeltaThreads = 128;

// delta [num_heads_q, total] = rowsum(dout * out). One warp has one row of a head.
template <class T>
__global__ void __launch_bounds__(kPolicyDeltaThreads)
    policy_delta_kernel(CudaPolicyBackwardParams p, bool dout_vectors, bool out_vectors) {
  const CudaPolicyParams& f = p.forward;
  constexpr int kWarps = kPolicyDeltaThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize * kVector;
  const int64_t num_rows = f.total * f.heads.num_heads_q;
  for (int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; item < num_rows;
       item += int64_t{kWarps} * gridDim.x) {
    const int64_t row = item / f.heads.num_heads_q, head = item % f.heads.num_heads_q;
    float x[kVector], y[kVector];
    load_vector(head_rows<T>(p.dout, row, head, dout_vectors).data + lane, f.heads.head_dim - lane,
                dout_vectors, x);
    load_vector(head_rows<T>(f.out, row, head, out_vectors).data + lane, f.heads.head_dim - lane,
                out_vectors, y);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], y[i], sum);
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, flip);
    }
    if (lane == 0) p.delta[head * f.total + row] = sum;
  }
}
static_assert(kMaxHeadDim <= kWarpSize * kVector, "a warp holds a row");

// The vectors flags of the inputs.
struct PolicyVectors {
  bool q, k, v, dout;
};

// 1 / den of a row.
__device__ __forceinline__ float inverse_sum(const CudaPolicyParams& f, int64_t head, int64_t at) {
  return 1.0f / (f.softmax_sum[head * f.total + at] + f.epsilon);
}

// A tile of num_rows queries of `head` from packed row q_begin on and num_keys keys from k_begin
// on. Sets x = exp(score - max) / den and change = x * (dout V^T - delta), both 0 where a row does
// not see a key. x lies in shared memory, where a thread reads its own entries only, to spare
// registers in the second product. All threads of the block call it.
//   x  [kTile, kTile], [key][row] if kKeysFirst, else [row][key]
template <class T, bool kKeysFirst>
__device__ __forceinline__ void policy_gradient_tile(
    const CudaPolicyBackwardParams& p, const PolicyVectors& vectors, int64_t head, int64_t q_begin,
    int num_rows, int64_t k_begin, int num_keys, TileShared& shared, float (&x)[kTile][kTile],
    float (&change)[kRowsOfThread][kKeysOfThread]) {
  const CudaPolicyParams& f = p.forward;
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const int64_t head_k = head / f.heads.group;
  const float log2_scale = f.softmax_scale * kLog2OfE;
  multiply_tile(head_rows<T>(f.q, q_begin, head, vectors.q), num_rows,
                head_rows<T>(f.k, k_begin, head_k, vectors.k), num_keys, f.heads.head_dim, shared,
                change);
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int64_t own = q_begin + row + i - k_begin;
    const bool exists = row + i < num_rows;
    const float max = exists ? f.softmax_max[head * f.total + q_begin + row + i] : 0.0f;
    const float inverse = exists ? inverse_sum(f, head, q_begin + row + i) : 0.0f;
#pragma unroll
    for (int j = 0; j < kKeysOfThread; ++j) {
      const bool seen = exists && key + j <= own && key + j < num_keys;
      (kKeysFirst ? x[key + j][row + i] : x[row + i][key + j]) =
          seen ? exp2f(fmaf(change[i][j], log2_scale, -max)) * inverse : 0.0f;
    }
  }
  multiply_tile(head_rows<T>(p.dout, q_begin, head, vectors.dout), num_rows,
                head_rows<T>(f.v, k_begin, head_k, vectors.v), num_keys, f.heads.head_dim, shared,
                change);
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int64_t own = q_begin + row + i - k_begin;
    const bool exists = row + i < num_rows;
    const float delta = exists ? p.delta[head * f.total + q_begin + row + i] : 0.0f;
#pragma unroll
    for (int j = 0; j < kKeysOfThread; ++j) {
      const bool seen = exists && key + j <= own && key + j < num_keys;
      const float of_pair = kKeysFirst ? x[key + j][row + i] : x[row + i][key + j];
      change[i][j] = seen ? of_pair * (change[i][j] - delta) : 0.0f;
    }
  }
}

// dq. One work item is (tile of packed rows, query head); blockIdx.y has a part of head_dim.
template <class T, int kParts>
__global__ void __launch_bounds__(kTileThreads, 2)
    policy_query_gradient_kernel(CudaPolicyBackwardParams p, PolicyVectors vectors) {
  __shared__ __align__(16) TileShared shared;
  __shared__ __align__(16) float ds[kTile][kTile];  // [key][row]
  const CudaPolicyParams& f = p.forward;
  const DeviceSegments segments(f.bounds, f.num_segments);
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const int64_t head_dim = f.heads.head_dim;
  const int64_t first_dim = static_cast<int64_t>(blockIdx.y) * kParts * kTile;
  const int64_t num_items = (f.total + kTile - 1) / kTile * f.heads.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t head = item % f.heads.num_heads_q;
    const int64_t tile_begin = item / f.heads.num_heads_q * kTile;
    const int64_t tile_end = at_most(tile_begin + kTile, f.total);
    zero_other_rows<T>(f, p.dq, head, tile_begin, tile_end, first_dim, kParts * kTile);
    for_pieces(segments, segments.q, tile_begin, tile_end,
               [&](const Segment& segment, int64_t begin, int64_t end) {
                 const int num_rows = static_cast<int>(end - begin);
                 const int64_t q_begin = segment.q_begin + begin;
                 float dq[kParts][kRowsOfThread][kKeysOfThread] = {};
                 for (int64_t first = 0; first < end; first += kTile) {
                   const int num_keys = static_cast<int>(at_most<int64_t>(kTile, end - first));
                   const int64_t k_begin = segment.q_begin + first;
                   float change[kRowsOfThread][kKeysOfThread];
                   policy_gradient_tile<T, true>(p, vectors, head, q_begin, num_rows, k_begin,
                                                 num_keys, shared, ds, change);
#pragma unroll
                   for (int j = 0; j < kKeysOfThread; ++j) {
#pragma unroll
                     for (int i = 0; i < kRowsOfThread; ++i) {
                       const int64_t own = q_begin + row + i - k_begin;
                       const float weight =
                           key + j < num_keys ? key_weight(f.policy + k_begin, key + j, own) : 0.0f;
                       ds[key + j][row + i] =
                           key + j <= own ? change[i][j] * weight * f.softmax_scale : 0.0f;
                     }
                   }
                   add_weighted_rows<T, kParts>(
                       ds, head_rows<T>(f.k, k_begin, head / f.heads.group, vectors.k), num_keys,
                       first_dim, head_dim, shared, dq);
                 }
#pragma unroll
                 for (int i = 0; i < kRowsOfThread; ++i) {
                   if (row + i >= num_rows) continue;
                   T* to = static_cast<T*>(p.dq.data) + (q_begin + row + i) * p.dq.row_stride +
                           head * p.dq.head_stride;
#pragma unroll
                   for (int part = 0; part < kParts; ++part) {
#pragma unroll
                     for (int j = 0; j < kKeysOfThread; ++j) {
                       const int64_t d = first_dim + part * kTile + key + j;
                       if (d < head_dim) from_float(dq[part][i][j], to + d);
                     }
                   }
                 }
               });
  }
}

// dk, dv and, in the blocks with blockIdx.y 0, a key head's part of dpolicy. One work item is (tile
// of packed keys, key head); blockIdx.y has kTile elements of head_dim.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    policy_key_gradient_kernel(CudaPolicyBackwardParams p, PolicyVectors vectors) {
  __shared__ __align__(16) TileShared shared;
  __shared__ __align__(16) float weights[kTile][kTile];  // [row][key]
  __shared__ __align__(16) float ds[kTile][kTile];       // [row][key]
  const CudaPolicyParams& f = p.forward;
  const DeviceSegments segments(f.bounds, f.num_segments);
  const Heads& heads = f.heads;
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const int64_t first_dim = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t num_items = (f.total + kTile - 1) / kTile * heads.num_heads_k;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t head_k = item % heads.num_heads_k;
    const int64_t tile_begin = item / heads.num_heads_k * kTile;
    const int64_t tile_end = at_most(tile_begin + kTile, f.total);
    zero_other_rows<T>(f, p.dk, head_k, tile_begin, tile_end, first_dim, kTile);
    zero_other_rows<T>(f, p.dv, head_k, tile_begin, tile_end, first_dim, kTile);
    for_pieces(
        segments, segments.q, tile_begin, tile_end,
        [&](const Segment& segment, int64_t begin, int64_t end) {
          const int num_keys = static_cast<int>(end - begin);
          const int64_t k_begin = segment.q_begin + begin;
          float of_keys[kKeysOfThread] = {};  // dpolicy, over the thread's rows
          float dk[1][kRowsOfThread][kKeysOfThread] = {}, dv[1][kRowsOfThread][kKeysOfThread] = {};
          for (int64_t head = head_k * heads.group; head < (head_k + 1) * heads.group; ++head) {
            for (int64_t first = begin; first < segment.q_len; first += kTile) {
              const int num_rows = static_cast<int>(at_most<int64_t>(kTile, segment.q_len - first));
              const int64_t q_begin = segment.q_begin + first;
              float change[kRowsOfThread][kKeysOfThread];
              policy_gradient_tile<T, false>(p, vectors, head, q_begin, num_rows, k_begin, num_keys,
                                             shared, weights, change);
              float of_tile[kKeysOfThread] = {};
#pragma unroll
              for (int i = 0; i < kRowsOfThread; ++i) {
                const int64_t own = q_begin + row + i - k_begin;
                const bool exists = row + i < num_rows;
#pragma unroll
                for (int j = 0; j < kKeysOfThread; ++j) {
                  const bool seen = exists && key + j <= own && key + j < num_keys;
                  const float weight = seen ? key_weight(f.policy + k_begin, key + j, own) : 0.0f;
                  if (seen) weights[row + i][key + j] *= weight;
                  ds[row + i][key + j] = seen ? change[i][j] * weight * f.softmax_scale : 0.0f;
                  if (key + j != own) of_tile[j] += change[i][j];
                }
              }
#pragma unroll
              for (int j = 0; j < kKeysOfThread; ++j) of_keys[j] += of_tile[j];
              add_weighted_rows<T, 1>(weights, head_rows<T>(p.dout, q_begin, head, vectors.dout),
                                      num_rows, first_dim, heads.head_dim, shared, dv);
              add_weighted_rows<T, 1>(ds, head_rows<T>(f.q, q_begin, head, vectors.q), num_rows,
                                      first_dim, heads.head_dim, shared, dk);
            }
          }
          // From here on the thread's rows are keys, and what were its keys are elements.
          const float* all = segment_sum(f, segments, segment, head_k);
          const float share = f.epsilon / static_cast<float>(segment.q_len);
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i) {
            if (row + i >= num_keys) continue;
            const int64_t at = k_begin + row + i;
            T* dk_row =
                static_cast<T*>(p.dk.data) + at * p.dk.row_stride + head_k * p.dk.head_stride;
            T* dv_row =
                static_cast<T*>(p.dv.data) + at * p.dv.row_stride + head_k * p.dv.head_stride;
#pragma unroll
            for (int j = 0; j < kKeysOfThread; ++j) {
              const int64_t d = first_dim + key + j;
              if (d >= heads.head_dim) continue;
              from_float(dk[0][i][j], dk_row + d);
              from_float(fmaf(all[d], share, dv[0][i][j]), dv_row + d);
            }
          }
          if (blockIdx.y != 0) return;
          __syncthreads();
#pragma unroll
          for (int j = 0; j < kKeysOfThread; ++j)
            weights[row / kRowsOfThread][key + j] = of_keys[j];
          __syncthreads();
          const int t = static_cast<int>(threadIdx.x);
          if (t < num_keys) {
            float sum = 0.0f;
            for (int r = 0; r < kRowThreads; ++r) sum += weights[r][t];
            p.dpolicy_of_heads[head_k * f.total + k_begin + t] = sum;
          }
        });
  }
}

constexpr int kDpolicyThreads = 256;

// dpolicy = its parts put together, 0 for rows of no segment.
static __global__ void __launch_bounds__(kDpolicyThreads)
    finish_dpolicy_kernel(CudaPolicyBackwardParams p) {
  const CudaPolicyParams& f = p.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDpolicyThreads + threadIdx.x;
  if (row >= f.total) return;
  float sum = 0.0f;
  if (row >= f.bounds[0] && row < f.bounds[f.num_segments]) {
    for (int64_t head_k = 0; head_k < f.heads.num_heads_k; ++head_k) {
      sum += p.dpolicy_of_heads[head_k * f.total + row];
    }
  }
  p.dpolicy[row] = sum;
}

}  // namespace pruneops
