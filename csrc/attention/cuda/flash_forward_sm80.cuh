// Attention forward on tensor cores with mma.sync: a block has a tile of packed rows of one key
// head, goes through the tiles of keys that they see (flash_forward_sm80_keys.cuh) and writes their
// output.

#pragma once

#include "attention/cuda/flash_forward_sm80_keys.cuh"
#include "attention/cuda/flash_products.cuh"
#include "attention/cuda/flash_schedule.cuh"

namespace pruneops {

// What a block keeps in shared memory beside its tiles, so that the loop over keys need not hold it
// in registers.
template <int kRows>
struct ForwardShared {
  FlashTile tile;
  PackedRows rows;
  int32_t limits[kRows];       // keys that a row sees
  int64_t row_offsets[kRows];  // in elements from the rows' first query and head; of q, then of out
  float lse[kRows];
};

// Divides by the sums and writes the LSE, and the output by way of the warp's own rows of q_tile,
// so that whole chunks leave for global memory.
//   first_row  of the warp in the tile
template <int kHeadDim, MmaType kType, int kRows>
__device__ __forceinline__ void store_rows(const FlashForwardParams& p, int first_row,
                                           const ForwardState<kHeadDim>& state,
                                           ForwardShared<kRows>& shared, uint16_t* q_tile) {
  using Config = ForwardSm80<kHeadDim>;
  using Layout = TileLayout<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first_row + 16 * i + 8 * half + lane / 4;
      float sum = state.sum[i][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) shared.lse[r] = natural_lse(state.max[i][half], sum);
      const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        const float* pair = state.out[i][d] + 2 * half;
        uint32_t* to = static_cast<uint32_t*>(byte_of(q_tile, Layout::offset(r, d))) + lane % 4;
        *to = pack_pair<kType>(pair[0] * inverse, pair[1] * inverse);
      }
    }
  }
  static_assert(Config::kWarpRows == kWarpSize, "a lane has one row to look up");
  const FlashTile& tile = shared.tile;
  const int own = first_row + lane;
  const PackedSource out = packed_source(p.out, tile.segment.q_begin, tile.head_k, shared.rows);
  shared.row_offsets[own] = out.offset(own);
  __syncwarp();
  if (own < tile.size) {
    int query, head;
    shared.rows.locate(own, query, head);
    p.softmax_lse[(tile.head_k * p.heads.group + head) * p.segments.total_q + tile.segment.q_begin +
                  shared.rows.first_query + query] = shared.lse[own];
  }
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
    store_strip<kHeadDim>(q_tile, first_row + kStripRows * i, tile.size,
                          [&](int r) { return out.data + shared.row_offsets[r]; });
  }
}

template <int kHeadDim, MmaType kType>
__global__ void __launch_bounds__(ForwardSm80<kHeadDim>::kThreads, 2)
    flash_forward_sm80_kernel(FlashForwardParams p, FlashOrder order) {
  using Config = ForwardSm80<kHeadDim>;
  PRUNEOPS_DYNAMIC_SHARED(uint16_t, q_tile);
  __shared__ ForwardShared<Config::kTile.rows> shared;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kWarpSize) {
    FlashTile found;
    if (!find_tile(order, p.segments, p.heads, blockIdx.x, found)) found.size = 0;
    if (thread == 0) {
      shared.tile = found;
      if (found.size > 0) shared.rows = PackedRows(found.begin, p.heads.group);
    }
  }
  __syncthreads();
  const int num_rows = shared.tile.size, first_row = thread / kWarpSize * Config::kWarpRows;
  if (num_rows == 0) return;

  const Segment segment = shared.tile.segment;
  const PackedRows rows = shared.rows;
  const KeyTiles tiles =
      key_tiles(limits_of(p.visibility, segment, rows.first_query, end_of_queries(rows, num_rows)),
                Config::kTile.keys);
  ForwardState<kHeadDim> state;
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.max[i][half] = -INFINITY;
      state.sum[i][half] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
      for (float& x : state.out[i][d]) x = 0.0f;
    }
  }

  if (tiles.all > 0) {
    const int64_t head_k = shared.tile.head_k;
    const PackedSource q = packed_source(p.q, segment.q_begin, head_k, rows);
    shared.row_offsets[thread] = q.offset(thread);
    shared.limits[thread] = limit_of_row(p.visibility, segment, rows, thread, num_rows);
    __syncthreads();
    load_tile_async<Config::kTile.rows, kHeadDim, Config::kThreads>(
        q_tile, thread, num_rows,
        [&](int r, int further) { return q.data + shared.row_offsets[r + further]; });
    KeyValueRing<kHeadDim> ring(
        q_tile + Config::kRowElements, tile_source(p.k, segment.slot, segment.k_begin, head_k),
        tile_source(p.v, segment.slot, segment.k_begin, head_k),
        at_most(static_cast<int32_t>(segment.k_len), tiles.all * Config::kTile.keys));
    wait_for_copies<Config::kTile.slots - 2>();
    __syncthreads();
    if (p.softmax_scale < 0.0f) negate_rows<kHeadDim>(q_tile);
    const LaneOffset<kHeadDim> q_lane = lane_down_first<kHeadDim>(first_row);
    const LaneOffset<kHeadDim> k_lane = lane_across_first<kHeadDim>(0);
    const LaneOffset<kHeadDim> v_lane = lane_down_first<kHeadDim>(0);
    uint32_t queries[Config::kGroups][Config::kDepths][4];
    take_queries<kHeadDim>(q_tile, q_lane, queries);
    const float log2_scale = log2_scale_of(p.softmax_scale);
    const bool has_rows = first_row < num_rows;  // of this warp
    for (int32_t j = 0; j < tiles.all; ++j) {
      uint32_t weights[Config::kGroups][Config::kKeySteps][4];
      const uint16_t* k_tile = ring.next(false);
      if (has_rows) {
        float scores[Config::kGroups][Config::kTile.keys / 8][4];
        score_products<kHeadDim, kType>(queries, q_tile, q_lane, k_tile, k_lane, scores);
        if (j >= tiles.unmasked) {
          mask_scores<Config::kTile.keys>(shared.limits + first_row, j * Config::kTile.keys,
                                          scores);
        }
        softmax_step<kHeadDim, kType>(log2_scale, scores, state, weights);
      }
      const uint16_t* v_tile = ring.next(true);
      if (has_rows) add_values<kHeadDim, kType>(weights, v_tile, v_lane, state);
    }
    wait_for_copies<0>();
  }
  if (first_row < num_rows) store_rows<kHeadDim, kType>(p, first_row, state, shared, q_tile);
}

template <int kHeadDim>
cudaError_t launch_flash_forward_sm80(const FlashForwardParams& p, const FlashDevice&,
                                      cudaStream_t stream) {
  using Config = ForwardSm80<kHeadDim>;
  if (p.segments.total_q == 0) return cudaSuccess;
  const FlashOrder order = {false, Config::kTile.rows, static_cast<int32_t>(p.heads.group),
                            p.schedule};
  const cudaError_t error = launch_flash_schedule(p.segments, &order, 1, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(
      flash_blocks(p.heads.num_heads_k, p.segments.total_q, p.segments.num_segments, order));
  const auto kernel = p.q.type == FloatType::kBFloat16
                          ? flash_forward_sm80_kernel<kHeadDim, MmaType::kBFloat16>
                          : flash_forward_sm80_kernel<kHeadDim, MmaType::kFloat16>;
  return launch_kernel(kernel, grid, dim3(Config::kThreads), Config::kSharedBytes, stream, p,
                       order);
}

}  // namespace pruneops
