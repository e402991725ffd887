// The two products that attention is made of, by one warp with 16 rows of its own: rows times rows
// of another tile (scores), and weights of that tile's rows times those rows. A tile of 16 x n
// floats lies in n / 8 fragments, see mma_16x8x16.

#pragma once

#include <type_traits>

#include "attention/cuda/flash_shared.cuh"
#include "common/cuda_mma.cuh"

namespace pruneops {

constexpr int kStripRows = 16;

// The 16 rows of a warp, read from shared memory with each product.
template <int kHeadDim>
struct StoredStrip {
  const uint16_t* tile;  // [rows, head_dim]
  LaneOffset<kHeadDim> lane;

  __device__ __forceinline__ StoredStrip(const uint16_t* tile, int first_row)
      : tile(tile), lane(lane_down_first<kHeadDim>(first_row)) {}

  // Columns [16 * step, 16 * step + 16).
  __device__ __forceinline__ void get(int step, uint32_t (&a)[4]) const {
    load_matrices(a, byte_of(tile, lane(0, 2 * step)));
  }
};

// The same rows, read once and kept in registers, head_dim / 4 of them.
template <int kHeadDim>
struct HeldStrip {
  uint32_t words[kHeadDim / 16][4];

  __device__ __forceinline__ HeldStrip(const uint16_t* tile, int first_row) {
    const LaneOffset<kHeadDim> lane = lane_down_first<kHeadDim>(first_row);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      load_matrices(words[step], byte_of(tile, lane(0, 2 * step)));
  }

  __device__ __forceinline__ void get(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[step][i];
  }
};

// Held where registers allow it.
template <int kHeadDim, bool kHeld>
using Strip = std::conditional_t<kHeld, HeldStrip<kHeadDim>, StoredStrip<kHeadDim>>;

// out[16, kOther] += (rows of the warp) x (rows of the other tile)^T
//   other  [kOther, head_dim]
template <MmaType kType, int kOther, int kHeadDim, class RowsOfWarp>
__device__ __forceinline__ void add_scores(const RowsOfWarp& strip, const uint16_t* other,
                                           float (&out)[kOther / 8][4]) {
  const LaneOffset<kHeadDim> lane = lane_across_first<kHeadDim>(0);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    strip.get(step, a);
#pragma unroll
    for (int n = 0; n < kOther / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, byte_of(other, lane(16 * n, 2 * step)));
      mma_16x8x16<kType>(out[2 * n], a, {b[0], b[1]});
      mma_16x8x16<kType>(out[2 * n + 1], a, {b[2], b[3]});
    }
  }
}

// out[16, head_dim] += (weights, rounded to the dtype) x (rows of the other tile)
//   weights  [16, kOther]    other  [kOther, head_dim]
template <MmaType kType, int kOther, int kHeadDim>
__device__ __forceinline__ void add_weighted(const float (&weights)[kOther / 8][4],
                                             const uint16_t* other, float (&out)[kHeadDim / 8][4]) {
  const LaneOffset<kHeadDim> lane = lane_down_first<kHeadDim>(0);
#pragma unroll
  for (int step = 0; step < kOther / 16; ++step) {
    // Two fragments of a result, side by side, are one of a left operand.
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &weights[2 * step + i / 2][i % 2 * 2];
      a[i] = pack_pair<kType>(pair[0], pair[1]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, byte_of(other, lane(16 * step, 2 * n)));
      mma_16x8x16<kType>(out[2 * n], a, {b[0], b[1]});
      mma_16x8x16<kType>(out[2 * n + 1], a, {b[2], b[3]});
    }
  }
}

// Rounds the warp's result into rows [first_row, first_row + 16) of a tile, from where
// store_strip() below takes it. Nobody else uses these rows.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void round_into_strip(const float (&x)[kHeadDim / 8][4], float factor,
                                                 uint16_t* tile, int first_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = first_row + lane / 4;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = TileLayout<kHeadDim>::offset(row + 8 * i, n) + lane % 4 * 4;
      *static_cast<uint32_t*>(byte_of(tile, at)) =
          pack_pair<kType>(x[n][2 * i] * factor, x[n][2 * i + 1] * factor);
    }
  }
}

// The first element of a row of a head.
__device__ __forceinline__ uint16_t* element_of(const RowView& view, int64_t row, int64_t head) {
  return static_cast<uint16_t*>(view.data) + row * view.row_stride + head * view.head_stride;
}

// Rows [first_row, first_row + 16) of a tile, those below num_rows, to global memory, 16 bytes at a
// time, by the warp that wrote them.
//   row_of(r)  the first element of row r in global memory
template <int kHeadDim, class RowOf>
__device__ __forceinline__ void store_strip(const uint16_t* tile, int first_row, int num_rows,
                                            const RowOf& row_of) {
  using Layout = TileLayout<kHeadDim>;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kStripRows * Layout::kChunks / 32; ++i) {
    const int n = static_cast<int>(threadIdx.x) % 32 + i * 32;
    const int row = first_row + n / Layout::kChunks, chunk = n % Layout::kChunks;
    if (row >= num_rows) continue;
    const uint4 words = *static_cast<const uint4*>(byte_of(tile, Layout::offset(row, chunk)));
    *reinterpret_cast<uint4*>(row_of(row) + chunk * kChunkElements) = words;
  }
}

}  // namespace pruneops
