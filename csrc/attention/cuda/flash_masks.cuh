// Which keys the rows of a tile see, and which tiles need to be looked at for it; exponents and
// sums of the softmax in the form all flash kernels keep them.

#pragma once

#include <float.h>

#include "attention/cuda/flash_shared.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda/segment_limits.cuh"

namespace pruneops {

// Leading keys that some rows see: each at least `least`, none more than `most`.
struct Limits {
  int32_t least, most;
};

// Of queries [begin, end) of the segment, end > begin. By a whole warp, the same in every lane.
__device__ __forceinline__ Limits limits_of(const Visibility& visibility, const Segment& segment,
                                            int64_t begin, int64_t end) {
  if (visibility.kv_limit == nullptr) {  // does not fall
    return {static_cast<int32_t>(key_limit(visibility, segment, begin)),
            static_cast<int32_t>(key_limit(visibility, segment, end - 1))};
  }
  int32_t least = static_cast<int32_t>(segment.k_len), most = 0;
#pragma unroll 2  // the warps that ask have few registers
  for (int64_t query = begin + threadIdx.x % kWarpSize; query < end; query += kWarpSize) {
    const int32_t limit = static_cast<int32_t>(key_limit(visibility, segment, query));
    least = at_most(least, limit);
    most = at_least(most, limit);
  }
  return {__reduce_min_sync(kAllLanes, least), __reduce_max_sync(kAllLanes, most)};
}

// Tiles of keys: no row sees a key from tile `all` on, and every row sees every key of the first
// `unmasked` ones.
struct KeyTiles {
  int32_t unmasked, all;
};
PRUNEOPS_HOST_DEVICE inline KeyTiles key_tiles(const Limits& limits, int32_t tile) {
  return {limits.least / tile, (limits.most + tile - 1) / tile};
}

// The limit of a packed row; what the tile has no row for sees every key, so that it asks for no
// mask.
__device__ __forceinline__ int32_t limit_of_row(const Visibility& visibility,
                                                const Segment& segment, const PackedRows& rows,
                                                int r, int num_rows) {
  int query, head;
  rows.locate(r, query, head);
  if (r >= num_rows) return static_cast<int32_t>(segment.k_len);
  return static_cast<int32_t>(key_limit(visibility, segment, rows.first_query + query));
}

// Queries [first_query, end) that rows [0, num_rows) stand for.
PRUNEOPS_HOST_DEVICE inline int64_t end_of_queries(const PackedRows& rows, int num_rows) {
  int query, head;
  rows.locate(num_rows - 1, query, head);
  return rows.first_query + query + 1;
}

// What turns a product into an exponent of 2. Its sign is left out: who scales by it turns the
// queries' sign instead, since the largest exponent must come from the largest product. Never 0,
// for a masked product is -inf.
__device__ __forceinline__ float log2_scale_of(float softmax_scale) {
  const float scale = fabsf(softmax_scale) * kLog2OfE;
  return scale < FLT_MIN ? FLT_MIN : scale;  // a NaN stays one
}

// The natural logarithm of a row's sum of exponents.
//   max  largest exponent, base 2    sum  of exp2(exponent - max); 0 if the row saw nothing
__device__ __forceinline__ float natural_lse(float max, float sum) {
  return log2_sum({max, sum}) * (1.0f / kLog2OfE);
}

}  // namespace pruneops
