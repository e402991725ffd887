// Attention under a key policy: an online softmax over tiles of keys, on plain multiply-adds, and
// the sums over whole segments that epsilon brings in.

#pragma once

#include "attention/cuda/policy.h"
#include "attention/cuda/tiles.cuh"

namespace pruneops {

constexpr int kSumThreads = 128;
constexpr int kSumLanes = 16;                      // threads side by side in a row
constexpr int kSumRows = kSumThreads / kSumLanes;  // rows in flight
constexpr int kSumDims = kSumLanes * kVector;

// sums[segment, head_k] = sum over the segment's rows and the `group` heads of head_k of
// factor * row; the factor is 1, or 1 / (softmax_sum + epsilon) where softmax_sum is given.
//   rows  [total, num_heads_k * group, head_dim]    softmax_sum  [num_heads_k * group, total] or
//   null sums  [num_segments, num_heads_k, head_dim]
template <class T>
__global__ void __launch_bounds__(kSumThreads, 4)
    segment_sums_kernel(CudaPolicyParams p, RowView rows, bool vectors, int64_t group,
                        const float* softmax_sum, float* sums) {
  __shared__ float of_rows[kSumRows][kSumDims];
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int lane = static_cast<int>(threadIdx.x) % kSumLanes * kVector;
  const int first = static_cast<int>(threadIdx.x) / kSumLanes;
  const int64_t head_dim = p.heads.head_dim, heads_k = p.heads.num_heads_k;
  for (int64_t item = blockIdx.x; item < p.num_segments * heads_k; item += gridDim.x) {
    const Segment segment = segments[item / heads_k];
    const int64_t head_k = item % heads_k;
    for (int64_t dim = 0; dim < head_dim; dim += kSumDims) {
      float sum[kVector] = {};
      for (int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
        const HeadRows<T> of_head = head_rows<T>(rows, segment.q_begin, head, vectors);
        for (int64_t r = first; r < segment.q_len; r += kSumRows) {
          float x[kVector];
          load_vector(of_head.data + r * of_head.stride + dim + lane, head_dim - dim - lane,
                      vectors, x);
          const float factor =
              softmax_sum == nullptr
                  ? 1.0f
                  : 1.0f / (softmax_sum[head * p.total + segment.q_begin + r] + p.epsilon);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[i] = fmaf(x[i], factor, sum[i]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kVector; ++i) of_rows[first][lane + i] = sum[i];
      __syncthreads();
      const int64_t d = dim + threadIdx.x;
      if (d < head_dim) {
        float total = 0.0f;
        for (int r = 0; r < kSumRows; ++r) total += of_rows[r][threadIdx.x];
        sums[item * head_dim + d] = total;
      }
    }
  }
}

// Where segment_sums_kernel put the sum of a segment that is not empty.
__device__ __forceinline__ const float* segment_sum(const CudaPolicyParams& p,
                                                    const DeviceSegments& segments,
                                                    const Segment& segment, int64_t head_k) {
  const int64_t b = first_ending_past(segments.q + 1, p.num_segments, segment.q_begin);
  return p.sums + (b * p.heads.num_heads_k + head_k) * p.heads.head_dim;
}

// tile[r] = elements first_dim + [0, kTile) of row r of kDepth, 0 past the rows and past head_dim.
template <class T>
__device__ __forceinline__ void load_rows(const HeadRows<T>& rows, int num_rows, int64_t first_dim,
                                          int64_t head_dim, float (&tile)[kDepth][kTile]) {
  constexpr int kVectors = kTile / kVector;
#pragma unroll
  for (int i = 0; i < kDepth * kVectors / kTileThreads; ++i) {
    const int vector = static_cast<int>(threadIdx.x) + i * kTileThreads;
    const int r = vector / kVectors, d = vector % kVectors * kVector;
    float x[kVector];
    load_vector(rows.data + r * rows.stride + first_dim + d,
                r < num_rows ? head_dim - first_dim - d : 0, rows.vectors, x);
#pragma unroll
    for (int e = 0; e < kVector; ++e) tile[r][d + e] = x[e];
  }
}

// out[part] += (weights of num_keys keys) x (their rows), for kParts pieces of kTile elements of a
// row from first_dim on. Begins with a barrier.
//   weights  [kTile, kTile] in shared memory, a key's weight for each output row
template <class T, int kParts>
__device__ __forceinline__ void add_weighted_rows(
    const float (*weights)[kTile], const HeadRows<T>& rows, int num_keys, int64_t first_dim,
    int64_t head_dim, TileShared& shared, float (&out)[kParts][kRowsOfThread][kKeysOfThread]) {
  static_assert(kParts <= 2, "one operand of TileShared for each part");
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int dim = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  for (int depth = 0; depth < num_keys; depth += kDepth) {
    const HeadRows<T> part = {rows.data + depth * rows.stride, rows.stride, rows.vectors};
    __syncthreads();
    load_rows(part, num_keys - depth, first_dim, head_dim, shared.k);
    if constexpr (kParts == 2) {
      load_rows(part, num_keys - depth, first_dim + kTile, head_dim, shared.q);
    }
    __syncthreads();
    add_products(weights + depth, shared.k, row, dim, out[0]);
    if constexpr (kParts == 2) add_products(weights + depth, shared.q, row, dim, out[1]);
  }
}

// Writes zeros for the rows of a tile that belong to no segment: those before the first and after
// the last.
template <class T>
__device__ __forceinline__ void zero_other_rows(const CudaPolicyParams& p, const RowView& view,
                                                int64_t head, int64_t tile_begin, int64_t tile_end,
                                                int64_t first_dim, int64_t dims) {
  const int64_t begin = p.bounds[0], end = p.bounds[p.num_segments];
  if (tile_begin >= begin && tile_end <= end) return;
  const int64_t last = at_most(first_dim + dims, p.heads.head_dim);
  for (int64_t r = tile_begin; r < tile_end; ++r) {
    if (r >= begin && r < end) continue;
    T* row = static_cast<T*>(view.data) + r * view.row_stride + head * view.head_stride;
    for (int64_t d = first_dim + threadIdx.x; d < last; d += kTileThreads) {
      from_float(0.0f, row + d);
    }
  }
}

// What key `key` of a tile counts for a row whose own key is `own`, both counted in the tile.
__device__ __forceinline__ float key_weight(const float* policy, int key, int64_t own) {
  return key == own ? 1.0f : __ldg(policy + key);
}

// One work item is (tile of packed rows, query head); blockIdx.y has a part of head_dim.
template <class T, int kParts>
__global__ void __launch_bounds__(kTileThreads)
    policy_forward_kernel(CudaPolicyParams p, bool q_vectors, bool k_vectors, bool v_vectors) {
  __shared__ __align__(16) TileShared shared;
  __shared__ __align__(16) float weights[kTile][kTile];  // [key][row]
  const DeviceSegments segments(p.bounds, p.num_segments);
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
  const float log2_scale = p.softmax_scale * kLog2OfE;
  const int64_t head_dim = p.heads.head_dim;
  const int64_t first_dim = static_cast<int64_t>(blockIdx.y) * kParts * kTile;
  const int64_t num_items = (p.total + kTile - 1) / kTile * p.heads.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t head = item % p.heads.num_heads_q, head_k = head / p.heads.group;
    const int64_t tile_begin = item / p.heads.num_heads_q * kTile;
    const int64_t tile_end = at_most(tile_begin + kTile, p.total);
    zero_other_rows<T>(p, p.out, head, tile_begin, tile_end, first_dim, kParts * kTile);
    const int64_t r = tile_begin + threadIdx.x;
    if (blockIdx.y == 0 && r < tile_end && (r < segments.q[0] || r >= segments.q[p.num_segments])) {
      p.softmax_max[head * p.total + r] = -INFINITY;
      p.softmax_sum[head * p.total + r] = 0.0f;
    }
    for_pieces(
        segments, segments.q, tile_begin, tile_end,
        [&](const Segment& segment, int64_t begin, int64_t end) {
          const int num_rows = static_cast<int>(end - begin);
          const HeadRows<T> q = head_rows<T>(p.q, segment.q_begin + begin, head, q_vectors);
          float max[kRowsOfThread], sum[kRowsOfThread];
          float out[kParts][kRowsOfThread][kKeysOfThread] = {};
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i) max[i] = -INFINITY, sum[i] = 0.0f;
          for (int64_t first = 0; first < end; first += kTile) {
            const int num_keys = static_cast<int>(at_most<int64_t>(kTile, end - first));
            const int64_t k_begin = segment.q_begin + first;
            float e[kRowsOfThread][kKeysOfThread];
            multiply_tile(q, num_rows, head_rows<T>(p.k, k_begin, head_k, k_vectors), num_keys,
                          head_dim, shared, e);
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) {
              const int64_t own = begin + row + i - first;
              float most = max[i];
#pragma unroll
              for (int j = 0; j < kKeysOfThread; ++j) {
                if (key + j <= own && key + j < num_keys) most = fmaxf(most, e[i][j] * log2_scale);
              }
              for (int flip = kKeyThreads / 2; flip > 0; flip /= 2) {
                most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, flip));
              }
              const float shift = shift_of(most);
              const float alpha = exp2f(max[i] - shift);
              max[i] = most;
              sum[i] *= alpha;
#pragma unroll
              for (int j = 0; j < kKeysOfThread; ++j) {
                const bool seen = key + j <= own && key + j < num_keys;
                e[i][j] = seen ? exp2f(fmaf(e[i][j], log2_scale, -shift)) *
                                     key_weight(p.policy + k_begin, key + j, own)
                               : 0.0f;
                sum[i] += e[i][j];
                weights[key + j][row + i] = e[i][j];
              }
#pragma unroll
              for (int part = 0; part < kParts; ++part) {
#pragma unroll
                for (int j = 0; j < kKeysOfThread; ++j) out[part][i][j] *= alpha;
              }
            }
            add_weighted_rows<T, kParts>(weights, head_rows<T>(p.v, k_begin, head_k, v_vectors),
                                         num_keys, first_dim, head_dim, shared, out);
          }
          const float* all = segment_sum(p, segments, segment, head_k);
          const float share = p.epsilon / static_cast<float>(segment.q_len);
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i) {
            for (int flip = kKeyThreads / 2; flip > 0; flip /= 2) {
              sum[i] += __shfl_xor_sync(kAllLanes, sum[i], flip);
            }
            if (row + i >= num_rows) continue;
            const int64_t at = segment.q_begin + begin + row + i;
            if (key == 0 && blockIdx.y == 0) {
              p.softmax_max[head * p.total + at] = max[i];
              p.softmax_sum[head * p.total + at] = sum[i];
            }
            const float inverse = 1.0f / (sum[i] + p.epsilon);
            T* to = static_cast<T*>(p.out.data) + at * p.out.row_stride + head * p.out.head_stride;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
              for (int j = 0; j < kKeysOfThread; ++j) {
                const int64_t d = first_dim + part * kTile + key + j;
                if (d < head_dim)
                  from_float(fmaf(all[d], share, out[part][i][j]) * inverse, to + d);
              }
            }
          }
        });
  }
}

}  // namespace pruneops
