// The router. Forward, a warp has one row. Backward, a block has some rows and a slice of the
// columns, and every thread the sums of its own columns.

#pragma once

#include <math.h>

#include "common/cuda_block.cuh"
#include "common/cuda_packs.cuh"
#include "routing/cuda/router.h"

namespace pruneops {

constexpr int kRouterThreads = 256;
constexpr int kRouterWarps = kRouterThreads / kWarpSize;

__device__ __forceinline__ bool is_routed(const uint8_t* target, int64_t row) {
  return target == nullptr || target[row] != 0;
}

__device__ __forceinline__ float activated(Activation activation, float logit) {
  if (activation == Activation::kTanh) return tanhf(logit);
  if (activation == Activation::kSigmoid) return 1.0f / (1.0f + expf(-logit));
  return logit;
}

__device__ __forceinline__ float slope_of(Activation activation, float logit) {
  const float value = activated(activation, logit);
  if (activation == Activation::kTanh) return (1.0f - value) * (1.0f + value);
  if (activation == Activation::kSigmoid) return value * (1.0f - value);
  return 1.0f;
}

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, flip);
  }
  return value;
}

// Columns [columns / kElements * kElements, columns) are read one by one.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRouterThreads)
    router_weights_kernel(const __grid_constant__ CudaRouterParams p) {
  constexpr int kElements = kPackElements<T, kWide>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t t =
      static_cast<int64_t>(blockIdx.x) * kRouterWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (t >= p.total) return;
  if (!is_routed(p.target, t)) {
    if (lane == 0) {
      p.logits[t] = -INFINITY;
      p.weights[t] = 1.0f;
    }
    return;
  }
  const T* x = row_of<T>(p.x, t);
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t packed = p.columns / kElements * kElements;
  float dot = 0.0f;
#pragma unroll 4
  for (int64_t c = lane * kElements; c < packed; c += kWarpSize * kElements) {
    const Pack<T, kElements> a = load_pack<kElements>(x + c);
    const Pack<T, kElements> b = load_pack<kElements>(weight + c);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      dot = fmaf(as_float(a.values[k]), as_float(b.values[k]), dot);
    }
  }
  for (int64_t c = packed + lane; c < p.columns; c += kWarpSize) {
    dot = fmaf(as_float(x[c]), as_float(weight[c]), dot);
  }
  dot = sum_of_warp(dot);
  if (lane != 0) return;
  const float logit = p.bias == nullptr ? dot : dot + as_float(*static_cast<const T*>(p.bias));
  p.logits[t] = logit;
  p.weights[t] = p.scale * activated(p.activation, logit) + p.shift;
}

constexpr int kGradRowsAtOnce = 4;  // rows whose loads a thread has in flight
constexpr int kStagedRows = 128;    // rows whose gradients lie in shared memory at a time
static_assert(kStagedRows % kGradRowsAtOnce == 0 && kStagedRows <= kRouterThreads);

// Block (slice, b): rows [b, b + 1) * block_rows, columns [slice, slice + 1) * kRouterThreads *
// kElements. Leaves the sums of those rows in partials [blocks, row_floats], that of the bias
// behind those of the columns.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRouterThreads)
    router_backward_kernel(const __grid_constant__ CudaRouterGradParams p, int64_t block_rows,
                           int64_t row_floats) {
  constexpr int kElements = kPackElements<T, kWide>;
  __shared__ float dlogits[kStagedRows];
  __shared__ bool routed[kStagedRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = blockIdx.y * block_rows;
  const int64_t end = begin + block_rows < p.total ? begin + block_rows : p.total;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kRouterThreads + thread) * kElements;
  const bool has_columns = column < p.columns;

  float weight[kElements] = {};
  float sums[kElements] = {};
  float sum_of_bias = 0.0f;
  if (has_columns) {
    const Pack<T, kElements> raw = load_pack<kElements>(static_cast<const T*>(p.weight) + column);
#pragma unroll
    for (int k = 0; k < kElements; ++k) weight[k] = as_float(raw.values[k]);
  }
  for (int64_t first = begin; first < end; first += kStagedRows) {
    const int rows = end - first < kStagedRows ? static_cast<int>(end - first) : kStagedRows;
    __syncthreads();
    if (thread < kStagedRows) {
      const int64_t t = first + thread;
      const bool counts = thread < rows && is_routed(p.target, t);
      routed[thread] = counts;
      dlogits[thread] =
          counts ? p.dweights[t] * p.scale * slope_of(p.activation, p.logits[t]) : 0.0f;
    }
    __syncthreads();
    if (blockIdx.x == 0 && thread < kWarpSize) {
      for (int r = thread; r < rows; r += kWarpSize) sum_of_bias += dlogits[r];
    }
    if (!has_columns) continue;
    for (int r = 0; r < rows; r += kGradRowsAtOnce) {
      Pack<T, kElements> x[kGradRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kGradRowsAtOnce; ++k) {
        // Rows past the last one are not routed.
        x[k] = routed[r + k] ? load_pack<kElements>(row_of<T>(p.x, first + r + k) + column)
                             : Pack<T, kElements>{};
      }
#pragma unroll
      for (int k = 0; k < kGradRowsAtOnce; ++k) {
        if (r + k >= rows) continue;
        const float g = dlogits[r + k];
        Pack<T, kElements> dx{};
        if (routed[r + k]) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            sums[e] = fmaf(g, as_float(x[k].values[e]), sums[e]);
            round_to(g * weight[e], &dx.values[e]);
          }
        }
        store_pack(static_cast<T*>(p.dx) + (first + r + k) * p.columns + column, dx);
      }
    }
  }
  float* partial = p.partials + blockIdx.y * row_floats;
  if (has_columns) {
    constexpr int kFloats = kElements < 4 ? kElements : 4;
#pragma unroll
    for (int e = 0; e < kElements; e += kFloats) {
      Pack<float, kFloats> pack;
#pragma unroll
      for (int k = 0; k < kFloats; ++k) pack.values[k] = sums[e + k];
      store_pack(partial + column + e, pack);
    }
  }
  if (blockIdx.x == 0 && thread < kWarpSize) {
    sum_of_bias = sum_of_warp(sum_of_bias);
    if (thread == 0) partial[p.columns] = sum_of_bias;
  }
}

// dweight and dbias from partials [blocks, row_floats]. A block has 32 columns: warp w adds up
// partials w, w + 8, ..., then the first warp adds up the warps.
template <class T>
__global__ void __launch_bounds__(kRouterThreads)
    router_reduce_kernel(const __grid_constant__ CudaRouterGradParams p, int64_t blocks,
                         int64_t row_floats) {
  __shared__ float sums[kRouterWarps][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  if (column <= p.columns) {
#pragma unroll 4
    for (int64_t b = warp; b < blocks; b += kRouterWarps) {
      sum += p.partials[b * row_floats + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column > p.columns) return;
  for (int w = 1; w < kRouterWarps; ++w) sum += sums[w][lane];
  T* out = column < p.columns ? static_cast<T*>(p.dweight) + column : static_cast<T*>(p.dbias);
  round_to(sum, out);
}

}  // namespace pruneops
