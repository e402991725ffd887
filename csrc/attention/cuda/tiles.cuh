// Tiles of query x key products on plain multiply-adds: operands go through shared memory as fp32,
// a thread holds 8 x 4 of the 64 x 64 products.

#pragma once

#include "attention/cuda/rows.cuh"
#include "attention/cuda/segments.cuh"

namespace pruneops {

constexpr int kTile = 64;   // queries, and keys, of a tile
constexpr int kDepth = 32;  // of head_dim at a time
constexpr int kTileThreads =
    128;  // thread t has rows 8 * (t / 16) + [0, 8) and keys 4 * (t % 16) + [0, 4)
constexpr int kRowsOfThread = 8;
constexpr int kKeysOfThread = 4;
constexpr int kKeyThreads = kTile / kKeysOfThread;  // threads that share rows: half of a warp
constexpr int kRowThreads = kTile / kRowsOfThread;

struct TileShared {
  float q[kDepth][kTile];
  float k[kDepth][kTile];
};

// tile[d][r] = element depth + d of row r, 0 past the rows and past head_dim.
template <class T>
__device__ __forceinline__ void load_tile(const HeadRows<T>& rows, int num_rows, int64_t depth,
                                          int64_t head_dim, float (&tile)[kDepth][kTile]) {
#pragma unroll
  for (int i = 0; i < kTile * kDepth / kVector / kTileThreads; ++i) {
    const int vector = static_cast<int>(threadIdx.x) + i * kTileThreads;
    const int r = vector % kTile, d = vector / kTile * kVector;
    float x[kVector];
    load_vector(rows.data + r * rows.stride + depth + d, r < num_rows ? head_dim - depth - d : 0,
                rows.vectors, x);
#pragma unroll
    for (int e = 0; e < kVector; ++e) tile[d + e][r] = x[e];
  }
}

// products[i][j] += <column row + i of a, column key + j of b>, both [kDepth, kTile] in shared
// memory.
__device__ __forceinline__ void add_products(const float (*a)[kTile], const float (*b)[kTile],
                                             int row, int key,
                                             float (&products)[kRowsOfThread][kKeysOfThread]) {
#pragma unroll 8
  for (int d = 0; d < kDepth; ++d) {
    const float4 low = *reinterpret_cast<const float4*>(&a[d][row]);
    const float4 high = *reinterpret_cast<const float4*>(&a[d][row + 4]);
    const float4 right = *reinterpret_cast<const float4*>(&b[d][key]);
    const float left[kRowsOfThread] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      products[i][0] = fmaf(left[i], right.x, products[i][0]);
      products[i][1] = fmaf(left[i], right.y, products[i][1]);
      products[i][2] = fmaf(left[i], right.z, products[i][2]);
      products[i][3] = fmaf(left[i], right.w, products[i][3]);
    }
  }
}

// products[i][j] = <row i, key j> of this thread. Begins with a barrier.
template <class T>
__device__ __forceinline__ void multiply_tile(const HeadRows<T>& q, int num_rows,
                                              const HeadRows<T>& k, int num_keys, int64_t head_dim,
                                              TileShared& shared,
                                              float (&products)[kRowsOfThread][kKeysOfThread]) {
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  const int key = static_cast<int>(threadIdx.x) % kKeyThreads * kKeysOfThread;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
    for (int j = 0; j < kKeysOfThread; ++j) products[i][j] = 0.0f;
  }
  for (int64_t depth = 0; depth < head_dim; depth += kDepth) {
    __syncthreads();
    load_tile(q, num_rows, depth, head_dim, shared.q);
    load_tile(k, num_keys, depth, head_dim, shared.k);
    __syncthreads();
    add_products(shared.q, shared.k, row, key, products);
  }
}

// Limits of the thread's rows; 0 for rows past the last.
__device__ __forceinline__ void thread_limits(const Visibility& visibility, const Segment& segment,
                                              int64_t first, int num_rows,
                                              int64_t (&limit)[kRowsOfThread], int64_t& largest) {
  const int row = static_cast<int>(threadIdx.x) / kKeyThreads * kRowsOfThread;
  largest = 0;
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    limit[i] = row + i < num_rows ? key_limit(visibility, segment, first + row + i) : 0;
    largest = at_least(largest, limit[i]);
  }
}

}  // namespace pruneops
