// What a block of the forward pass with mma.sync does with a tile of keys: gets it into shared
// memory while earlier ones are worked on, multiplies, masks, and adds to what its warps carry.

#pragma once

#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_shared.cuh"
#include "attention/cuda/flash_tiles.h"
#include "common/cuda_math.cuh"
#include "common/cuda_mma.cuh"

namespace pruneops {

template <int kHeadDim>
struct ForwardSm80 {
  static constexpr ForwardTileSm80 kTile = forward_tile_sm80(kHeadDim);
  static constexpr int kGroups = 2;  // of 16 rows a warp
  static constexpr int kWarpRows = 16 * kGroups;
  static constexpr int kThreads = kTile.rows / kWarpRows * kWarpSize;
  static constexpr int kRowElements = kTile.rows * kHeadDim;
  static constexpr int kSlotElements = kTile.keys * kHeadDim;
  static constexpr int kSharedBytes = 2 * (kRowElements + kTile.slots * kSlotElements);
  static constexpr int kDepths = kHeadDim / 16;      // steps of a score product
  static constexpr int kKeySteps = kTile.keys / 16;  // steps of an output product
  static_assert(kThreads == kTile.rows, "a thread looks up one row");
};

// The loads of keys and values in the order of their use, K of tile 0, V of tile 0, K of tile 1,
// ... through a ring of slots. A slot is loaded anew when the step that read it lies behind a
// barrier.
template <int kHeadDim>
class KeyValueRing {
 public:
  using Config = ForwardSm80<kHeadDim>;
  static constexpr int kSlots = Config::kTile.slots;

  // Begins the first kSlots - 1 loads.
  __device__ __forceinline__ KeyValueRing(uint16_t* slots, const TileSource& k, const TileSource& v,
                                          int32_t num_keys)
      : slots_(slots), k_(k), v_(v), keys_left_(num_keys) {
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load(i % 2 == 1, i);
  }

  // Waits for the tile whose turn it is, keys and values by turns, and for all threads to be done
  // with the one before, whose slot takes the next load.
  __device__ __forceinline__ const uint16_t* next(bool values) {
    wait_for_copies<kSlots - 2>();
    __syncthreads();
    const int slot = slot_ + values;
    load(!values, slot == 0 ? kSlots - 1 : slot - 1);
    if (values) slot_ = slot_ + 2 == kSlots ? 0 : slot_ + 2;
    return slots_ + slot * Config::kSlotElements;
  }

 private:
  static_assert(kSlots % 2 == 0, "keys and values each keep to their own slots");

  // Of the next keys or values; an empty group past the last.
  __device__ __forceinline__ void load(bool values, int slot) {
    if (keys_left_ > 0) {
      load_tile_async<Config::kTile.keys, kHeadDim, Config::kThreads>(
          slots_ + slot * Config::kSlotElements, static_cast<int>(threadIdx.x), keys_left_,
          values ? v_ : k_);
      if (values) {
        keys_left_ -= Config::kTile.keys;
        k_.data += Config::kTile.keys * k_.stride;
        v_.data += Config::kTile.keys * v_.stride;
      }
    }
    commit_copies();
  }

  uint16_t* slots_;
  TileSource k_, v_;
  int32_t keys_left_;  // from the next load's first key on
  int slot_ = 0;       // of the keys whose turn it is; their values come after them
};

// What a warp carries from tile to tile for its 32 rows. Lane 4 g + t has rows 16 i + g and
// 16 i + g + 8 of them, and of those columns 8 n + 2 t and 8 n + 2 t + 1.
template <int kHeadDim>
struct ForwardState {
  using Config = ForwardSm80<kHeadDim>;
  float out[Config::kGroups][kHeadDim / 8][4];
  float max[Config::kGroups][2];  // largest exponent so far, base 2
  float sum[Config::kGroups][2];  // over this lane's columns
};

// Turns the sign of the queries, for log2_scale_of() leaves that of the scale out. By the block.
template <int kHeadDim>
__device__ __forceinline__ void negate_rows(uint16_t* q_tile) {
  using Config = ForwardSm80<kHeadDim>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < Config::kRowElements / 2; i += Config::kThreads) {
    reinterpret_cast<uint32_t*>(q_tile)[i] ^= 0x80008000u;
  }
  __syncthreads();
}

// The warp's fragments of the queries, where they stay in registers.
template <int kHeadDim>
__device__ __forceinline__ void take_queries(
    const uint16_t* q_tile, const LaneOffset<kHeadDim>& q_lane,
    uint32_t (&queries)[2][ForwardSm80<kHeadDim>::kDepths][4]) {
  using Config = ForwardSm80<kHeadDim>;
  if constexpr (Config::kTile.queries_in_registers) {
#pragma unroll
    for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
      for (int depth = 0; depth < Config::kDepths; ++depth) {
        load_matrices(queries[i][depth], byte_of(q_tile, q_lane(16 * i, 2 * depth)));
      }
    }
  }
}

// scores = queries x keys.
//   queries  fragments; unused where they are read from q_tile each time
template <int kHeadDim, MmaType kType>
__device__ __forceinline__ void score_products(
    const uint32_t (*queries)[ForwardSm80<kHeadDim>::kDepths][4], const uint16_t* q_tile,
    const LaneOffset<kHeadDim>& q_lane, const uint16_t* k_tile, const LaneOffset<kHeadDim>& k_lane,
    float (&scores)[2][ForwardSm80<kHeadDim>::kTile.keys / 8][4]) {
  using Config = ForwardSm80<kHeadDim>;
#pragma unroll
  for (int i = 0; i < Config::kGroups; ++i) {
#pragma unroll
    for (int n = 0; n < Config::kTile.keys / 8; ++n) {
#pragma unroll
      for (float& x : scores[i][n]) x = 0.0f;
    }
  }
#pragma unroll
  for (int depth = 0; depth < Config::kDepths; ++depth) {
    uint32_t a[Config::kGroups][4];
#pragma unroll
    for (int i = 0; i < Config::kGroups; ++i) {
      if constexpr (Config::kTile.queries_in_registers) {
#pragma unroll
        for (int w = 0; w < 4; ++w) a[i][w] = queries[i][depth][w];
      } else {
        load_matrices(a[i], byte_of(q_tile, q_lane(16 * i, 2 * depth)));
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kKeySteps; ++n) {
      uint32_t b[4];
      load_matrices(b, byte_of(k_tile, k_lane(16 * n, 2 * depth)));
#pragma unroll
      for (int i = 0; i < Config::kGroups; ++i) {
        mma_16x8x16<kType>(scores[i][2 * n], a[i], {b[0], b[1]});
        mma_16x8x16<kType>(scores[i][2 * n + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// -inf for keys that a row does not see.
//   limits  of the warp's rows, counted from the tile's first key
template <int kTileKeys>
__device__ __forceinline__ void mask_scores(const int32_t* limits, int32_t first_key,
                                            float (&scores)[2][kTileKeys / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t seen = limits[16 * i + 8 * half + lane / 4] - first_key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * n + e >= seen) scores[i][n][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// Every key counts as its score says.
struct AsScored {
  __device__ __forceinline__ float operator()(int, int, int, float probability) const {
    return probability;
  }
};

// Scores become probabilities against the largest exponent so far; what was summed before is
// brought down to it.
//   weights   probabilities rounded, as the `a` of the products with the values: a score's columns
//             in pairs are its words in order
//   count_as  (i, half, column, probability) -> what is summed and weighs the values in its place
template <int kHeadDim, MmaType kType, class CountAs = AsScored>
__device__ __forceinline__ void softmax_step(
    float log2_scale, float (&scores)[2][ForwardSm80<kHeadDim>::kTile.keys / 8][4],
    ForwardState<kHeadDim>& state, uint32_t (&weights)[2][ForwardSm80<kHeadDim>::kKeySteps][4],
    const CountAs& count_as = {}) {
  constexpr int kColumns = ForwardSm80<kHeadDim>::kTile.keys / 8;
  float factors[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = scores[i][0][2 * half];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        largest = fmaxf(largest, fmaxf(scores[i][n][2 * half], scores[i][n][2 * half + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float max = fmaxf(state.max[i][half], largest * log2_scale);
      const float shift = shift_of(max);
      const float factor = fast_exp2(state.max[i][half] - shift);
      state.max[i][half] = max;
      float sum = state.sum[i][half] * factor;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float* pair = &scores[i][n][2 * half];
        const float low = count_as(i, half, 8 * n, fast_exp2(fmaf(pair[0], log2_scale, -shift)));
        const float high =
            count_as(i, half, 8 * n + 1, fast_exp2(fmaf(pair[1], log2_scale, -shift)));
        sum += low + high;
        weights[i][n / 2][n % 2 * 2 + half] = pack_pair<kType>(low, high);
      }
      state.sum[i][half] = sum;
      factors[i][half] = factor;
    }
  }  // Later tiles seldom have a row's largest score; then nothing is scaled.
  const float least =
      fminf(fminf(factors[0][0], factors[0][1]), fminf(factors[1][0], factors[1][1]));
  if (!__any_sync(kAllLanes, least < 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[i][d][e] *= factors[i][e / 2];
    }
  }
}

// out += weights x values.
template <int kHeadDim, MmaType kType>
__device__ __forceinline__ void add_values(
    const uint32_t (&weights)[2][ForwardSm80<kHeadDim>::kKeySteps][4], const uint16_t* v_tile,
    const LaneOffset<kHeadDim>& v_lane, ForwardState<kHeadDim>& state) {
  using Config = ForwardSm80<kHeadDim>;
#pragma unroll
  for (int n = 0; n < Config::kKeySteps; ++n) {
#pragma unroll
    for (int d = 0; d < Config::kDepths; ++d) {
      uint32_t b[4];
      load_matrices_transposed(b, byte_of(v_tile, v_lane(16 * n, 2 * d)));
#pragma unroll
      for (int i = 0; i < Config::kGroups; ++i) {
        mma_16x8x16<kType>(state.out[i][2 * d], weights[i][n], {b[0], b[1]});
        mma_16x8x16<kType>(state.out[i][2 * d + 1], weights[i][n], {b[2], b[3]});
      }
    }
  }
}

}  // namespace pruneops
