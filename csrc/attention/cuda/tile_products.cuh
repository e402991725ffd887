// What the score kernels on tensor cores share: a block keeps kHeldRows rows in registers, goes
// through tiles of kStreamedRows other rows and gets their products, kHeldRows x kStreamedRows
// scores. No score outlives its tile.
//
// A warp has 32 of the held rows, so that each fragment of the others is read from shared memory
// for two products, and takes 32 of the others at a time, which bounds the registers of products.
// The held rows lie in shared memory only on their way to registers, and there every warp copies
// its own.

#pragma once

#include "attention/cuda/flash_shared.cuh"
#include "common/cuda_block.cuh"
#include "common/cuda_mma.cuh"

namespace pruneops {

constexpr int kHeldRows = 128;
constexpr int kStreamedRows = 64;
constexpr int kRowsOfWarp = 32;
constexpr int kGroupsOfWarp = kRowsOfWarp / 16;
constexpr int kChunkRows = 32;  // of the streamed ones, whose products are in registers at a time
constexpr int kChunksOfTile = kStreamedRows / kChunkRows;
constexpr int kScoreThreads = kHeldRows / kRowsOfWarp * kWarpSize;

template <int kHeadDim>
struct ScoreShared {
  static constexpr int kHeldElements = kHeldRows * kHeadDim;
  static constexpr int kSlotElements = kStreamedRows * kHeadDim;
  // The held rows, and two tiles of the others: one being read, the other on its way.
  static constexpr int kBytes = 2 * (kHeldElements + 2 * kSlotElements);
};

// Products of a warp's rows with a chunk of the others: lane 4 g + t has those of held row
// 16 i + 8 half + g and streamed row 8 n + 2 t + j as [i][n][2 half + j].
using ChunkProducts = float[kGroupsOfWarp][kChunkRows / 8][4];

__device__ __forceinline__ void set_zero(ChunkProducts& products) {
#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int n = 0; n < kChunkRows / 8; ++n) {
#pragma unroll
      for (float& x : products[i][n]) x = 0.0f;
    }
  }
}

// The held rows of a warp.
template <int kHeadDim>
struct HeldFragments {
  uint32_t words[kGroupsOfWarp][kHeadDim / 16][4];

  // Begins to copy the warp's rows, each lane the chunks whose addresses it will name in take():
  // two lanes have 32 bytes of a row side by side, and what they compute for it once serves all.
  //   held    [kHeldRows, head_dim]    num_rows  of the block
  //   row_of  as in load_tile_async, of the block's rows
  template <class RowOf>
  __device__ __forceinline__ static void begin_load(uint16_t* held, int num_rows,
                                                    const RowOf& row_of) {
    const LaneOffset<kHeadDim> lane = lane_down_first<kHeadDim>(first_row());
    const int row = first_row() + static_cast<int>(threadIdx.x) % 16;
    const int chunk = static_cast<int>(threadIdx.x) % kWarpSize / 16;
#pragma unroll
    for (int i = 0; i < kGroupsOfWarp; ++i) {
      const uint16_t* from = row_of(row, 16 * i) + chunk * kChunkElements;
#pragma unroll
      for (int depth = 0; depth < kHeadDim / 16; ++depth) {
        copy_16_bytes_async(byte_of(held, lane(16 * i, 2 * depth)), from + 16 * depth,
                            row + 16 * i < num_rows);
      }
    }
  }

  // Takes the rows, behind a barrier after their arrival; then their shared memory is free.
  __device__ __forceinline__ void take(const uint16_t* held) {
    const LaneOffset<kHeadDim> lane = lane_down_first<kHeadDim>(first_row());
#pragma unroll
    for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
      for (int depth = 0; depth < kHeadDim / 16; ++depth)
        load_matrices(words[i][depth], byte_of(held, lane(16 * i, 2 * depth)));
    }
    __syncwarp();
  }

  // Products with rows [first, first + kChunkRows) of a tile.
  template <MmaType kType>
  __device__ __forceinline__ void multiply(const uint16_t* tile, int first,
                                           ChunkProducts& products) const {
    const LaneOffset<kHeadDim> lane = lane_across_first<kHeadDim>(first);
    set_zero(products);
#pragma unroll
    for (int depth = 0; depth < kHeadDim / 16; ++depth) {
#pragma unroll
      for (int n = 0; n < kChunkRows / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, byte_of(tile, lane(16 * n, 2 * depth)));
#pragma unroll
        for (int i = 0; i < kGroupsOfWarp; ++i) {
          mma_16x8x16<kType>(products[i][2 * n], words[i][depth], {b[0], b[1]});
          mma_16x8x16<kType>(products[i][2 * n + 1], words[i][depth], {b[2], b[3]});
        }
      }
    }
  }

  // Of the block's rows, that group 0 of this lane's warp begins with.
  __device__ __forceinline__ static int first_row() {
    return static_cast<int>(threadIdx.x) / kWarpSize * kRowsOfWarp;
  }
};

// Among the block's held rows, the one of this lane in a group and half.
__device__ __forceinline__ int held_row(int i, int half) {
  const int thread = static_cast<int>(threadIdx.x);
  return thread / kWarpSize * kRowsOfWarp + 16 * i + 8 * half + thread % kWarpSize / 4;
}

}  // namespace pruneops
