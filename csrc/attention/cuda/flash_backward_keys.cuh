// dk and dv. A block holds a tile of keys and values and goes through the rows that see any of
// them, all heads of the group among them. Scores are made with keys as their rows: what a warp
// computes is at once the left operand of its sums, and P and dS never leave its registers.

#pragma once

#include "attention/cuda/flash_backward_weights.cuh"
#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_products.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/flash_tiles.h"
#include "common/cuda_math.cuh"

namespace pruneops {

// The packed rows of a key head from one tile of them on.
struct RowsLeft {
  PackedRows rows;
  int64_t count;
  Limits limits;  // of the first tile

  __device__ __forceinline__ int in_tile(int tile) const {
    return static_cast<int>(at_most<int64_t>(count, tile));
  }

  // Goes on, tile by tile, to the first one of which a row sees a key from first_key on; false if
  // there is none. By a whole warp.
  __device__ __forceinline__ bool find_seeing(const Visibility& visibility, const Segment& segment,
                                              int tile, int64_t first_key) {
    for (; count > 0; next(tile)) {
      limits =
          limits_of(visibility, segment, rows.first_query, end_of_queries(rows, in_tile(tile)));
      if (limits.most > first_key) return true;
    }
    return false;
  }

  __device__ __forceinline__ void next(int tile) {
    int queries, head;
    rows.locate(tile, queries, head);
    rows.first_query += queries;
    rows.first_head = head;
    count -= tile;
  }
};

// From the first query on that may see key first_key of the segment.
__device__ __forceinline__ RowsLeft rows_from(const Visibility& visibility, const Segment& segment,
                                              int64_t group, int64_t first_key) {
  int64_t query = 0;
  if (visibility.causal && visibility.kv_limit == nullptr) {
    query = at_least<int64_t>(first_key - (segment.k_len - segment.q_len), 0);
  }
  return {PackedRows(query * group, group), (segment.q_len - query) * group, {}};
}

template <int kHeadDim>
struct KeyGradients {
  static constexpr BackwardTileSm80 kTile = key_gradient_tile_sm80(kHeadDim);
  static constexpr int kKeys = kTile.held, kRows = kTile.step;
  static constexpr int kThreads = kKeys / kStripRows * kWarpSize;
  // Row terms lie 8 bytes apart and are copied 16 at a time: one more pair covers an odd beginning.
  static constexpr int kTermPairs = kRows / 2 + 1;

  struct alignas(kChunkBytes) Stage {  // filled while the other one is worked on
    uint16_t q[kRows * kHeadDim], dout[kRows * kHeadDim];
    FlashRowTerms terms[2 * kTermPairs];
    int32_t limits[kRows];  // keys of the segment that the rows see, if one does not see them all
    RowsLeft left;
  };
  struct Shared {  // with what the loop needs now and then, to spare registers
    uint16_t k[kKeys * kHeadDim], v[kKeys * kHeadDim];
    Stage stages[2];
    FlashTile tile;
  };
  using Keys = Strip<kHeadDim, kTile.first_in_registers>;
  using Values = Strip<kHeadDim, kTile.second_in_registers>;

  // Begins to load the first tile of what is left.
  template <class Weights>
  static __device__ __forceinline__ void load(const FlashBackwardParams& p, const FlashTile& tile,
                                              const RowsLeft& left, Stage& stage) {
    const int thread = static_cast<int>(threadIdx.x), num_rows = left.in_tile(kRows);
    const int64_t q_begin = tile.segment.q_begin;
    load_tile_async<kRows, kHeadDim, kThreads>(stage.q, thread, num_rows,
                                               packed_source(p.q, q_begin, tile.head_k, left.rows));
    load_tile_async<kRows, kHeadDim, kThreads>(
        stage.dout, thread, num_rows, packed_source(p.dout, q_begin, tile.head_k, left.rows));
    const int64_t end = end_of_terms(p, tile), pair = ((end - left.count) / 2 + thread) * 2;
    if (thread < kTermPairs) {
      copy_16_bytes_async(stage.terms + 2 * thread, p.row_terms + pair, pair < end);
    }
    if (thread == 0) stage.left = left;
    if (thread < kRows && masks<Weights>(left, tile.begin + kKeys)) {
      stage.limits[thread] =
          thread < num_rows ? limit_of_row(p.visibility, tile.segment, left.rows, thread, num_rows)
                            : 0;
    }
  }

  // Whether there is a row, or a place of one, in the first tile that does not see all keys up to
  // `end`, or whose last one may be looked at apart among them.
  template <class Weights>
  static __device__ __forceinline__ bool masks(const RowsLeft& left, int64_t end) {
    return left.count < kRows || left.limits.least < end + Weights::kLastApart;
  }

  // Where the row terms of the tile's segment end.
  static __device__ __forceinline__ int64_t end_of_terms(const FlashBackwardParams& p,
                                                         const FlashTile& tile) {
    const Segment& segment = tile.segment;
    return (tile.head_k * p.segments.total_q + segment.q_begin + segment.q_len) * p.heads.group;
  }
};

// p = exp2(scores - LSE), ds = -delta, which the products of dout and values are added to.
//   terms  of the tile's rows, the columns of p
template <class Weights, int kRows>
__device__ __forceinline__ void column_probabilities(const FlashRowTerms* terms, float log2_scale,
                                                     float (&p)[kRows / 8][4],
                                                     float (&ds)[kRows / 8][4]) {
  terms += threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const FlashRowTerms t = terms[8 * n + e];
#pragma unroll
      for (int i = e; i < 4; i += 2) {
        p[n][i] = Weights::of_row(fast_exp2(fmaf(p[n][i], log2_scale, -t.log2_lse)), t.log2_lse);
        ds[n][i] = -t.delta;
      }
    }
  }
}

// Zeros for the rows that do not see a key.
//   limits  of the tile's rows, the columns of p    first_key  of the warp, counted as the limits
template <int kRows>
__device__ __forceinline__ void mask_columns(const int32_t* limits, int first_key,
                                             float (&p)[kRows / 8][4], float (&ds)[kRows / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int key = first_key + lane / 4;
  limits += lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + i / 2 * 8 >= limits[8 * n + i % 2]) p[n][i] = ds[n][i] = 0.0f;
    }
  }
}

template <int kHeadDim, MmaType kType, class Weights = EqualKeys>
__global__ void __launch_bounds__(KeyGradients<kHeadDim>::kThreads, 2)
    flash_key_gradients_kernel(FlashBackwardParams p, FlashOrder order, Weights weights) {
  using Config = KeyGradients<kHeadDim>;
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kThreads = Config::kThreads;
  PRUNEOPS_DYNAMIC_SHARED(typename Config::Shared, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int strip = thread / kWarpSize * kStripRows;  // the warp's first key in the tile
  bool more;
  {
    FlashTile tile;
    if (!find_tile(order, p.segments, p.heads, blockIdx.x, tile)) return;
    const Segment& segment = tile.segment;
    const int64_t first_key = segment.k_begin + tile.begin;
    load_tile_async<kKeys, kHeadDim, kThreads>(shared->k, thread, tile.size,
                                               tile_source(p.k, 0, first_key, tile.head_k));
    load_tile_async<kKeys, kHeadDim, kThreads>(shared->v, thread, tile.size,
                                               tile_source(p.v, 0, first_key, tile.head_k));
    RowsLeft left = rows_from(p.visibility, segment, p.heads.group, tile.begin);
    more = left.find_seeing(p.visibility, segment, kRows, tile.begin);
    if (more) Config::template load<Weights>(p, tile, left, shared->stages[0]);
    commit_copies();
    if (thread == 0) shared->tile = tile;
    wait_for_copies<0>();
    __syncthreads();
  }
  const FlashTile& tile = shared->tile;
  const typename Config::Keys keys(shared->k, strip);
  const typename Config::Values values(shared->v, strip);
  const int first_key = static_cast<int>(tile.begin) + strip;  // of the warp
  const float log2_scale = p.softmax_scale * kLog2OfE;
  typename Weights::LaneKeys lane_keys(weights, tile, strip);
  float dk[kHeadDim / 8][4] = {}, dv[kHeadDim / 8][4] = {};
  for (int current = 0; more; current ^= 1) {
    const typename Config::Stage& stage = shared->stages[current];
    RowsLeft next = stage.left;
    next.next(kRows);
    more = next.find_seeing(p.visibility, tile.segment, kRows, tile.begin);
    if (more) Config::template load<Weights>(p, tile, next, shared->stages[current ^ 1]);
    commit_copies();
    // Nobody sees the keys of the last warps of a tile on the diagonal or at the end of a segment.
    if (first_key < stage.left.limits.most) {
      float probabilities[kRows / 8][4] = {}, ds[kRows / 8][4];
      add_scores<kType, kRows, kHeadDim>(keys, stage.q, probabilities);
      const int odd = static_cast<int>(Config::end_of_terms(p, tile) - stage.left.count) & 1;
      column_probabilities<Weights, kRows>(stage.terms + odd, log2_scale, probabilities, ds);
      add_scores<kType, kRows, kHeadDim>(values, stage.dout, ds);
      if (Config::template masks<Weights>(stage.left, first_key + kStripRows)) {
        mask_columns<kRows>(stage.limits, first_key, probabilities, ds);
        lane_keys.template weigh<true, kRows>(stage.limits, first_key, probabilities, ds);
      } else {
        lane_keys.template weigh<false, kRows>(stage.limits, first_key, probabilities, ds);
      }
      add_weighted<kType, kRows, kHeadDim>(probabilities, stage.dout, dv);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[n][i] *= probabilities[n][i];
      }
      add_weighted<kType, kRows, kHeadDim>(ds, stage.q, dk);
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  lane_keys.template finish<kHeadDim>(weights, p, tile, strip, dv);
  round_into_strip<kType, kHeadDim>(dk, p.softmax_scale, shared->k, strip);
  round_into_strip<kType, kHeadDim>(dv, 1.0f, shared->v, strip);
  const int64_t row = tile.segment.k_begin + tile.begin;
  store_strip<kHeadDim>(shared->k, strip, tile.size,
                        [&](int key) { return element_of(p.dk, row + key, tile.head_k); });
  store_strip<kHeadDim>(shared->v, strip, tile.size,
                        [&](int key) { return element_of(p.dv, row + key, tile.head_k); });
}

}  // namespace pruneops
