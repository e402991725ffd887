// Weighted rows. A block has a tile of output rows, and first looks through the indices for those
// that point into it: they come from the L2 cache and are few bytes beside the rows. Then every
// warp has one row at a time, each lane 16 bytes of it.

#pragma once

#include "common/cuda_block.cuh"
#include "common/cuda_packs.cuh"
#include "compaction/cuda/scaled.h"

namespace pruneops {

constexpr int kScaledThreads = 256;
constexpr int kScaledWarps = kScaledThreads / kWarpSize;
constexpr int kMaxScaledRows = 64;  // of a tile
constexpr int kIndicesInFlight = 4;
constexpr int kPacksInFlight = 4;      // of a row that a thread loads before it stores the first
constexpr int kGradPacksInFlight = 2;  // the same backward, where more rows are written
constexpr int kScaledBlocksOfSm = 4;   // that registers are kept for

// The rows of one tile, and for each the row of residual and branch that goes there, or -1.
struct ScaledTile {
  int64_t first;
  int rows;
  const int32_t* source;  // [rows], in shared memory
};

// Finds the sources of a tile. drop(i) is called for every i whose index a later one repeats. Every
// thread of the block must call it.
//   source  [kMaxScaledRows] in shared memory
template <class Drop>
__device__ __forceinline__ ScaledTile find_sources(int64_t tile, int tile_rows, int64_t total,
                                                   const int32_t* indices, int64_t kept,
                                                   int32_t* source, const Drop& drop) {
  const int64_t first = tile * tile_rows;
  const int64_t left = total - first;
  const int rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
  for (int r = threadIdx.x; r < rows; r += kScaledThreads) source[r] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < kept; i += kIndicesInFlight * kScaledThreads) {
    int64_t row[kIndicesInFlight];
#pragma unroll
    for (int k = 0; k < kIndicesInFlight; ++k) {
      const int64_t at = i + k * kScaledThreads;
      row[k] = at < kept ? __ldg(indices + at) - first : -1;
    }
#pragma unroll
    for (int k = 0; k < kIndicesInFlight; ++k) {
      if (row[k] < 0 || row[k] >= rows) continue;
      const int32_t mine = static_cast<int32_t>(i + k * kScaledThreads);
      const int32_t other = atomicMax(&source[row[k]], mine);
      if (other >= 0) drop(other < mine ? other : mine);
    }
  }
  __syncthreads();
  return {first, rows, source};
}

// The packs of one row from column `first` on.
template <int kElements, int kPacks, class T>
__device__ __forceinline__ void load_packs(const T* row, int64_t first, int64_t columns,
                                           Pack<T, kElements> (&packs)[kPacks]) {
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = first + k * kWarpSize * kElements;
    packs[k] = c < columns ? load_pack<kElements>(row + c) : Pack<T, kElements>{};
  }
}

template <int kElements, int kPacks, class T>
__device__ __forceinline__ void store_packs(T* row, int64_t first, int64_t columns,
                                            const Pack<T, kElements> (&packs)[kPacks]) {
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t c = first + k * kWarpSize * kElements;
    if (c < columns) store_pack(row + c, packs[k]);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kScaledThreads, kScaledBlocksOfSm)
    scatter_scaled_kernel(const __grid_constant__ CudaScatterScaledParams p, int tile_rows) {
  constexpr int kElements = kPackElements<T, kWide>;
  constexpr int kStep = kWarpSize * kPacksInFlight * kElements;
  __shared__ int32_t source[kMaxScaledRows];
  const ScaledTile tile =
      find_sources(blockIdx.x, tile_rows, p.total, p.indices, p.kept, source, [](int32_t) {});
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int r = static_cast<int>(threadIdx.x) / kWarpSize; r < tile.rows; r += kScaledWarps) {
    const int64_t t = tile.first + r;
    const float weight = __ldg(p.weights + t);
    T* out = static_cast<T*>(p.out) + t * p.columns;
    const int64_t i = tile.source[r];
    Pack<T, kElements> packs[kPacksInFlight];
    if (i >= 0) {
      const T* residual = row_of<T>(p.residual, i);
      const T* branch = row_of<T>(p.branch, i);
      for (int64_t c = lane * kElements; c < p.columns; c += kStep) {
        Pack<T, kElements> added[kPacksInFlight];
        load_packs(residual, c, p.columns, packs);
        load_packs(branch, c, p.columns, added);
#pragma unroll
        for (int k = 0; k < kPacksInFlight; ++k) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            round_to(fmaf(weight, as_float(added[k].values[e]), as_float(packs[k].values[e])),
                     &packs[k].values[e]);
          }
        }
        store_packs(out, c, p.columns, packs);
      }
    } else {
      const T* x = row_of<T>(p.x, t);
      for (int64_t c = lane * kElements; c < p.columns; c += kStep) {
        load_packs(x, c, p.columns, packs);
#pragma unroll
        for (int k = 0; k < kPacksInFlight; ++k) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            round_to(weight * as_float(packs[k].values[e]), &packs[k].values[e]);
          }
        }
        store_packs(out, c, p.columns, packs);
      }
    }
  }
}

// Zeros to row i of both gradients, by `threads` threads of which this is number `thread`.
template <int kElements, class T>
__device__ __forceinline__ void clear_kept_row(const CudaScatterScaledGradParams& p, int64_t i,
                                               int thread, int threads) {
  T* dresidual = static_cast<T*>(p.dresidual) + i * p.columns;
  T* dbranch = static_cast<T*>(p.dbranch) + i * p.columns;
  for (int64_t c = thread * kElements; c < p.columns; c += threads * kElements) {
    store_pack(dresidual + c, Pack<T, kElements>{});
    store_pack(dbranch + c, Pack<T, kElements>{});
  }
}

// Blocks [0, row_tiles) have tiles of dout; those behind them clear the gradients of rows whose
// index is out of range, kMaxScaledRows indices each.
template <class T, bool kWide>
__global__ void __launch_bounds__(kScaledThreads, kScaledBlocksOfSm)
    scatter_scaled_backward_kernel(const __grid_constant__ CudaScatterScaledGradParams p,
                                   int tile_rows, int64_t row_tiles) {
  constexpr int kElements = kPackElements<T, kWide>;
  constexpr int kStep = kWarpSize * kGradPacksInFlight * kElements;
  __shared__ int32_t source[kMaxScaledRows];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  if (blockIdx.x >= row_tiles) {
    const int64_t first = (blockIdx.x - row_tiles) * kMaxScaledRows;
    for (int r = warp; r < kMaxScaledRows && first + r < p.kept; r += kScaledWarps) {
      const int32_t row = __ldg(p.indices + first + r);
      if (row >= 0 && row < p.total) continue;
      clear_kept_row<kElements, T>(p, first + r, lane, kWarpSize);
    }
    return;
  }

  const ScaledTile tile =
      find_sources(blockIdx.x, tile_rows, p.total, p.indices, p.kept, source,
                   [&](int32_t i) { clear_kept_row<kElements, T>(p, i, 0, 1); });
  for (int r = warp; r < tile.rows; r += kScaledWarps) {
    const int64_t t = tile.first + r;
    const float weight = __ldg(p.weights + t);
    const T* dout = row_of<T>(p.dout, t);
    T* dx = static_cast<T*>(p.dx) + t * p.columns;
    const int64_t i = tile.source[r];
    const T* weighted = i >= 0 ? row_of<T>(p.branch, i) : row_of<T>(p.x, t);
    T* dweighted = i >= 0 ? static_cast<T*>(p.dbranch) + i * p.columns : dx;
    T* dresidual = i >= 0 ? static_cast<T*>(p.dresidual) + i * p.columns : nullptr;
    float dot = 0.0f;
    for (int64_t c = lane * kElements; c < p.columns; c += kStep) {
      Pack<T, kElements> d[kGradPacksInFlight], y[kGradPacksInFlight];
      load_packs(dout, c, p.columns, d);
      load_packs(weighted, c, p.columns, y);
#pragma unroll
      for (int k = 0; k < kGradPacksInFlight; ++k) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const float value = as_float(d[k].values[e]);
          dot = fmaf(value, as_float(y[k].values[e]), dot);
          round_to(weight * value, &y[k].values[e]);
        }
      }
      store_packs(dweighted, c, p.columns, y);
      if (dresidual == nullptr) continue;
      store_packs(dresidual, c, p.columns, d);
#pragma unroll
      for (int k = 0; k < kGradPacksInFlight; ++k) d[k] = Pack<T, kElements>{};
      store_packs(dx, c, p.columns, d);
    }
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
      dot += __shfl_xor_sync(kAllLanes, dot, flip);
    }
    if (lane == 0) p.dweights[t] = dot;
  }
}

}  // namespace pruneops
