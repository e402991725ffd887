// dq on Hopper. A block holds a tile of packed rows of one key head, with their gradients of the
// output, and goes through the keys that they see.

#pragma once

#include "attention/cuda/flash_backward_sm90_parts.cuh"

namespace pruneops {

template <int kHeadDim>
struct QueryGradientsSm90 : BackwardBlockSm90 {
  static constexpr BackwardTileSm90 kTile = kQueryGradientTileSm90;
  static_assert(kTile.held == kConsumers * kConsumerRows);
  using Held = PanelTile<kConsumerRows, kHeadDim>;   // a warpgroup's queries or gradients
  using Streamed = PanelTile<kTile.step, kHeadDim>;  // keys or values
  static_assert(Held::kBytes % 1024 == 0 && Streamed::kBytes % 1024 == 0);

  struct Small {
    uint64_t full[kTile.stages], empty[kTile.stages];
  };
  static constexpr int kStagesBegin = 2 * kConsumers * Held::kBytes;
  static constexpr int kSmallBegin = kStagesBegin + 2 * kTile.stages * Streamed::kBytes;
  static constexpr int kSharedBytes = kSmallBegin + static_cast<int>(sizeof(Small));
  static_assert(kSharedBytes <= 227 << 10);

  unsigned char* begin;

  __device__ __forceinline__ unsigned char* queries(int consumer) const {
    return begin + 2 * consumer * Held::kBytes;
  }
  __device__ __forceinline__ unsigned char* gradients(int consumer) const {
    return queries(consumer) + Held::kBytes;
  }
  __device__ __forceinline__ unsigned char* keys(int stage) const {
    return begin + kStagesBegin + 2 * stage * Streamed::kBytes;
  }
  __device__ __forceinline__ unsigned char* values(int stage) const {
    return keys(stage) + Streamed::kBytes;
  }
  __device__ __forceinline__ Small& small() const {
    return *reinterpret_cast<Small*>(begin + kSmallBegin);
  }

  // By one thread, before all others begin.
  __device__ __forceinline__ void make_barriers() const {
    for (int i = 0; i < kTile.stages; ++i) {
      make_barrier(&small().full[i], 1);
      make_barrier(&small().empty[i], kConsumers * (kWarpgroup / kWarpSize));
    }
    publish_barriers();
  }
};

// One thread: the keys below `end`, and their values.
template <int kHeadDim>
__device__ __forceinline__ void feed_keys(const TensorMap* k_map, const TensorMap* v_map,
                                          const FlashTile& tile, int32_t end,
                                          const QueryGradientsSm90<kHeadDim>& block) {
  using Config = QueryGradientsSm90<kHeadDim>;
  using Streamed = typename Config::Streamed;
  typename Config::Small& small = block.small();
  RingPosition<Config::kTile.stages> at;
  for (int32_t key = 0; key < end; key += Streamed::kRows, at.advance()) {
    const RowsAt rows = {static_cast<int>(tile.segment.k_begin) + key,
                         at_most(static_cast<int>(tile.segment.k_len) - key, Streamed::kRows),
                         tile.head_k, 0};
    uint64_t* full = &small.full[at.stage];
    wait_for_phase(&small.empty[at.stage], at.parity ^ 1);
    arrive_expecting(full, 2 * Streamed::kBytes);
    load_rows_async<Streamed>(block.keys(at.stage), k_map, full, rows);
    load_rows_async<Streamed>(block.values(at.stage), v_map, full, rows);
  }
}

// Begins to copy 64 packed rows from first_row on, zeros for those from num_rows on. By a
// warpgroup.
template <class Tile>
__device__ __forceinline__ void load_packed_async(unsigned char* tile, const PackedSource& source,
                                                  int first_row, int num_rows) {
  constexpr int kChunks = Tile::kColumns / kChunkElements;
#pragma unroll 4
  for (int n = static_cast<int>(threadIdx.x) % kWarpgroup; n < Tile::kRows * kChunks;
       n += kWarpgroup) {
    const int row = n / kChunks, column = n % kChunks * kChunkElements;
    copy_16_bytes_async(tile + Tile::offset(row, column),
                        source.data + source.offset(first_row + row) + column,
                        first_row + row < num_rows);
  }
}

// One warpgroup: dq of its 64 rows.
//   end  of the keys that rows of the tile see
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void sum_over_keys(const FlashBackwardParams& p, const FlashTile& tile,
                                              const PackedRows& rows, int32_t end,
                                              const QueryGradientsSm90<kHeadDim>& block,
                                              int consumer) {
  using Config = QueryGradientsSm90<kHeadDim>;
  using Held = typename Config::Held;
  using Streamed = typename Config::Streamed;
  constexpr int kKeys = Config::kTile.step;
  typename Config::Small& small = block.small();
  const Segment& segment = tile.segment;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int strip = consumer * Config::kConsumerRows;
  const bool has_rows = strip < tile.size;
  unsigned char* queries = block.queries(consumer);
  unsigned char* gradients = block.gradients(consumer);
  FlashRowTerms terms[2] = {{INFINITY, 0.0f}, {INFINITY, 0.0f}};
  int32_t limits[2] = {0, 0};  // keys that rows g and g + 8 of the warp see
  if (has_rows && end > 0) {
    load_packed_async<Held>(queries, packed_source(p.q, segment.q_begin, tile.head_k, rows), strip,
                            tile.size);
    load_packed_async<Held>(gradients, packed_source(p.dout, segment.q_begin, tile.head_k, rows),
                            strip, tile.size);
    commit_copies();
    const int64_t first = (tile.head_k * p.segments.total_q + segment.q_begin) * p.heads.group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = strip + fragment_row(thread, 2 * half);
      if (r < tile.size) terms[half] = p.row_terms[first + tile.begin + r];
      limits[half] = limit_of_row(p.visibility, segment, rows, r, tile.size);
    }
    wait_for_copies<0>();
    fence_async_proxy();
    sync_named_barrier(1 + consumer, kWarpgroup);
  }
  const int32_t least = __reduce_min_sync(kAllLanes, at_most(limits[0], limits[1]));
  const float log2_scale = p.softmax_scale * kLog2OfE;
  float dq[kHeadDim / 2] = {};
  RingPosition<Config::kTile.stages> at;
  for (int32_t key = 0; key < end; key += kKeys, at.advance()) {
    wait_for_phase(&small.full[at.stage], at.parity);
    if (has_rows) {
      float s[kKeys / 2], ds[kKeys / 2];
      uint32_t factors[kKeys / 16][4];
      begin_rows_product<kType, Held, Streamed>(queries, 0, block.keys(at.stage), s);
      begin_rows_product<kType, Held, Streamed>(gradients, 0, block.values(at.stage), ds);
      wait_for_products<1>(s);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        s[i] = fast_exp2(fmaf(s[i], log2_scale, -terms[i / 2 % 2].log2_lse));
      }
      if (key + kKeys > least) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          if (key + fragment_column(thread, i) >= limits[i / 2 % 2]) s[i] = 0.0f;
        }
      }
      wait_for_products<0>(ds);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) ds[i] = s[i] * (ds[i] - terms[i / 2 % 2].delta);
      round_into_operands<kType, kKeys>(ds, factors);
      begin_sum<kType, Streamed>(factors, block.keys(at.stage), dq);
      wait_for_products<0>(dq);
    }
    arrive_as_warp(&small.empty[at.stage]);
  }
  store_rows<kType, kHeadDim>(dq, p.softmax_scale, tile.size - strip, [&](int r) {
    int query, head;
    rows.locate(strip + r, query, head);
    return element_of(p.dq, segment.q_begin + rows.first_query + query,
                      int64_t{tile.head_k} * rows.group + head);
  });
}

template <MmaType kType, int kHeadDim>
__global__ void __launch_bounds__(QueryGradientsSm90<kHeadDim>::kThreads, 1)
    flash_query_gradients_sm90_kernel(const __grid_constant__ FlashBackwardParams p,
                                      const __grid_constant__ FlashOrder order,
                                      const __grid_constant__ TensorMap k_map,
                                      const __grid_constant__ TensorMap v_map) {
  using Config = QueryGradientsSm90<kHeadDim>;
  PRUNEOPS_SWIZZLED_SHARED(memory);
  const Config block{{}, memory};
  FlashTile tile;
  if (!find_tile(order, p.segments, p.heads, blockIdx.x, tile)) return;
  if (threadIdx.x == 0) block.make_barriers();
  __syncthreads();
  const PackedRows rows(tile.begin, p.heads.group);
  const int32_t end =
      limits_of(p.visibility, tile.segment, rows.first_query, end_of_queries(rows, tile.size)).most;
  // The same in all lanes of a warp; the shuffle says so to the compiler.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp < kWarpgroup / kWarpSize) {
    give_registers<Config::kFeederRegisters>();
    if (threadIdx.x == 0) feed_keys<kHeadDim>(&k_map, &v_map, tile, end, block);
  } else {
    take_registers<Config::kConsumerRegisters>();
    sum_over_keys<kType, kHeadDim>(p, tile, rows, end, block, warp / (kWarpgroup / kWarpSize) - 1);
  }
}

}  // namespace pruneops
