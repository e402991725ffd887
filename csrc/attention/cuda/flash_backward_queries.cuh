// dq. A block holds a tile of packed rows of one key head, with their gradients of the output, and
// goes through the keys that they see.

#pragma once

#include "attention/cuda/flash_backward_weights.cuh"
#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_products.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/flash_tiles.h"
#include "common/cuda_math.cuh"

namespace pruneops {

template <int kHeadDim>
struct QueryGradients {
  static constexpr BackwardTileSm80 kTile = query_gradient_tile_sm80(kHeadDim);
  static constexpr int kRows = kTile.held, kKeys = kTile.step;
  static constexpr int kThreads = kRows / kStripRows * kWarpSize;

  struct alignas(kChunkBytes) Stage {  // filled while the other one is worked on
    uint16_t k[kKeys * kHeadDim], v[kKeys * kHeadDim];
  };
  struct Shared {
    uint16_t q[kRows * kHeadDim], dout[kRows * kHeadDim];
    Stage stages[2];
  };
  using Queries = Strip<kHeadDim, kTile.first_in_registers>;
  using Gradients = Strip<kHeadDim, kTile.second_in_registers>;
};

// What a lane knows of its two rows of the warp's strip, g and g + 8.
struct LaneRows {
  FlashRowTerms terms[2];
  int32_t limits[2];  // keys that they see, 0 for a row that the tile has not
  Limits of_warp;
};

__device__ __forceinline__ LaneRows lane_rows(const FlashBackwardParams& p, const FlashTile& tile,
                                              const PackedRows& rows, int strip) {
  const FlashRowTerms* terms =
      p.row_terms + (tile.head_k * p.segments.total_q + tile.segment.q_begin) * p.heads.group +
      tile.begin;
  LaneRows of;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = strip + static_cast<int>(threadIdx.x) % kWarpSize / 4 + 8 * half;
    of.terms[half] = {INFINITY, 0.0f};
    of.limits[half] = 0;
    if (r >= tile.size) continue;
    of.terms[half] = terms[r];
    of.limits[half] = limit_of_row(p.visibility, tile.segment, rows, r, tile.size);
  }
  of.of_warp = {__reduce_min_sync(kAllLanes, at_most(of.limits[0], of.limits[1])),
                __reduce_max_sync(kAllLanes, at_least(of.limits[0], of.limits[1]))};
  return of;
}

// p = exp2(scores - LSE), ds = -delta, which the products of dout and values are added to.
template <class Weights, int kKeys>
__device__ __forceinline__ void row_probabilities(const LaneRows& rows, float log2_scale,
                                                  float (&p)[kKeys / 8][4],
                                                  float (&ds)[kKeys / 8][4]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const FlashRowTerms& t = rows.terms[i / 2];
      p[n][i] = Weights::of_row(fast_exp2(fmaf(p[n][i], log2_scale, -t.log2_lse)), t.log2_lse);
      ds[n][i] = -t.delta;
    }
  }
}

// Zeros for keys that a row does not see.
template <int kKeys>
__device__ __forceinline__ void mask_keys(const LaneRows& rows, int first_key,
                                          float (&p)[kKeys / 8][4]) {
  const int key = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + 8 * n + i % 2 >= rows.limits[i / 2]) p[n][i] = 0.0f;
    }
  }
}

template <int kHeadDim, MmaType kType, class Weights = EqualKeys>
__global__ void __launch_bounds__(QueryGradients<kHeadDim>::kThreads, 2)
    flash_query_gradients_kernel(FlashBackwardParams p, FlashOrder order, Weights weights) {
  using Config = QueryGradients<kHeadDim>;
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kThreads = Config::kThreads;
  PRUNEOPS_DYNAMIC_SHARED(typename Config::Shared, shared);
  __shared__ typename Weights::template TileKeys<kKeys> tile_keys[2];
  FlashTile tile;
  if (!find_tile(order, p.segments, p.heads, blockIdx.x, tile)) return;
  const Segment& segment = tile.segment;
  const int thread = static_cast<int>(threadIdx.x);
  const int strip = thread / kWarpSize * kStripRows;  // the warp's first row in the tile
  const PackedRows rows(tile.begin, p.heads.group);
  const int end =
      limits_of(p.visibility, segment, rows.first_query, end_of_queries(rows, tile.size)).most;
  float dq[kHeadDim / 8][4] = {};
  if (end > 0) {
    const TileSource k = tile_source(p.k, 0, segment.k_begin, tile.head_k);
    const TileSource v = tile_source(p.v, 0, segment.k_begin, tile.head_k);
    const auto load = [&](int first_key, typename Config::Stage& stage) {
      const int num_keys = end - first_key;
      load_tile_async<kKeys, kHeadDim, kThreads>(
          stage.k, thread, num_keys, TileSource{k.data + first_key * k.stride, k.stride});
      load_tile_async<kKeys, kHeadDim, kThreads>(
          stage.v, thread, num_keys, TileSource{v.data + first_key * v.stride, v.stride});
    };
    // What this thread's key of a tile counts.
    const auto count_of = [&](int first_key) {
      const int key = first_key + thread;
      return thread < kKeys && key < end ? weights.count_of(segment.k_begin + key) : 0.0f;
    };
    load_tile_async<kRows, kHeadDim, kThreads>(
        shared->q, thread, tile.size, packed_source(p.q, segment.q_begin, tile.head_k, rows));
    load_tile_async<kRows, kHeadDim, kThreads>(
        shared->dout, thread, tile.size, packed_source(p.dout, segment.q_begin, tile.head_k, rows));
    load(0, shared->stages[0]);
    commit_copies();
    const LaneRows of_lane = lane_rows(p, tile, rows, strip);
    if (thread < kKeys) tile_keys[0].put(thread, count_of(0));
    wait_for_copies<0>();
    __syncthreads();
    const typename Config::Queries queries(shared->q, strip);
    const typename Config::Gradients gradients(shared->dout, strip);
    const float log2_scale = p.softmax_scale * kLog2OfE;
    for (int key = 0, current = 0; key < end; key += kKeys, current ^= 1) {
      const typename Config::Stage& stage = shared->stages[current];
      if (key + kKeys < end) load(key + kKeys, shared->stages[current ^ 1]);
      commit_copies();
      const float next_count = count_of(key + kKeys);
      if (key < of_lane.of_warp.most) {
        float probabilities[kKeys / 8][4] = {}, ds[kKeys / 8][4];
        add_scores<kType, kKeys, kHeadDim>(queries, stage.k, probabilities);
        row_probabilities<Weights, kKeys>(of_lane, log2_scale, probabilities, ds);
        const auto& counts = tile_keys[current];
        if (key + kKeys + Weights::kLastApart > of_lane.of_warp.least) {
          mask_keys<kKeys>(of_lane, key, probabilities);
          counts.template weigh<true>(of_lane.limits, key, probabilities);
        } else {
          counts.template weigh<false>(of_lane.limits, key, probabilities);
        }
        add_scores<kType, kKeys, kHeadDim>(gradients, stage.v, ds);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[n][i] *= probabilities[n][i];
        }
        add_weighted<kType, kKeys, kHeadDim>(ds, stage.k, dq);
      }
      if (thread < kKeys) tile_keys[current ^ 1].put(thread, next_count);
      wait_for_copies<0>();
      __syncthreads();
    }
  }

  round_into_strip<kType, kHeadDim>(dq, p.softmax_scale, shared->q, strip);
  store_strip<kHeadDim>(shared->q, strip, tile.size, [&](int r) {
    int query, head;
    rows.locate(r, query, head);
    return element_of(p.dq, segment.q_begin + rows.first_query + query,
                      int64_t{tile.head_k} * rows.group + head);
  });
}

}  // namespace pruneops
