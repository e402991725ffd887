// The feeding warps of the sm_90a forward pass.

#pragma once

#include "attention/cuda/flash_forward_sm90_block.cuh"
#include "common/cuda_async.cuh"

namespace pruneops {

// [1] How many items the blocks have taken beyond their first ones.
__device__ __forceinline__ unsigned* taken_items(const FlashForwardParams& p,
                                                 const FlashOrder& order) {
  return reinterpret_cast<unsigned*>(
      FlashSchedule(order.scratch, p.segments.num_segments).next_item);
}

// Warp 0: items, and keys and values of each in the order of their use, the last tile first.
template <int kHeadDim>
__device__ __forceinline__ void feed_keys(const FlashForwardParams& p, const FlashOrder& order,
                                          const TensorMap* k_map, const TensorMap* v_map,
                                          const ForwardSharedSm90<kHeadDim>& shared) {
  using Config = ForwardSm90<kHeadDim>;
  using KeyTile = typename Config::KeyTile;
  typename Config::Small& small = shared.small();
  const bool leads = threadIdx.x % kWarpSize == 0;
  if (leads) {
    prefetch_tensor_map(k_map);
    prefetch_tensor_map(v_map);
  }
  RingPosition<Config::kWorkStages> at_work;
  RingPosition<Config::kTile.stages> at;    // of keys and values alike
  uint32_t taken = blockIdx.x - gridDim.x;  // so that the first item is blockIdx.x
  while (true) {
    FlashTile tile;
    const bool any =
        find_tile(order, p.segments, p.heads, gridDim.x + __shfl_sync(kAllLanes, taken, 0), tile);
    ForwardWorkSm90& work = small.work[at_work.stage];
    if (leads) wait_for_phase(&small.work_empty[at_work.stage], at_work.parity ^ 1);
    if (!any) {
      if (leads) {
        work.tile.size = 0;
        arrive(&small.work_full[at_work.stage]);
      }
      return;
    }
    const PackedRows rows(tile.begin, p.heads.group);
    const Limits limits =
        limits_of(p.visibility, tile.segment, rows.first_query, end_of_queries(rows, tile.size));
    const KeyTiles keys = key_tiles(limits, Config::kTile.keys);
    if (leads) {
      work = {tile, rows, keys};
      arrive(&small.work_full[at_work.stage]);
    }
    at_work.advance();
    // Known by the time it is needed. Neither atomicAdd() nor a bound of ~0u, which ptxas would
    // gather over the warp and wait for; nothing is added here, which would wait too.
    if (leads) taken = atomicInc(taken_items(p, order), ~1u);
    for (int32_t i = keys.all; leads && i-- > 0; at.advance()) {
      const Segment& segment = tile.segment;
      const int32_t first = i * Config::kTile.keys;
      const RowsAt at_rows = {static_cast<int>(segment.k_begin) + first,
                              at_most(static_cast<int>(segment.k_len) - first, Config::kTile.keys),
                              tile.head_k, static_cast<int>(segment.slot)};
      wait_for_phase(&small.keys_empty[at.stage], at.parity ^ 1);
      arrive_expecting(&small.keys_full[at.stage], KeyTile::kBytes);
      load_rows_async<KeyTile>(shared.keys(at.stage), k_map, &small.keys_full[at.stage], at_rows);
      wait_for_phase(&small.values_empty[at.stage], at.parity ^ 1);
      arrive_expecting(&small.values_full[at.stage], KeyTile::kBytes);
      load_rows_async<KeyTile>(shared.values(at.stage), v_map, &small.values_full[at.stage],
                               at_rows);
    }
  }
}

// Warp 1 + consumer: the consumer's rows of the queries, zeros for rows that the tile does not
// have.
template <int kHeadDim>
__device__ __forceinline__ void feed_queries(const FlashForwardParams& p,
                                             const ForwardSharedSm90<kHeadDim>& shared,
                                             int consumer) {
  using Config = ForwardSm90<kHeadDim>;
  typename Config::Small& small = shared.small();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_row = consumer * Config::kConsumerRows;
  RingPosition<Config::kWorkStages> at_work;
  RingPosition<1> at;
  while (true) {
    wait_for_phase(&small.work_full[at_work.stage], at_work.parity);
    const ForwardWorkSm90& work = small.work[at_work.stage];
    if (work.tile.size == 0) return;
    if (work.keys.all > 0 && first_row < work.tile.size) {
      const PackedSource source =
          packed_source(p.q, work.tile.segment.q_begin, work.tile.head_k, work.rows);
      const int num_rows = work.tile.size;
      unsigned char* tile = shared.queries(consumer);
      wait_for_phase(&small.queries_empty[consumer], at.parity ^ 1);
      // Two lanes a row, 32 bytes at a time: whole sectors, and one address for all of a row.
#pragma unroll 1
      for (int row = lane / 2; row < Config::kConsumerRows; row += kWarpSize / 2) {
        const int first_column = lane % 2 * kChunkElements;
        const uint16_t* from = source.data + source.offset(first_row + row) + first_column;
#pragma unroll
        for (int column = 0; column < kHeadDim; column += 2 * kChunkElements) {
          copy_16_bytes_async(tile + Config::QueryTile::offset(row, first_column + column),
                              from + column, first_row + row < num_rows);
        }
      }
      commit_copies();
      wait_for_copies<0>();
      fence_async_proxy();
      arrive(&small.queries_full[consumer]);
      at.advance();
    }
    arrive_as_warp(&small.work_empty[at_work.stage]);
    at_work.advance();
  }
}

}  // namespace pruneops
