// Policy attention forward with mma.sync: causal attention of a tile of packed rows as in
// flash_forward_sm80.cuh, in which keys count what the policy says.
//
// What a key counts is part of its exponent, log2 |policy|, and exponents are taken against the
// largest of those: so no probability is more than 1, the largest is 1, and rounding them to the
// dtype costs no more than in plain attention, however far above them a dropped key may score. The
// largest score of all keys is kept beside it; it comes in with epsilon, at the end.

#pragma once

#include "attention/cuda/flash_forward_sm80_keys.cuh"
#include "attention/cuda/flash_policy.h"
#include "attention/cuda/flash_products.cuh"
#include "attention/cuda/flash_schedule.cuh"

namespace pruneops {

// What the keys of a tile count.
template <int kTileKeys>
struct KeyCounts {
  alignas(8) float log2_size[kTileKeys];     // -inf for a key that is dropped
  uint32_t negative[kTileKeys / kWarpSize];  // a bit a key
};

// What a block keeps in shared memory beside its tiles. Whatever the loop over keys asks for only
// once a tile is here too, for there is no register to spare.
template <int kHeadDim>
struct PolicyForwardShared {
  static constexpr int kRows = ForwardSm80<kHeadDim>::kTile.rows;
  FlashTile tile;
  PackedRows rows;
  KeyTiles tiles;              // `unmasked` ones have no row's own key, nor later ones
  const float* value_sums;     // [head_dim] of the segment and key head; null without a segment
  int32_t limits[kRows];       // keys that a row sees, the last of them its own
  int64_t row_offsets[kRows];  // as in ForwardShared
  float max[kRows], sum[kRows];
  // [i][half] largest score so far, of a thread's columns
  float most[2][2][ForwardSm80<kHeadDim>::kThreads];
  KeyCounts<ForwardSm80<kHeadDim>::kTile.keys> counts;  // of the tile whose turn it is
};

// By threads [0, kTileKeys), whole warps; `policy` is that of the thread's key.
template <int kTileKeys>
__device__ __forceinline__ void put_counts(float policy, KeyCounts<kTileKeys>& counts) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned negative = __ballot_sync(kAllLanes, policy < 0.0f);
  counts.log2_size[thread] = log2f(fabsf(policy));
  if (thread % kWarpSize == 0) counts.negative[thread / kWarpSize] = negative;
}

// Among this lane's columns 8 n + 2 t + e of a tile, the number 8 n + e that a row's own key would
// have; negative if it lies before them.
//   limits  of the warp's rows
__device__ __forceinline__ int32_t own_column(const int32_t* limits, int32_t first_key, int i,
                                              int half) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return limits[16 * i + 8 * half + lane / 4] - 1 - first_key - lane % 4 * 2;
}

// Scores become exponents of 2 in which keys count what they count; -inf for those after the row's
// own.
//   kHasOwn  whether a row of the block may have its own key in the tile, or all keys before it
template <int kHeadDim, bool kHasOwn>
__device__ __forceinline__ void weigh_scores(
    PolicyForwardShared<kHeadDim>& shared, int first_row, int32_t first_key, float log2_scale,
    float (&scores)[2][ForwardSm80<kHeadDim>::kTile.keys / 8][4]) {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t own[2][2];
  float most[2][2];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    most[r / 2][r % 2] = shared.most[r / 2][r % 2][thread];
    if constexpr (kHasOwn) {
      own[r / 2][r % 2] = own_column(shared.limits + first_row, first_key, r / 2, r % 2);
    }
  }
#pragma unroll
  for (int n = 0; n < ForwardSm80<kHeadDim>::kTile.keys / 8; ++n) {
    const float2 pair =
        *reinterpret_cast<const float2*>(&shared.counts.log2_size[8 * n + thread % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int half = x / 2, column = 8 * n + x % 2;
        float& score = scores[i][n][x];
        float counted = x % 2 == 0 ? pair.x : pair.y;
        if constexpr (kHasOwn) {
          if (column > own[i][half]) score = counted = -INFINITY;
          if (column == own[i][half]) counted = 0.0f;
        }
        most[i][half] = fmaxf(most[i][half], score);
        score = fmaf(score, log2_scale, counted);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) shared.most[r / 2][r % 2][thread] = most[r / 2][r % 2];
}

// Divides by the sums, with epsilon in both, and writes the sums and the output as store_rows() in
// flash_forward_sm80.cuh does.
template <int kHeadDim, MmaType kType>
__device__ __forceinline__ void store_policy_rows(const CudaPolicyParams& p, int first_row,
                                                  const ForwardState<kHeadDim>& state,
                                                  PolicyForwardShared<kHeadDim>& shared,
                                                  uint16_t* q_tile) {
  using Config = ForwardSm80<kHeadDim>;
  using Layout = TileLayout<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const FlashTile& tile = shared.tile;
  const bool exists = shared.value_sums != nullptr;
  const float share = exists ? p.epsilon / static_cast<float>(tile.segment.k_len) : 0.0f;
  float of_keys[2][2], of_segment[2][2];  // factors of what was summed, and of the segment's sum
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = shared.most[i][half][threadIdx.x], sum = state.sum[i][half];
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2)) * log2_scale_of(p.softmax_scale);
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float factor = exp2f(state.max[i][half] - shift_of(max));
      sum *= factor;
      const float inverse = exists ? 1.0f / (sum + p.epsilon) : 0.0f;
      of_keys[i][half] = factor * inverse;
      of_segment[i][half] = share * inverse;
      const int r = first_row + 16 * i + 8 * half + lane / 4;
      if (lane % 4 == 0) shared.max[r] = max, shared.sum[r] = sum;
    }
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; ++d) {
    float2 all = {0.0f, 0.0f};
    if (exists) {
      all = __ldg(reinterpret_cast<const float2*>(shared.value_sums + 8 * d + lane % 4 * 2));
    }
#pragma unroll
    for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* pair = state.out[i][d] + 2 * half;
        const int r = first_row + 16 * i + 8 * half + lane / 4;
        uint32_t* to = static_cast<uint32_t*>(byte_of(q_tile, Layout::offset(r, d))) + lane % 4;
        *to = pack_pair<kType>(fmaf(pair[0], of_keys[i][half], all.x * of_segment[i][half]),
                               fmaf(pair[1], of_keys[i][half], all.y * of_segment[i][half]));
      }
    }
  }
  static_assert(Config::kWarpRows == kWarpSize, "a lane has one row to look up");
  const int own = first_row + lane;
  const PackedSource out = packed_source(p.out, tile.segment.q_begin, tile.head_k, shared.rows);
  shared.row_offsets[own] = out.offset(own);
  __syncwarp();
  if (own < tile.size) {
    int query, head;
    shared.rows.locate(own, query, head);
    const int64_t at = (tile.head_k * p.heads.group + head) * p.total + tile.segment.q_begin +
                       shared.rows.first_query + query;
    p.softmax_max[at] = shared.max[own];
    p.softmax_sum[at] = shared.sum[own];
  }
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
    store_strip<kHeadDim>(q_tile, first_row + kStripRows * i, tile.size,
                          [&](int r) { return out.data + shared.row_offsets[r]; });
  }
}

template <int kHeadDim, MmaType kType>
__global__ void __launch_bounds__(ForwardSm80<kHeadDim>::kThreads, 2)
    flash_policy_forward_sm80_kernel(FlashPolicyForwardParams params) {
  using Config = ForwardSm80<kHeadDim>;
  constexpr int kKeys = Config::kTile.keys;
  PRUNEOPS_DYNAMIC_SHARED(uint16_t, q_tile);
  __shared__ PolicyForwardShared<kHeadDim> shared;
  constexpr Visibility kVisible = {true, nullptr};
  const CudaPolicyParams& p = params.policy;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kWarpSize) {
    FlashTile found;
    const float* sums = nullptr;
    if (!find_tile(params.rows, params.segments, p.heads, blockIdx.x, found)) {
      found.size = 0;
    } else if (found.segment.k_len > 0) {
      const int32_t b = warp_first_above(p.bounds + 1, static_cast<int32_t>(p.num_segments),
                                         static_cast<int32_t>(found.segment.q_begin));
      sums = p.sums + (b * p.heads.num_heads_k + found.head_k) * kHeadDim;
    }
    if (thread == 0) {
      shared.tile = found;
      shared.value_sums = sums;
      if (found.size > 0) shared.rows = PackedRows(found.begin, p.heads.group);
    }
  }
  __syncthreads();
  const int num_rows = shared.tile.size, first_row = thread / kWarpSize * Config::kWarpRows;
  if (num_rows == 0) return;

  const Segment segment = shared.tile.segment;
  const PackedRows rows = shared.rows;
  const Limits limits =
      limits_of(kVisible, segment, rows.first_query, end_of_queries(rows, num_rows));
  // No row's own key is among those before the first row's.
  const KeyTiles tiles = key_tiles({limits.least - 1, limits.most}, kKeys);
  if (thread == 0) shared.tiles = tiles;
  ForwardState<kHeadDim> state;
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.max[i][half] = shared.most[i][half][thread] = -INFINITY;
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
    shared.limits[thread] = limit_of_row(kVisible, segment, rows, thread, num_rows);
    __syncthreads();
    load_tile_async<Config::kTile.rows, kHeadDim, Config::kThreads>(
        q_tile, thread, num_rows,
        [&](int r, int further) { return q.data + shared.row_offsets[r + further]; });
    KeyValueRing<kHeadDim> ring(q_tile + Config::kRowElements,
                                tile_source(p.k, 0, segment.k_begin, head_k),
                                tile_source(p.v, 0, segment.k_begin, head_k),
                                at_most(static_cast<int32_t>(segment.k_len), tiles.all * kKeys));
    // Of this thread's key in a tile, if it has one there.
    const auto policy_of = [&](int32_t tile) {
      const Segment& of = shared.tile.segment;
      const int64_t key = tile * kKeys + thread;
      return thread < kKeys && key < of.k_len ? __ldg(p.policy + of.k_begin + key) : 0.0f;
    };
    if (thread < kKeys) put_counts(policy_of(0), shared.counts);
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
    for (int32_t j = 0; j < shared.tiles.all; ++j) {
      uint32_t weights[Config::kGroups][Config::kKeySteps][4];
      const uint16_t* k_tile = ring.next(false);
      if (has_rows) {
        float scores[Config::kGroups][kKeys / 8][4];
        score_products<kHeadDim, kType>(queries, q_tile, q_lane, k_tile, k_lane, scores);
        if (j >= shared.tiles.unmasked) {
          weigh_scores<kHeadDim, true>(shared, first_row, j * kKeys, log2_scale, scores);
        } else {
          weigh_scores<kHeadDim, false>(shared, first_row, j * kKeys, log2_scale, scores);
        }
        const uint32_t low = shared.counts.negative[0], high = shared.counts.negative[1];
        if ((low | high) == 0) {
          softmax_step<kHeadDim, kType>(1.0f, scores, state, weights);
        } else {
          softmax_step<kHeadDim, kType>(
              1.0f, scores, state, weights, [&](int i, int half, int column, float probability) {
                const uint32_t bits = (column < kWarpSize ? low : high) >> thread % 4 * 2;
                const bool negative =
                    (bits >> column % kWarpSize & 1) != 0 &&
                    column != own_column(shared.limits + first_row, j * kKeys, i, half);
                return negative ? -probability : probability;
              });
        }
      }
      const uint16_t* v_tile = ring.next(true);
      const float next_policy = policy_of(j + 1);
      if (has_rows) add_values<kHeadDim, kType>(weights, v_tile, v_lane, state);
      // Between two barriers of the ring: nobody reads them.
      if (thread < kKeys) put_counts(next_policy, shared.counts);
    }
    wait_for_copies<0>();
  }
  if (first_row < num_rows) {
    store_policy_rows<kHeadDim, kType>(p, first_row, state, shared, q_tile);
  }
}

template <int kHeadDim>
cudaError_t launch_flash_policy_forward_sm80(const FlashPolicyForwardParams& params,
                                             cudaStream_t stream) {
  using Config = ForwardSm80<kHeadDim>;
  const CudaPolicyParams& p = params.policy;
  const dim3 grid(flash_blocks(p.heads.num_heads_k, p.total, p.num_segments, params.rows));
  const auto kernel = p.q.type == FloatType::kBFloat16
                          ? flash_policy_forward_sm80_kernel<kHeadDim, MmaType::kBFloat16>
                          : flash_policy_forward_sm80_kernel<kHeadDim, MmaType::kFloat16>;
  return launch_kernel(kernel, grid, dim3(Config::kThreads), Config::kSharedBytes, stream, params);
}

}  // namespace pruneops
