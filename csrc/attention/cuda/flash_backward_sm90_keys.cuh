// dk and dv on Hopper. A block holds a tile of keys and values and goes through the rows that see
// any of them, head after head of the group. Scores are made with keys as their rows, so that P and
// dS are left operands of the sums and never leave their registers.

#pragma once

#include "attention/cuda/flash_backward_sm90_parts.cuh"

namespace pruneops {

template <int kHeadDim>
struct KeyGradientsSm90 : BackwardBlockSm90 {
  static constexpr BackwardTileSm90 kTile = kKeyGradientTileSm90;
  static_assert(kTile.held == kConsumers * kConsumerRows);
  using Held = PanelTile<kTile.held, kHeadDim>;      // keys or values
  using Streamed = PanelTile<kTile.step, kHeadDim>;  // queries or gradients of the output
  static_assert(Held::kBytes % 1024 == 0 && Streamed::kBytes % 1024 == 0);

  // Rows of one head that the block goes through at once.
  struct Step {
    int32_t num_rows;  // 0: there are no more
    Limits limits;     // of all of them
    int32_t limit_of[kTile.step];
    FlashRowTerms terms[kTile.step];
  };
  struct Small {
    Step steps[kTile.stages];
    uint64_t held_full;
    uint64_t full[kTile.stages], empty[kTile.stages];
  };
  static constexpr int kSmallBegin = 2 * Held::kBytes + 2 * kTile.stages * Streamed::kBytes;
  static constexpr int kSharedBytes = kSmallBegin + static_cast<int>(sizeof(Small));
  static_assert(kSharedBytes <= 227 << 10);

  unsigned char* begin;

  __device__ __forceinline__ unsigned char* keys() const { return begin; }
  __device__ __forceinline__ unsigned char* values() const { return begin + Held::kBytes; }
  __device__ __forceinline__ unsigned char* queries(int stage) const {
    return begin + 2 * Held::kBytes + 2 * stage * Streamed::kBytes;
  }
  __device__ __forceinline__ unsigned char* gradients(int stage) const {
    return queries(stage) + Streamed::kBytes;
  }
  __device__ __forceinline__ Small& small() const {
    return *reinterpret_cast<Small*>(begin + kSmallBegin);
  }

  // By one thread, before all others begin.
  __device__ __forceinline__ void make_barriers() const {
    make_barrier(&small().held_full, 1);
    for (int i = 0; i < kTile.stages; ++i) {
      make_barrier(&small().full[i], 1 + kWarpSize);
      make_barrier(&small().empty[i], kConsumers * (kWarpgroup / kWarpSize));
    }
    publish_barriers();
  }
};

struct BackwardMapsSm90 {
  TensorMap q, dout, k, v;
};

// One warp: keys and values, then step by step the rows, what is known of each, and the end.
template <int kHeadDim>
__device__ __forceinline__ void feed_rows(const FlashBackwardParams& p,
                                          const BackwardMapsSm90& maps, const FlashTile& tile,
                                          const KeyGradientsSm90<kHeadDim>& block) {
  using Config = KeyGradientsSm90<kHeadDim>;
  using Streamed = typename Config::Streamed;
  typename Config::Small& small = block.small();
  const Segment& segment = tile.segment;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool leads = lane == 0;
  if (leads) {
    const RowsAt at = {static_cast<int>(segment.k_begin + tile.begin), tile.size, tile.head_k, 0};
    arrive_expecting(&small.held_full, 2 * Config::Held::kBytes);
    load_rows_async<typename Config::Held>(block.keys(), &maps.k, &small.held_full, at);
    load_rows_async<typename Config::Held>(block.values(), &maps.v, &small.held_full, at);
  }
  RingPosition<Config::kTile.stages> at;
  const int group = static_cast<int>(p.heads.group), first_head = tile.head_k * group;
  int64_t query = 0;  // the first one that may see the first key
  if (p.visibility.causal && p.visibility.kv_limit == nullptr) {
    query = at_least<int64_t>(tile.begin - (segment.k_len - segment.q_len), 0);
  }
  for (; query < segment.q_len; query += Config::kTile.step) {
    const int num_rows =
        static_cast<int>(at_most<int64_t>(segment.q_len - query, Config::kTile.step));
    const Limits limits = limits_of(p.visibility, segment, query, query + num_rows);
    if (limits.most <= tile.begin) continue;
    const int64_t row = segment.q_begin + query;
    for (int head = 0; head < group; ++head, at.advance()) {
      uint64_t* full = &small.full[at.stage];
      typename Config::Step& step = small.steps[at.stage];
      wait_for_phase(&small.empty[at.stage], at.parity ^ 1);
      if (leads) {
        const RowsAt rows = {static_cast<int>(row), num_rows, first_head + head, 0};
        arrive_expecting(full, 2 * Streamed::kBytes);
        load_rows_async<Streamed>(block.queries(at.stage), &maps.q, full, rows);
        load_rows_async<Streamed>(block.gradients(at.stage), &maps.dout, full, rows);
        step.num_rows = num_rows;
        step.limits = limits;
      }
      const FlashRowTerms* terms =
          p.row_terms + (tile.head_k * p.segments.total_q + row) * group + head;
#pragma unroll 1  // there are few registers
      for (int r = lane; r < Config::kTile.step; r += kWarpSize) {
        const bool exists = r < num_rows;
        // The probabilities of a row that is not there are 0.
        step.terms[r] = exists ? terms[int64_t{r} * group] : FlashRowTerms{INFINITY, 0.0f};
        step.limit_of[r] =
            exists ? static_cast<int32_t>(key_limit(p.visibility, segment, query + r)) : 0;
      }
      arrive(full);
    }
  }
  wait_for_phase(&small.empty[at.stage], at.parity ^ 1);
  if (leads) {
    small.steps[at.stage].num_rows = 0;
    arrive(&small.full[at.stage]);
  }
  arrive(&small.full[at.stage]);
}

// Scores become probabilities, 0 where a row does not see a key.
//   s          [64 keys, rows of the step]
//   first_key  of the warpgroup, in the segment
template <class Step, int kCount>
__device__ __forceinline__ void key_probabilities(const Step& step, float log2_scale,
                                                  int32_t first_key, float (&s)[kCount]) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float log2_lse = step.terms[fragment_column(thread, i)].log2_lse;
    s[i] = fast_exp2(fmaf(s[i], log2_scale, -log2_lse));
  }
  if (step.limits.least >= first_key + 64) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t limit = step.limit_of[fragment_column(thread, i)];
    if (first_key + fragment_row(thread, i) >= limit) s[i] = 0.0f;
  }
}

// One warpgroup: dk and dv of its 64 keys.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void sum_over_rows(const FlashBackwardParams& p, const FlashTile& tile,
                                              const KeyGradientsSm90<kHeadDim>& block,
                                              int consumer) {
  using Config = KeyGradientsSm90<kHeadDim>;
  using Held = typename Config::Held;
  using Streamed = typename Config::Streamed;
  constexpr int kRows = Config::kTile.step;
  typename Config::Small& small = block.small();
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int strip = consumer * Config::kConsumerRows;
  const auto first_key = static_cast<int32_t>(tile.begin) + strip;
  const float log2_scale = p.softmax_scale * kLog2OfE;
  float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  RingPosition<Config::kTile.stages> at;
  wait_for_phase(&small.held_full, 0);
  for (;; at.advance()) {
    wait_for_phase(&small.full[at.stage], at.parity);
    const typename Config::Step& step = small.steps[at.stage];
    if (step.num_rows == 0) break;
    // Nobody sees the keys of the second warpgroup on a diagonal, or at the end of a segment.
    if (first_key < step.limits.most) {
      const unsigned char* queries = block.queries(at.stage);
      const unsigned char* gradients = block.gradients(at.stage);
      float s[kRows / 2], ds[kRows / 2];
      uint32_t weights[kRows / 16][4], factors[kRows / 16][4];
      begin_rows_product<kType, Held, Streamed>(block.keys(), strip, queries, s);
      begin_rows_product<kType, Held, Streamed>(block.values(), strip, gradients, ds);
      wait_for_products<1>(s);
      key_probabilities(step, log2_scale, first_key, s);
      round_into_operands<kType, kRows>(s, weights);
      begin_sum<kType, Streamed>(weights, gradients, dv);
      wait_for_products<1>(ds);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        ds[i] = s[i] * (ds[i] - step.terms[fragment_column(thread, i)].delta);
      }
      round_into_operands<kType, kRows>(ds, factors);
      begin_sum<kType, Streamed>(factors, queries, dk);
      wait_for_products<0>(dk, dv);
    }
    arrive_as_warp(&small.empty[at.stage]);
  }
  const int num_keys = tile.size - strip;
  const int64_t row = tile.segment.k_begin + tile.begin + strip;
  store_rows<kType, kHeadDim>(dk, p.softmax_scale, num_keys,
                              [&](int key) { return element_of(p.dk, row + key, tile.head_k); });
  store_rows<kType, kHeadDim>(dv, 1.0f, num_keys,
                              [&](int key) { return element_of(p.dv, row + key, tile.head_k); });
}

template <MmaType kType, int kHeadDim>
__global__ void __launch_bounds__(KeyGradientsSm90<kHeadDim>::kThreads, 1)
    flash_key_gradients_sm90_kernel(const __grid_constant__ FlashBackwardParams p,
                                    const __grid_constant__ FlashOrder order,
                                    const __grid_constant__ BackwardMapsSm90 maps) {
  using Config = KeyGradientsSm90<kHeadDim>;
  PRUNEOPS_SWIZZLED_SHARED(memory);
  const Config block{{}, memory};
  FlashTile tile;
  if (!find_tile(order, p.segments, p.heads, blockIdx.x, tile)) return;
  if (threadIdx.x == 0) block.make_barriers();
  __syncthreads();
  // The same in all lanes of a warp; the shuffle says so to the compiler.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp < kWarpgroup / kWarpSize) {
    give_registers<Config::kFeederRegisters>();
    if (warp == 0) feed_rows<kHeadDim>(p, maps, tile, block);
  } else {
    take_registers<Config::kConsumerRegisters>();
    sum_over_rows<kType, kHeadDim>(p, tile, block, warp / (kWarpgroup / kWarpSize) - 1);
  }
}

}  // namespace pruneops
