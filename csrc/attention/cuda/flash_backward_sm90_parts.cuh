// What the two sm_90a kernels of the backward pass share.

#pragma once

#include "attention/cuda/flash_backward.h"
#include "attention/cuda/flash_forward_sm90_block.cuh"
#include "attention/cuda/flash_products.cuh"
#include "attention/cuda/flash_tiles.h"
#include "common/cuda_math.cuh"

namespace pruneops {

// 128 threads feed, two warpgroups have 64 keys or packed rows each.
struct BackwardBlockSm90 {
  static constexpr int kConsumerRows = 64;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kFeederRegisters = 24, kConsumerRegisters = 240;
  static_assert(kFeederRegisters + kConsumers * kConsumerRegisters <=
                registers_to_share(1 + kConsumers));
};

// Packed tensors have no slots.
template <class Tile>
cudaError_t make_packed_map(TensorMap* map, const RowView& view, int64_t rows, int64_t heads) {
  return make_tensor_map<Tile>(map,
                               {view.data, 1, rows, heads, 0, view.row_stride, view.head_stride});
}

// An accumulator, rounded, as the left operands of products.
template <MmaType kType, int kColumns>
__device__ __forceinline__ void round_into_operands(const float (&d)[kColumns / 2],
                                                    uint32_t (&a)[kColumns / 16][4]) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[step][i] = pack_pair<kType>(d[8 * step + 2 * i], d[8 * step + 2 * i + 1]);
    }
    pin_registers(a[step]);
  }
}

// Begins d = rows of `left` from first_row on x all rows of `right`, transposed.
template <MmaType kType, class Left, class Right>
__device__ __forceinline__ void begin_rows_product(const unsigned char* left, int first_row,
                                                   const unsigned char* right,
                                                   float (&d)[Right::kRows / 2]) {
  fence_products(d);
#pragma unroll
  for (int step = 0; step < Left::kColumns / 16; ++step) {
    multiply<kType, Right::kRows, Operand::kRows>(d, rows_operand<Left>(left, first_row, step),
                                                  rows_operand<Right>(right, 0, step), step > 0);
  }
  commit_products();
}

// Begins d += a x `right`.
template <MmaType kType, class Right>
__device__ __forceinline__ void begin_sum(const uint32_t (&a)[Right::kRows / 16][4],
                                          const unsigned char* right,
                                          float (&d)[Right::kColumns / 2]) {
  fence_products(d);
#pragma unroll
  for (int step = 0; step < Right::kRows / 16; ++step) {
    multiply<kType, Right::kColumns, Operand::kColumns>(d, a[step],
                                                        columns_operand<Right>(right, step), true);
  }
  commit_products();
}

// Writes factor x the rows of a warpgroup below num_rows. Two neighbouring lanes exchange halves of
// 16 columns first, so that a lane has 4 columns in a row and 4 lanes 32 bytes.
//   row_of(r)  the first element of row r in global memory
template <MmaType kType, int kHeadDim, class RowOf>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 2], float factor,
                                           int num_rows, const RowOf& row_of) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = fragment_row(static_cast<int>(threadIdx.x) % kWarpgroup, 2 * half);
    const bool exists = r < num_rows;
    uint16_t* to = row_of(exists ? r : 0) + t % 2 * 8 + t / 2 * 4;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const float* left = d + 8 * i + 2 * half;
      const float* right = left + 4;
      const uint32_t own_left = pack_pair<kType>(left[0] * factor, left[1] * factor);
      const uint32_t own_right = pack_pair<kType>(right[0] * factor, right[1] * factor);
      const uint32_t other = __shfl_xor_sync(kAllLanes, t % 2 == 0 ? own_right : own_left, 1);
      const uint2 words = t % 2 == 0 ? uint2{own_left, other} : uint2{other, own_right};
      if (exists) *reinterpret_cast<uint2*>(to + 16 * i) = words;
    }
  }
}

}  // namespace pruneops
