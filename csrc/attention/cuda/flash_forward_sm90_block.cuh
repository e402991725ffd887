// The block of the sm_90a forward pass: which warps it has, what lies in its shared memory and how
// they hand it to one another.
//
// Warpgroup 0 feeds the others, the consumers, which have 64 rows of a work item's tile each. Its
// warp 0 takes items off the schedule and asks for their keys and values, its warp 1 + i copies the
// query rows of consumer i. Everything handed over has a barrier for "full" and one for "empty", so
// the feeding warps run ahead, also into the next item. The blocks stay until no item is left.

#pragma once

#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/flash_tiles.h"
#include "common/sm90_copies.cuh"
#include "common/sm90_mma.cuh"

namespace pruneops {

constexpr int kWarpgroup = 128;

// A work item, as the warps share it.
struct ForwardWorkSm90 {
  FlashTile tile;  // size 0: no work is left
  PackedRows rows;
  KeyTiles keys;
};

template <int kHeadDim>
struct ForwardSm90 {
  static constexpr ForwardTileSm90 kTile = forward_tile_sm90(kHeadDim);
  static constexpr int kConsumerRows = 64;  // rows of a wgmma
  static constexpr int kConsumers = kTile.rows / kConsumerRows;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static_assert(kConsumers <= 3, "a feeding warp for each consumer");
  static_assert(kTile.stages >= 2, "keys are asked for before the values of the tile before");
  static constexpr int kFeederRegisters = 40;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 152;
  static_assert(kFeederRegisters + kConsumers * kConsumerRegisters <=
                registers_to_share(1 + kConsumers));

  using QueryTile = PanelTile<kConsumerRows, kHeadDim>;
  using KeyTile = PanelTile<kTile.keys, kHeadDim>;  // keys or values
  static constexpr int kAligned = QueryTile::kAlignment;
  static constexpr int kQueryBytes = (QueryTile::kBytes + kAligned - 1) / kAligned * kAligned;
  static constexpr int kKeyBytes = (KeyTile::kBytes + kAligned - 1) / kAligned * kAligned;

  static constexpr int kWorkStages = 4;
  struct Small {
    ForwardWorkSm90 work[kWorkStages];
    uint64_t work_full[kWorkStages], work_empty[kWorkStages];
    uint64_t queries_full[kConsumers], queries_empty[kConsumers];
    uint64_t keys_full[kTile.stages], keys_empty[kTile.stages];
    uint64_t values_full[kTile.stages], values_empty[kTile.stages];
  };
  static constexpr int kSmallBegin = kConsumers * kQueryBytes + 2 * kTile.stages * kKeyBytes;
  static constexpr int kSharedBytes = kSmallBegin + static_cast<int>(sizeof(Small));
  static_assert(kSharedBytes <= 227 << 10);
};

// Shared memory by its parts.
template <int kHeadDim>
class ForwardSharedSm90 {
 public:
  using Config = ForwardSm90<kHeadDim>;
  using Small = typename Config::Small;

  __device__ __forceinline__ explicit ForwardSharedSm90(unsigned char* begin) : begin_(begin) {}

  __device__ __forceinline__ unsigned char* queries(int consumer) const {
    return begin_ + consumer * Config::kQueryBytes;
  }
  __device__ __forceinline__ unsigned char* keys(int stage) const {
    return begin_ + Config::kConsumers * Config::kQueryBytes + stage * Config::kKeyBytes;
  }
  __device__ __forceinline__ unsigned char* values(int stage) const {
    return keys(Config::kTile.stages + stage);
  }
  __device__ __forceinline__ Small& small() const {
    return *reinterpret_cast<Small*>(begin_ + Config::kSmallBegin);
  }

  // By one thread, before all others begin.
  __device__ __forceinline__ void make_barriers() const {
    constexpr int kWarps = kWarpgroup / kWarpSize;
    Small& s = small();
    for (int i = 0; i < Config::kWorkStages; ++i) {
      make_barrier(&s.work_full[i], 1);
      make_barrier(&s.work_empty[i], Config::kConsumers * (kWarps + 1));  // and a feeding warp
    }
    for (int i = 0; i < Config::kConsumers; ++i) {
      make_barrier(&s.queries_full[i], kWarpSize);
      make_barrier(&s.queries_empty[i], kWarps);
    }
    for (int i = 0; i < Config::kTile.stages; ++i) {
      make_barrier(&s.keys_full[i], 1);
      make_barrier(&s.keys_empty[i], Config::kConsumers * kWarps);
      make_barrier(&s.values_full[i], 1);
      make_barrier(&s.values_empty[i], Config::kConsumers * kWarps);
    }
    publish_barriers();
  }

 private:
  unsigned char* begin_;
};

// Tells a barrier for the warp, once all its lanes are here.
__device__ __forceinline__ void arrive_as_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) arrive(barrier);
}

}  // namespace pruneops
