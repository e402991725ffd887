// Softmax denominators on tensor cores: a block has a tile of packed rows of one key head and goes
// through the tiles of keys they see. Every lane keeps the denominators over its own keys; they
// meet at the end.

#pragma once

#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/scores.h"
#include "attention/cuda/tile_products.cuh"
#include "common/cuda_math.cuh"

namespace pruneops {

// Takes a chunk's products into the denominators of this lane's rows.
//   limits  keys that the rows see, counted from the chunk's first
template <bool kMasked>
__device__ __forceinline__ void add_exponents(ChunkProducts& products, float log2_scale,
                                              const int32_t (&limits)[kGroupsOfWarp][2],
                                              int32_t first_key,
                                              PartialLse (&state)[kGroupsOfWarp][2]) {
  const int own = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PartialLse& s = state[i][half];
      const int32_t seen = limits[i][half] - first_key - own;
      float max = s.max;
#pragma unroll
      for (int n = 0; n < kChunkRows / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = products[i][n][2 * half + j];
          x = kMasked && 8 * n + j >= seen ? -INFINITY : x * log2_scale;
          max = fmaxf(max, x);
        }
      }
      const float shift = shift_of(max);
      float sum = s.sum * fast_exp2(s.max - shift);
#pragma unroll
      for (int n = 0; n < kChunkRows / 8; ++n) {
        sum += fast_exp2(products[i][n][2 * half] - shift);
        sum += fast_exp2(products[i][n][2 * half + 1] - shift);
      }
      s = {max, sum};
    }
  }
}

//   order        of packed rows, in tiles of kHeldRows
//   softmax_lse  [num_heads_q, total_q] natural logarithms
template <int kHeadDim, MmaType kType>
__global__ void __launch_bounds__(kScoreThreads, 3)
    tile_lse_kernel(CudaScoreParams p, FlashSegments segments, FlashOrder order,
                    float* softmax_lse) {
  using Shared = ScoreShared<kHeadDim>;
  PRUNEOPS_DYNAMIC_SHARED(uint16_t, held_tile);
  uint16_t* slots = held_tile + Shared::kHeldElements;
  FlashTile tile;
  if (!find_tile(order, segments, p.heads, blockIdx.x, tile)) return;
  const Segment& segment = tile.segment;
  const PackedRows rows(tile.begin, p.heads.group);
  const KeyTiles tiles =
      key_tiles(limits_of(p.visibility, segment, rows.first_query, end_of_queries(rows, tile.size)),
                kStreamedRows);

  int32_t limits[kGroupsOfWarp][2];
  PartialLse state[kGroupsOfWarp][2];
#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      limits[i][half] = limit_of_row(p.visibility, segment, rows, held_row(i, half), tile.size);
      state[i][half] = {-INFINITY, 0.0f};
    }
  }
  if (tiles.all > 0) {
    HeldFragments<kHeadDim> held;
    TileSource keys = tile_source(p.k, 0, segment.k_begin, tile.head_k);
    int32_t keys_left = static_cast<int32_t>(segment.k_len);  // from the next load's first on
    const auto load = [&](int slot) {
      load_tile_async<kStreamedRows, kHeadDim, kScoreThreads>(
          slots + slot * Shared::kSlotElements, static_cast<int>(threadIdx.x), keys_left, keys);
      keys.data += kStreamedRows * keys.stride;
      keys_left -= kStreamedRows;
    };
    held.begin_load(held_tile, tile.size, packed_source(p.q, segment.q_begin, tile.head_k, rows));
    load(0);
    commit_copies();
    const float log2_scale = p.softmax_scale * kLog2OfE;
    for (int32_t j = 0; j < tiles.all; ++j) {
      wait_for_copies<0>();
      __syncthreads();  // the tile is there, and nobody reads the one before
      if (j == 0) held.take(held_tile);
      if (j + 1 < tiles.all) load((j + 1) % 2);
      commit_copies();
      const uint16_t* now = slots + j % 2 * Shared::kSlotElements;
#pragma unroll
      for (int chunk = 0; chunk < kChunksOfTile; ++chunk) {
        const int32_t first_key = j * kStreamedRows + chunk * kChunkRows;
        ChunkProducts products;
        held.template multiply<kType>(now, chunk * kChunkRows, products);
        if (j >= tiles.unmasked) {
          add_exponents<true>(products, log2_scale, limits, first_key, state);
        } else {
          add_exponents<false>(products, log2_scale, limits, first_key, state);
        }
      }
    }
    wait_for_copies<0>();
  }

#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PartialLse all = state[i][half];
#pragma unroll
      for (int flip = 1; flip < 4; flip *= 2) {
        PartialLse other;
        other.max = __shfl_xor_sync(kAllLanes, all.max, flip);
        other.sum = __shfl_xor_sync(kAllLanes, all.sum, flip);
        all = merge(all, other);
      }
      const int r = held_row(i, half);
      if (threadIdx.x % 4 != 0 || r >= tile.size) continue;
      int query, head;
      rows.locate(r, query, head);
      softmax_lse[(tile.head_k * p.heads.group + head) * p.total_q + segment.q_begin +
                  rows.first_query + query] = natural_lse(all.max, all.sum);
    }
  }
}

}  // namespace pruneops
