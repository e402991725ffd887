// Distances between the rows of a segment, in tiles of 64 x 64 by tensor cores:
// |a - b|^2 = |a|^2 + |b|^2 - 2 a b.
//
// Two things make that accurate in float32. Rows are shifted to the middle of the segment first,
// since a distance does not change by that, but the terms that cancel do; and where they cancel all
// the same, because two rows are near each other, the distance is computed anew from differences.
//
// A shifted row is the sum of three bfloat16 rows, exactly but for underflow, and of the nine
// products the six that matter are added up: what is left out is below 2^-23 of |a| |b|. Tensor
// cores cut sums off towards zero, so the large products start anew every 32 channels and are added
// up in float outside; what rounding takes there goes into the next sum. Half precision rows that
// lie around the origin anyway need no shift, and one product, which is exact.
//
// Tile (i, j) and tile (j, i) are one computation, so the matrix is symmetric to the bit. And the
// products of a and b are those of b and a in another place, added up in the same way, so equal
// rows are equally far from any third one, whichever tiles they are in.

#pragma once

#include <cuda_bf16.h>
#include <math.h>

#include "clustering/cuda/layout.cuh"
#include "clustering/cuda/rows.cuh"
#include "common/cuda_mma.cuh"

namespace pruneops {

constexpr int kTileThreads = 128;  // four warps, a quarter of the tile each
constexpr int kTileWarps = kTileThreads / kWarpSize;
constexpr int kChunk = 32;  // channels in shared memory at a time
constexpr int kPlanes = 3;
constexpr int kPlanePitch = kChunk + 8;  // keeps fragments free of bank conflicts
constexpr int kQuadsOfChunk = kChunk / kQuad;
constexpr int kRowsAtOnce = kTileThreads / kQuadsOfChunk;
constexpr int kLoadsOfSide = kTile / kRowsAtOnce;  // quads that a thread has of either side

// Below this part of |a|^2 + |b|^2 a squared distance is computed from differences.
constexpr float kCancelled = 1.0f / 16;
// Half precision rows are shifted where that makes most of their squared norms smaller by more than
// this factor.
constexpr float kWorthShifting = 4.0f;

// The middle of a segment: in each channel the median of three rows.
template <class T>
struct Middle {
  const CudaRows& x;
  const SegmentRows& segment;

  // A number that is not finite would spoil rows that are.
  static __device__ __forceinline__ float median(float a, float b, float c) {
    const float x = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
    return fabsf(x) < INFINITY ? x : 0.0f;
  }

  __device__ __forceinline__ float4 at(int64_t channel, int64_t count, bool vectors) const {
    const auto row = [&](int64_t of_segment) {
      return as_floats(
          load_quad(row_of<T>(x, segment.begin + of_segment) + channel, count, vectors));
    };
    const int64_t edge = segment.count / 6;
    const float4 a = row(edge), b = row(segment.count / 2), c = row(segment.count - 1 - edge);
    return make_float4(median(a.x, b.x, c.x), median(a.y, b.y, c.y), median(a.z, b.z, c.z),
                       median(a.w, b.w, c.w));
  }
};

__device__ __forceinline__ float4 minus(float4 a, float4 b) {
  return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}

// Channels of both sides, then the tile made of them.
union TileShared {
  uint16_t planes[2][kPlanes][kTile][kPlanePitch];
  float distances[kTile][kTile + 1];
};

// One side of a tile.
template <class T>
struct Side {
  const T* first;  // its first row
  int64_t row_stride;
  int count;  // rows, up to kTile

  __device__ Side(const CudaRows& x, const SegmentRows& segment, int64_t tile)
      : first(row_of<T>(x, segment.begin + tile * kTile)),
        row_stride(x.row_stride),
        count(static_cast<int>(at_most<int64_t>(segment.count - tile * kTile, kTile))) {}
};

// The thread's quads of one side, from channel `c` of the chunk on; 0 outside.
template <class T>
__device__ __forceinline__ void load_side(const Side<T>& side, int c, int channels, bool vectors,
                                          Quad<T> (&quads)[kLoadsOfSide]) {
  const int row = static_cast<int>(threadIdx.x) / kQuadsOfChunk;
  c += static_cast<int>(threadIdx.x) % kQuadsOfChunk * kQuad;
#pragma unroll
  for (int i = 0; i < kLoadsOfSide; ++i) {
    const int r = row + i * kRowsAtOnce;
    const int count = r < side.count ? channels - c : 0;
    quads[i] =
        count > 0 ? load_quad(side.first + r * side.row_stride + c, count, vectors) : Quad<T>{};
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(both.x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
}

// Puts the thread's quads of one side into shared memory: shifted and cut in three, or as they are.
template <class T, bool kShift>
__device__ __forceinline__ void store_side(const Quad<T> (&quads)[kLoadsOfSide], int num_rows,
                                           float4 shift,
                                           uint16_t (&planes)[kPlanes][kTile][kPlanePitch]) {
  const int row = static_cast<int>(threadIdx.x) / kQuadsOfChunk;
  const int channel = static_cast<int>(threadIdx.x) % kQuadsOfChunk * kQuad;
#pragma unroll
  for (int i = 0; i < kLoadsOfSide; ++i) {
    const int r = row + i * kRowsAtOnce;
    if constexpr (kShift) {
      float4 rest = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (r < num_rows) rest = minus(as_floats(quads[i]), shift);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const uint2 words = make_uint2(pack(rest.x, rest.y), pack(rest.z, rest.w));
        *reinterpret_cast<uint2*>(&planes[plane][r][channel]) = words;
        rest.x -= __uint_as_float(words.x << 16);
        rest.y -= __uint_as_float(words.x & 0xffff0000u);
        rest.z -= __uint_as_float(words.y << 16);
        rest.w -= __uint_as_float(words.y & 0xffff0000u);
      }
    } else {
      *reinterpret_cast<ushort4*>(&planes[0][r][channel]) = quads[i].raw;
    }
  }
}

// What the planes are for the tensor cores.
template <class T, bool kShift>
constexpr MmaType kTypeOfPlanes = MmaType::kBFloat16;
template <>
constexpr MmaType kTypeOfPlanes<Half, false> = MmaType::kFloat16;

constexpr int kWarpRows = 32;             // rows on either side of a warp's part
constexpr int kMmaRows = kWarpRows / 16;  // products of 16 x 8 that it is made of
constexpr int kMmaColumns = kWarpRows / 8;
using Part = float[kMmaRows][kMmaColumns][4];

__device__ __forceinline__ uint32_t fragment(const uint16_t (&plane)[kTile][kPlanePitch], int row,
                                             int channel) {
  return *reinterpret_cast<const uint32_t*>(&plane[row][channel]);
}

// Where the warp's part of the tile begins.
__device__ __forceinline__ int part_row() {
  return static_cast<int>(threadIdx.x) / kWarpSize / 2 * kWarpRows;
}
__device__ __forceinline__ int part_column() {
  return static_cast<int>(threadIdx.x) / kWarpSize % 2 * kWarpRows;
}

// Sums of products of planes.
struct Products {
  Part large;       // first planes, and second planes
  Part a_and_rest;  // first plane of a, second and third of b
  Part rest_and_b;  // second and third of a, first of b
};

// products += those of the chunk.
template <class T, bool kShift>
__device__ __forceinline__ void multiply_chunk(const uint16_t (&a)[kPlanes][kTile][kPlanePitch],
                                               const uint16_t (&b)[kPlanes][kTile][kPlanePitch],
                                               Products& products) {
  constexpr MmaType kType = kTypeOfPlanes<T, kShift>;
  constexpr int kUsed = kShift ? kPlanes : 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int row = part_row() + lane / 4, column = part_column() + lane / 4;
#pragma unroll 1  // fragments of one step at a time fit into registers
  for (int k = 0; k < kChunk; k += 16) {
    const int channel = k + lane % 4 * 2;
    uint32_t of_a[kUsed][kMmaRows][4];
#pragma unroll
    for (int plane = 0; plane < kUsed; ++plane) {
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          of_a[plane][m][i] = fragment(a[plane], row + 16 * m + i % 2 * 8, channel + i / 2 * 8);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kMmaColumns; ++n) {
      uint32_t of_b[kUsed][2];
#pragma unroll
      for (int plane = 0; plane < kUsed; ++plane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          of_b[plane][i] = fragment(b[plane], column + 8 * n, channel + i * 8);
        }
      }
      // Small products first: a large sum would cut them off.
      if constexpr (kShift) {
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          mma_16x8x16<kType>(products.large[m][n], of_a[1][m], of_b[1]);
          mma_16x8x16<kType>(products.a_and_rest[m][n], of_a[0][m], of_b[2]);
          mma_16x8x16<kType>(products.rest_and_b[m][n], of_a[2][m], of_b[0]);
        }
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          mma_16x8x16<kType>(products.a_and_rest[m][n], of_a[0][m], of_b[1]);
          mma_16x8x16<kType>(products.rest_and_b[m][n], of_a[1][m], of_b[0]);
        }
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        mma_16x8x16<kType>(products.large[m][n], of_a[0][m], of_b[0]);
      }
    }
  }
}

// f(m, n, i) for every element of a Part.
template <class F>
__device__ __forceinline__ void for_part(const F& f) {
#pragma unroll
  for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
    for (int n = 0; n < kMmaColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
    }
  }
}

// A tile to be computed. In shared memory, since registers are short.
struct TileWork {
  SegmentRows segment;
  int64_t i, j;  // tiles of the segment's rows, i <= j
  bool shift;    // whether to shift the rows; if not, they are of half precision
  bool turned;   // wanted as tile (j, i)

  // Rows of a tile.
  __device__ __forceinline__ int count(int64_t tile) const {
    return static_cast<int>(at_most<int64_t>(segment.count - tile * kTile, kTile));
  }
};

// The inner products of the rows of a tile: large + small, where the second may be as small as a
// rounding error of the first.
template <class T, bool kShift>
__device__ __forceinline__ void multiply_sides(const CudaRows& x, const TileWork& work,
                                               bool vectors, TileShared& s, Part& large,
                                               Part& small) {
  const int channels = static_cast<int>(x.channels);
  Products products = {};
  for_part([&](int m, int n, int i) { large[m][n][i] = 0.0f; });
  Quad<T> quads_a[kLoadsOfSide], quads_b[kLoadsOfSide];
  const auto load = [&](int c) {
    load_side(Side<T>(x, work.segment, work.i), c, channels, vectors, quads_a);
    if (work.i == work.j) return;
    load_side(Side<T>(x, work.segment, work.j), c, channels, vectors, quads_b);
  };
  load(0);
  for (int c = 0; c < channels; c += kChunk) {
    float4 shift = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if constexpr (kShift) {
      const int channel = c + static_cast<int>(threadIdx.x) % kQuadsOfChunk * kQuad;
      if (channel < channels) {
        shift = Middle<T>{x, work.segment}.at(channel, channels - channel, vectors);
      }
    }
    const bool diagonal = work.i == work.j;
    __syncthreads();  // nobody reads the chunk before any more
    store_side<T, kShift>(quads_a, work.count(work.i), shift, s.planes[0]);
    if (!diagonal) store_side<T, kShift>(quads_b, work.count(work.j), shift, s.planes[1]);
    __syncthreads();
    if (c + kChunk < channels) load(c + kChunk);
    multiply_chunk<T, kShift>(s.planes[0], s.planes[diagonal ? 0 : 1], products);
    for_part([&](int m, int n, int i) {
      const float sum = large[m][n][i] + products.large[m][n][i];
      products.large[m][n][i] += large[m][n][i] - sum;
      large[m][n][i] = sum;
    });
  }
  for_part([&](int m, int n, int i) {
    small[m][n][i] =
        products.large[m][n][i] + (products.a_and_rest[m][n][i] + products.rest_and_b[m][n][i]);
  });
}

// |a - b|^2 by differences, by one warp.
template <class T>
__device__ __forceinline__ float squared_difference(const T* a, const T* b, int64_t channels,
                                                    bool vectors) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int64_t c = lane * kQuad; c < channels; c += kWarpSize * kQuad) {
    const float4 d = minus(as_floats(load_quad(a + c, channels - c, vectors)),
                           as_floats(load_quad(b + c, channels - c, vectors)));
    sums.x = fmaf(d.x, d.x, sums.x);
    sums.y = fmaf(d.y, d.y, sums.y);
    sums.z = fmaf(d.z, d.z, sums.z);
    sums.w = fmaf(d.w, d.w, sums.w);
  }
  float sum = (sums.x + sums.y) + (sums.z + sums.w);
  for (int flip = kWarpSize / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
  return sum;
}

constexpr float kToBeComputed = -1.0f;  // in the place of a distance that is never negative

__device__ __forceinline__ float distance_of(float squared, float root_of_channels) {
  const float distance = sqrtf(squared) / root_of_channels;
  return distance == distance ? distance : INFINITY;
}

// s.distances = the thread's part of the tile, from inner products and norms; those that cancel are
// marked. Of a tile on the diagonal the triangle above it.
//   norms_a, norms_b  squared norms of the rows of the sides
__device__ __forceinline__ void store_part(const Part& large, const Part& small,
                                           const float* norms_a, const float* norms_b, int count_a,
                                           int count_b, bool diagonal, float root_of_channels,
                                           TileShared& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for_part([&](int m, int n, int i) {
    const int row = part_row() + 16 * m + lane / 4 + i / 2 * 8;
    const int column = part_column() + 8 * n + lane % 4 * 2 + i % 2;
    if (row >= count_a || column >= count_b || (diagonal && row >= column)) return;
    const float of_a = norms_a[row], of_b = norms_b[column], product = large[m][n][i];
    const float squared = ((of_a - product) + (of_b - product)) - 2.0f * small[m][n][i];
    s.distances[row][column] = squared < kCancelled * (of_a + of_b)
                                   ? kToBeComputed
                                   : distance_of(squared, root_of_channels);
  });
}

// Computes the marked distances, a warp at a time.
template <class T>
__device__ __forceinline__ void compute_marked(const Side<T>& a, const Side<T>& b, bool diagonal,
                                               int64_t channels, bool vectors,
                                               float root_of_channels, TileShared& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int row = static_cast<int>(threadIdx.x) / kWarpSize; row < a.count; row += kTileWarps) {
    for (int first = 0; first < b.count; first += kWarpSize) {
      const int column = first + lane;
      const bool known = column >= b.count || (diagonal && row >= column);
      uint32_t marked = __ballot_sync(kAllLanes, !known && s.distances[row][column] < 0.0f);
      for (; marked != 0; marked &= marked - 1) {
        const int other = first + __ffs(static_cast<int>(marked)) - 1;
        const float squared = squared_difference(a.first + row * a.row_stride,
                                                 b.first + other * b.row_stride, channels, vectors);
        if (lane == 0) s.distances[row][other] = distance_of(squared, root_of_channels);
      }
    }
  }
}

// s.distances = distances between the rows of tile i and of tile j of a segment. The block may read
// them when it returns.
template <class T>
__device__ __forceinline__ void compute_tile(const CudaDpcKnnParams& p, const TileWork& work,
                                             bool vectors, TileShared& s) {
  const CudaRows& x = p.x;
  Part large, small;
  if (sizeof(T) == 4 || work.shift) {
    multiply_sides<T, true>(x, work, vectors, s, large, small);
  } else if constexpr (sizeof(T) == 2) {
    multiply_sides<T, false>(x, work, vectors, s, large, small);
  }
  const bool diagonal = work.i == work.j;
  const Side<T> a(x, work.segment, work.i), b(x, work.segment, work.j);
  __syncthreads();  // the tile takes the place of the last chunk
  const float* norms = p.norms + (work.shift ? 0 : x.total) + work.segment.begin;
  const float root_of_channels = sqrtf(static_cast<float>(at_least<int64_t>(x.channels, 1)));
  store_part(large, small, norms + work.i * kTile, norms + work.j * kTile, a.count, b.count,
             diagonal, root_of_channels, s);
  __syncthreads();
  compute_marked(a, b, diagonal, x.channels, vectors, root_of_channels, s);
  __syncthreads();
  if (!diagonal) return;
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kTile; e += kTileThreads) {
    const int row = e / kTile, column = e % kTile;
    if (row > column) s.distances[row][column] = s.distances[column][row];
    if (row == column) s.distances[row][column] = 0.0f;
  }
  __syncthreads();
}

}  // namespace pruneops
