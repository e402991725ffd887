// Means and similarity of the rows that stand at one position in every frame. A block has one
// position: its warps take the norms of its rows, a row each; then its threads add the rows up, a
// few channels each, frame after frame, while the rows are still in the cache.

#pragma once

#include "clustering/cuda/position_means.h"
#include "clustering/cuda/rows.cuh"
#include "clustering/cuda/segments.cuh"

namespace pruneops {

// One block: boundaries, and positions of the segments before each.
static __global__ void __launch_bounds__(kLayoutThreads)
    position_layout_kernel(CudaPositionMeansParams p) {
  __shared__ LayoutShared s;
  write_bounds(p.cu_seqlens, p.num_segments, p.x.total, p.bounds, s);
  sum_over_segments(
      p.num_segments, [&](int64_t b) { return at_least<int64_t>(p.num_positions[b], 0); },
      [&](int64_t b, int64_t sum) { p.offsets[b + 1] = sum; }, s);
  if (threadIdx.x == 0) p.offsets[0] = 0;
}

constexpr int kPositionThreads = 256;
constexpr int kPositionWarps = kPositionThreads / kWarpSize;
constexpr int kFramesInFlight = 4;  // that a thread loads before it adds the first
// The least norm that a row is divided by.
constexpr double kLeastNorm = 1e-12;

struct PositionShared {
  double of_warps[3][kPositionWarps];
};

// The rows of one position.
struct PositionRows {
  int64_t first;  // packed row
  int64_t pitch;  // rows from one frame to the next
  int64_t frames;
};

__device__ __forceinline__ double sum_of_warp(double value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Squared norm of a row, in every lane of the warp.
template <class T>
__device__ __forceinline__ double square_norm(const T* row, int64_t channels, bool vectors) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr int64_t kAtOnce = int64_t{kWarpSize} * kQuad;
  float sum = 0.0f;
  for (int64_t c = lane * int64_t{kQuad}; c < channels; c += kAtOnce) {
    const float4 x = as_floats(load_quad(row + c, channels - c, vectors));
    sum = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, sum))));
  }
  const double total = sum_of_warp(sum);
  if (total < 1e38) return total;
  // Not a number, or beyond the range of float.
  double wide = 0.0;
  for (int64_t c = lane * int64_t{kQuad}; c < channels; c += kAtOnce) {
    const float4 x = as_floats(load_quad(row + c, channels - c, vectors));
    wide += double{x.x} * x.x + double{x.y} * x.y + double{x.z} * x.z + double{x.w} * x.w;
  }
  return sum_of_warp(wide);
}

// Grid: positions.
template <class T>
__global__ void __launch_bounds__(kPositionThreads)
    position_means_kernel(CudaPositionMeansParams p, bool vectors) {
  __shared__ PositionShared s;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t slot = blockIdx.x;
  const int64_t b = first_ending_past(p.offsets + 1, p.num_segments, slot);
  const bool exists = b < p.num_segments;
  PositionRows rows{0, 1, 0};
  if (exists) {
    rows.first = p.bounds[b] + slot - p.offsets[b];
    rows.pitch = p.offsets[b + 1] - p.offsets[b];
    rows.frames = (p.bounds[b + 1] - p.bounds[b]) / rows.pitch;
  }

  // Lengths of the unit vectors as they are rounded, and the squares of these. What rounding does
  // to the square of the sum of the vectors, it does to both.
  double lengths = 0.0, squares = 0.0;
  for (int64_t w = warp; w < rows.frames; w += kPositionWarps) {
    const int64_t row = rows.first + w * rows.pitch;
    const double square = square_norm(row_of<T>(p.x, row), p.x.channels, vectors);
    const double norm = square < kLeastNorm * kLeastNorm ? kLeastNorm : sqrt(square);
    const float inverse = static_cast<float>(1.0 / norm);
    lengths += inverse * norm;
    squares += inverse * norm * (inverse * norm);
    if (lane == 0) p.inverse_norms[row] = inverse;
  }
  if (lane == 0) {
    s.of_warps[1][warp] = lengths;
    s.of_warps[2][warp] = squares;
  }
  __syncthreads();

  double square = 0.0;
  const float divisor = rows.frames > 1 ? static_cast<float>(rows.frames) : 1.0f;
  for (int64_t c = threadIdx.x * int64_t{kQuad}; c < p.x.channels; c += kPositionThreads * kQuad) {
    const int64_t count = p.x.channels - c;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f), unit = sum;
    for (int64_t w = 0; w < rows.frames; w += kFramesInFlight) {
      Quad<T> quads[kFramesInFlight];
      float inverse[kFramesInFlight];
#pragma unroll
      for (int i = 0; i < kFramesInFlight; ++i) {
        const int64_t row = rows.first + (w + i) * rows.pitch;
        const bool inside = w + i < rows.frames;
        quads[i] = inside ? load_quad(row_of<T>(p.x, row) + c, count, vectors) : Quad<T>{};
        inverse[i] = inside ? p.inverse_norms[row] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kFramesInFlight; ++i) {
        if (w + i >= rows.frames) continue;
        const float4 x = as_floats(quads[i]);
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
        unit.x = fmaf(inverse[i], x.x, unit.x);
        unit.y = fmaf(inverse[i], x.y, unit.y);
        unit.z = fmaf(inverse[i], x.z, unit.z);
        unit.w = fmaf(inverse[i], x.w, unit.w);
      }
    }
    square += fmaf(unit.x, unit.x, fmaf(unit.y, unit.y, fmaf(unit.z, unit.z, unit.w * unit.w)));
    T* out = static_cast<T*>(p.means) + slot * p.x.channels + c;
    store_quad(divided(sum, divisor), out, count, p.x.channels % kQuad == 0);
  }
  square = sum_of_warp(square);
  if (lane == 0) s.of_warps[0][warp] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sums[3] = {0.0, 0.0, 0.0};
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kPositionWarps; ++i) sums[k] += s.of_warps[k][i];
  }
  const double mean = (sums[0] - sums[2]) / (sums[1] * sums[1] - sums[2]);
  const float found =
      rows.frames < 2 ? __uint_as_float(0x7fc00000u) : static_cast<float>(mean);  // NaN
  p.similarity[slot] = exists ? found : 0.0f;
}

}  // namespace pruneops
