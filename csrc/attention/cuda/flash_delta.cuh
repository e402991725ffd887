// The two numbers that the gradients need of every row of out beside the inputs, made once for both
// passes. Memory bound: dout and out are read, 8 bytes a row are written.

#pragma once

#include "attention/cuda/flash_backward_weights.cuh"
#include "attention/cuda/rows.cuh"

namespace pruneops {

constexpr int kDeltaThreads = 128;

// A few lanes have a row of one head, 16 bytes each; blockIdx.y is the head. What is made of rows
// outside of all segments, and of the NaN that may lie there, is not used. Static, as is its
// launch: files compiled for different architectures have it, and the linker must not take one for
// another.
template <class T, int kHeadDim, class Weights>
static __global__ void __launch_bounds__(kDeltaThreads)
    flash_row_terms_kernel(FlashBackwardParams p, Weights weights) {
  constexpr int kVectors = kHeadDim / kVector;
  constexpr int kLanes = kVectors <= 8 ? 8 : 16;
  static_assert(kHeadDim % kVector == 0 && kVectors <= kLanes);
  const int64_t total_q = p.segments.total_q;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t head = blockIdx.y;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float sum = 0.0f;
  if (row < total_q && lane < kVectors) {
    float x[kVector], y[kVector];
    load_vector(head_rows<T>(p.dout, row, head, true).data + lane * kVector, kVector, true, x);
    load_vector(head_rows<T>(p.out, row, head, true).data + lane * kVector, kVector, true, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], y[i], sum);
  }
  for (int flip = kLanes / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
  if (row >= total_q || lane != 0) return;
  const int64_t group = p.heads.group, at = head * total_q + row;
  FlashRowTerms* terms = p.row_terms + head / group * total_q * group;
  terms[row * group + head % group] = weights.row_terms(p, at, sum);
}

template <class T, int kHeadDim, class Weights = EqualKeys>
static cudaError_t launch_flash_row_terms(const FlashBackwardParams& p, cudaStream_t stream,
                                          const Weights& weights = {}) {
  constexpr int kRows = kDeltaThreads / (kHeadDim / kVector <= 8 ? 8 : 16);
  const dim3 grid(static_cast<unsigned>((p.segments.total_q + kRows - 1) / kRows),
                  static_cast<unsigned>(p.heads.num_heads_q));
  return launch_kernel(flash_row_terms_kernel<T, kHeadDim, Weights>, grid, dim3(kDeltaThreads), 0,
                       stream, p, weights);
}

}  // namespace pruneops
