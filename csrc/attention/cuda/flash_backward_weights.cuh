// What keys count in the softmax whose gradients the sm_80 kernels take. The kernels ask at the
// places below; in plain attention the answers are nothing.

#pragma once

#include "attention/cuda/flash_backward.h"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/rows.cuh"

namespace pruneops {

// Every key counts 1. PolicyKeys (flash_policy_backward_sm80.cuh) is the other kind.
struct EqualKeys {
  // 1 if the last key that a row sees is looked at apart from the others: with its tile, and not
  // only with the first one that it does not see.
  static constexpr int kLastApart = 0;

  //   at  place of the row in [num_heads_q, total_q]    sum  of dout out
  __device__ __forceinline__ FlashRowTerms row_terms(const FlashBackwardParams& p, int64_t at,
                                                     float sum) const {
    const float lse = p.softmax_lse[at];
    const float dlse = p.dsoftmax_lse == nullptr ? 0.0f : p.dsoftmax_lse[at];
    return lse == -INFINITY ? FlashRowTerms{INFINITY, 0.0f}
                            : FlashRowTerms{lse * kLog2OfE, sum - dlse};
  }

  // A probability as the row's LSE has it.
  static __device__ __forceinline__ float of_row(float p, float /*log2_lse*/) { return p; }

  // Where keys are held: what a lane has to do with its keys g and g + 8 of the warp's.
  struct LaneKeys {
    __device__ __forceinline__ LaneKeys(const EqualKeys&, const FlashTile&, int /*strip*/) {}
    // p becomes what is rounded and multiplied.
    //   ds  dp - delta
    template <bool kHasLast, int kRows>
    __device__ __forceinline__ void weigh(const int32_t* /*limits*/, int /*first_key*/,
                                          float (&)[kRows / 8][4], const float (&)[kRows / 8][4]) {}
    // Adds what else there is to the sums for values.
    template <int kHeadDim>
    __device__ __forceinline__ void finish(const EqualKeys&, const FlashBackwardParams&,
                                           const FlashTile&, int /*strip*/,
                                           float (&)[kHeadDim / 8][4]) const {}
  };

  // Where rows are held: the keys of a tile, in shared memory.
  template <int kKeys>
  struct TileKeys {
    __device__ __forceinline__ void put(int /*key*/, float /*count*/) {}
    //   limits  of the lane's rows
    template <bool kHasLast>
    __device__ __forceinline__ void weigh(const int32_t (&)[2], int /*first_key*/,
                                          float (&)[kKeys / 8][4]) const {}
  };
  __device__ __forceinline__ float count_of(int64_t /*key*/) const { return 1.0f; }
};

}  // namespace pruneops
