// Decode in bf16 and fp16, on tensor cores.
//
// Memory bounds it, if the arithmetic does not: at 4.3 TB/s an SM of an H200 gets 9 elements of
// keys and values a cycle, and its lanes have 128 slots. With multiply-adds an element costs one
// conversion and, for every query head that shares it, one multiply-add and, of a key, half a
// shuffle and half an addition: 23 slots a cycle for one head, but 121 for 8 of them. Tensor cores
// take 2 slots an element with all that belongs to it, 19 a cycle, whatever the group is. So this
// is the kernel for every group: with one head 7 of 8 columns are wasted, but would be idle.
//
// Every warp has tiles of 16 keys of its own, which it copies to shared memory one or two tiles
// ahead without waiting for other warps, keys as soon as keys have been read and values after
// values. At head_dim 128 that is 8 to 16 KB on their way for each of 12 warps, where an SM needs
// about 30 KB to cover the latency of its share of the bandwidth.

#pragma once

#include "attention/cuda/decode.cuh"
#include "common/cuda_async.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_mma.cuh"

namespace pruneops {

constexpr int kDecodeTileKeys = 16;                          // of a warp
constexpr int kDecodeStep = kDecodeTileKeys * kDecodeWarps;  // from one tile of a warp to the next
static_assert(kDecodeSplitKeys % kDecodeStep == 0);

// Tiles on their way: as many as fit into the 99 KB of a block of sm_86 and sm_89.
template <int kDim>
constexpr int kDecodeStages = kDim <= 128 ? 2 : 1;

// Blocks on a multiprocessor that the compiler fits registers to: what fits into the shared memory
// of Hopper, with 128, 168 and 255 registers a thread.
template <int kDim>
constexpr int kDecodeBlocks = kDim <= 96    ? 4
                              : kDim <= 128 ? 3
                                            : 2;

// Rows lie an odd number of 16 bytes apart, so that 8 of them, of which ldmatrix reads 16 bytes
// each, are in different banks. Unlike with a swizzle all places follow from one by constants.
template <int kDim>
using DecodeTile = uint16_t[kDecodeTileKeys][kDim + 8];

template <int kDim>
struct DecodeShared {
  DecodeTile<kDim> q;  // query heads; rows 8 to 15 are 0
  union {
    struct {
      DecodeTile<kDim> k, v;
    } stages[kDecodeWarps][kDecodeStages<kDim>];
    DecodeParts<kDecodeWarps, kDim> parts;
  };
};

// Copies tiles of rows to shared memory, by one warp, one tile after the other.
//   kWide  rows lie on 16 bytes and head_dim is a multiple of 8; else they are copied element by
//          element, and at once
template <int kDim, bool kWide>
class TileCopies {
 public:
  __device__ __forceinline__ TileCopies(const uint16_t* rows, int64_t stride, int head_dim)
      : next_(rows + row() * stride + element()), stride_(stride), head_dim_(head_dim) {}

  // Begins with rows [0, num_rows) of the next tile, and zeros around them.
  __device__ __forceinline__ void begin(DecodeTile<kDim>& tile, int num_rows) {
#pragma unroll(kWide ? kDecodeTileKeys / kRows : 1)
    for (int r = 0; r < kDecodeTileKeys; r += kRows) {
#pragma unroll
      for (int d = 0; d < kDim; d += 8 * kLanes) {
        if (kDim % (8 * kLanes) != 0 && d + element() >= kDim) break;
        copy(&tile[r + row()][d + element()], next_ + r * stride_ + d, r + row() < num_rows,
             head_dim_ - d - element());
      }
    }
    next_ += kDecodeStep * stride_;
  }

 private:
  static constexpr int kLanes = kDim % 64 == 0 ? 8 : 4;  // side by side in a row
  static constexpr int kRows = kWarpSize / kLanes;

  static __device__ __forceinline__ int row() {
    return static_cast<int>(threadIdx.x) % kWarpSize / kLanes;
  }
  static __device__ __forceinline__ int element() {
    return static_cast<int>(threadIdx.x) % kLanes * 8;
  }

  // 8 elements, of which the first `count` exist.
  static __device__ __forceinline__ void copy(uint16_t* target, const uint16_t* source, bool valid,
                                              int count) {
    if constexpr (kWide) {
      copy_16_bytes_async(target, source, valid && count > 0);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) target[e] = valid && e < count ? source[e] : uint16_t{0};
    }
  }

  const uint16_t* next_;  // what this lane copies first of the next tile
  int64_t stride_;
  int head_dim_;
};

// Where a lane reads for ldmatrix of 16 x 16 elements of a tile, in the order upper left, upper
// right, lower left, lower right: two `b` of products side by side, whose columns are the rows of
// the tile; or, transposed, an `a` whose columns are.
template <int kDim>
__device__ __forceinline__ const uint16_t* lane_of(const DecodeTile<kDim>& tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return &tile[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8];
}

// The query heads as `a`: q[i] has elements [16 i, 16 i + 16).
template <int kDim>
__device__ __forceinline__ void load_queries(const DecodeTile<kDim>& tile,
                                             uint32_t (&q)[kDim / 16][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) load_matrices(q[i], &tile[lane % 16][lane / 16 * 8 + 16 * i]);
}

// logits[j][i] = <query head g, key 2 t + i + 8 j>, raw, in lane 4 g + t.
template <MmaType kType, int kDim>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[kDim / 16][4],
                                              const DecodeTile<kDim>& keys, float (&logits)[2][2]) {
  const uint16_t* lane = lane_of<kDim>(keys);
  float sums[2][4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    uint32_t k[4];
    load_matrices(k, lane + 16 * i);
    const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
    mma_16x8x16<kType>(sums[0], q[i], first);
    mma_16x8x16<kType>(sums[1], q[i], second);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) logits[j][0] = sums[j][0], logits[j][1] = sums[j][1];
}

// out[w][i] += element 16 w + g + i / 2 * 8 of all values, with the weights of head 2 t + i % 2.
//   weights  of head g: keys 2 t, 2 t + 1, then keys 2 t + 8, 2 t + 9
template <MmaType kType, int kDim>
__device__ __forceinline__ void add_values(const DecodeTile<kDim>& values,
                                           const uint32_t (&weights)[2],
                                           float (&out)[kDim / 16][4]) {
  const uint16_t* lane = lane_of<kDim>(values);
#pragma unroll
  for (int w = 0; w < kDim / 16; ++w) {
    uint32_t v[4];
    load_matrices_transposed(v, lane + 16 * w);
    mma_16x8x16<kType>(out[w], v, weights);
  }
}

template <MmaType kType, int kDim, bool kWide>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks<kDim>)
    decode_tensor_kernel(CudaDecodeParams p, DecodeScratch scratch) {
  PRUNEOPS_DYNAMIC_SHARED(DecodeShared<kDim>, shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int head_dim = static_cast<int>(p.heads.head_dim);
  const float log2_scale = p.softmax_scale * kLog2OfE;
  constexpr int kStages = kDecodeStages<kDim>;

  const DecodeWork work = decode_work(p, scratch.num_splits);
  if (!has_result(work, scratch.num_splits)) return;
  auto& stages = shared->stages[warp];
  const int64_t first = work.begin + warp * kDecodeTileKeys;
  int keys_left = static_cast<int>(work.end - first);
  TileCopies<kDim, kWide> keys(decode_rows<uint16_t>(p.k, work.row, first, work.head_k),
                               p.k.row_stride, head_dim);
  TileCopies<kDim, kWide> values(decode_rows<uint16_t>(p.v, work.row, first, work.head_k),
                                 p.v.row_stride, head_dim);
  // Begins with the tile `ahead` tiles further on. Groups of copies are counted, so there is one
  // for every tile, though it lies past the last key.
  const auto copy_keys = [&](int stage, int ahead) {
    const int left = keys_left - ahead * kDecodeStep;
    if (left > 0) keys.begin(stages[stage].k, left);
    commit_copies();
  };
  const auto copy_values = [&](int stage, int ahead) {
    const int left = keys_left - ahead * kDecodeStep;
    if (left > 0) values.begin(stages[stage].v, left);
    commit_copies();
  };
  if (warp == 0) {
    TileCopies<kDim, kWide>(decode_rows<uint16_t>(p.q, 0, work.row, work.head), p.q.head_stride,
                            head_dim)
        .begin(shared->q, work.num_heads);
  }
  commit_copies();
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    copy_keys(stage, stage);
    copy_values(stage, stage);
  }
  constexpr int kGroups = 2 * kStages;
  wait_for_copies<kGroups>();
  __syncthreads();
  uint32_t q[kDim / 16][4];
  load_queries<kDim>(shared->q, q);

  float* logits = nullptr;  // of head g and key 2 t
  if (scratch.logits != nullptr && g < work.num_heads) {
    const int64_t row = work.row * p.heads.num_heads_q + work.head + g;
    logits = scratch.logits + row * scratch.logit_stride + first + 2 * t;
  }
  float out[kDim / 16][4] = {};
  float max = -INFINITY;  // of head g
  float sum = 0.0f;       // of head g, this lane's keys only
  for (int stage = 0; keys_left > 0; keys_left -= kDecodeStep) {
    wait_for_copies<kGroups - 1>();
    __syncwarp();
    float x[2][2];
    multiply_keys<kType, kDim>(q, stages[stage].k, x);
    __syncwarp();
    copy_keys(stage, kStages);

    float new_max = max;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool seen = 2 * t + i + 8 * j < keys_left;
        x[j][i] = seen ? x[j][i] * log2_scale : -INFINITY;
        new_max = fmaxf(new_max, x[j][i]);
        if (seen && logits != nullptr) logits[i + 8 * j] = x[j][i];
      }
    }
    if (logits != nullptr) logits += kDecodeStep;
    new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 1));
    new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 2));
    const float shift = shift_of(new_max);
    if (__any_sync(kAllLanes, new_max > max)) {
      const float alpha = fast_exp2(max - shift);
      const float alphas[2] = {__shfl_sync(kAllLanes, alpha, 8 * t),
                               __shfl_sync(kAllLanes, alpha, 8 * t + 4)};
      sum *= alpha;
#pragma unroll
      for (int w = 0; w < kDim / 16; ++w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[w][i] *= alphas[i % 2];
      }
      max = new_max;
    }
    uint32_t weights[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float low = fast_exp2(x[j][0] - shift), high = fast_exp2(x[j][1] - shift);
      sum += low + high;
      weights[j] = pack_pair<kType>(low, high);
    }
    wait_for_copies<kGroups - 1>();
    __syncwarp();
    add_values<kType, kDim>(stages[stage].v, weights, out);
    __syncwarp();
    copy_values(stage, kStages);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  wait_for_copies<0>();
  __syncthreads();
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  DecodeParts<kDecodeWarps, kDim>& parts = shared->parts;
  if (t == 0) parts.lse[warp][g] = {max, sum};
#pragma unroll
  for (int w = 0; w < kDim / 16; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts.out[warp][2 * t + i % 2][16 * w + g + i / 2 * 8] = out[w][i];
    }
  }
  store_decode_parts(p, scratch, work, parts);
}

}  // namespace pruneops
