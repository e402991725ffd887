// Scores from all query rows on tensor cores: a block has a tile of keys, goes through the tiles of
// rows that see them, and reduces probabilities where they are made, exp2(score - LSE). Keys are
// the rows of the products and queries their columns, so a lane reduces over queries in registers
// and meets others only at the end.
//
// Heads are reduced first, then queries. Where both reductions add, or both take the largest, that
// is one reduction over all (query, head) pairs: a block has the keys of one head and goes through
// the packed rows of its group, and key heads are put together at the end. Otherwise the reductions
// are nested: a block has all key heads of its keys, and goes through the heads of each tile of
// queries in turn, whose probabilities it gathers in registers.

#pragma once

#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/scores.h"
#include "attention/cuda/tile_products.cuh"
#include "common/cuda_math.cuh"

namespace pruneops {

// The tiles of rows that a block goes through: every `stride`-th one of its segment, from number
// `first` on, but those that see none of the block's keys.
template <bool kNested>
class RowTiles {
 public:
  __device__ __forceinline__ RowTiles(const CudaScoreParams& p, const FlashTile& keys, int first,
                                      int stride)
      : p_(p), keys_(keys), head_(kNested ? 0 : keys.head_k), head_k_(head_) {
    const int64_t group = kNested ? 1 : p.heads.group;
    const int64_t first_row = int64_t{first} * kStreamedRows;
    rows_ = PackedRows(first_row, group);
    left_ = keys.segment.q_len * group - first_row;
    const PackedRows step(int64_t{stride} * kStreamedRows, group);
    queries_of_step_ = static_cast<int>(step.first_query);
    heads_of_step_ = step.first_head;
    stride_ = stride;
    find_visible();
  }

  __device__ __forceinline__ bool any() const { return left_ > 0; }
  __device__ __forceinline__ int num_rows() const {
    return static_cast<int>(at_most<int64_t>(left_, kStreamedRows));
  }
  __device__ __forceinline__ const PackedRows& rows() const { return rows_; }
  // Of the queries: the first of the packed rows, in units of their group.
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ int head_k() const { return head_k_; }
  // Whether some row does not see all of the block's keys, or is not there: against a key that is
  // not finite its zeros would make a NaN.
  __device__ __forceinline__ bool masked() const { return masked_; }
  __device__ __forceinline__ bool is_last_head() const {
    return !kNested || head_ + 1 == static_cast<int>(p_.heads.num_heads_q);
  }

  __device__ __forceinline__ void advance() {
    if (!is_last_head()) {
      ++head_;
      head_k_ = head_ / static_cast<int>(p_.heads.group);
      return;
    }
    if (kNested) head_ = head_k_ = 0;
    step();
    find_visible();
  }

 private:
  __device__ __forceinline__ void step() {
    rows_.first_query += queries_of_step_;
    rows_.first_head += heads_of_step_;
    if (rows_.first_head >= rows_.group) {
      rows_.first_head -= rows_.group;
      ++rows_.first_query;
    }
    left_ -= stride_ * kStreamedRows;
  }

  __device__ __forceinline__ void find_visible() {
    for (; any(); step()) {
      const Limits limits = limits_of(p_.visibility, keys_.segment, rows_.first_query,
                                      end_of_queries(rows_, num_rows()));
      masked_ = limits.least < keys_.begin + keys_.size || num_rows() < kStreamedRows;
      if (limits.most > keys_.begin) return;
    }
  }

  const CudaScoreParams& p_;
  const FlashTile& keys_;
  PackedRows rows_;
  int64_t left_;  // rows from the tile's first one on
  int queries_of_step_, heads_of_step_, stride_;
  int head_, head_k_;
  bool masked_ = false;
};

// What the probabilities of a tile's rows need to know of them.
struct alignas(8) RowFacts {
  float log2_lse[kStreamedRows];  // base 2, infinite past the rows: their probability is 0
  int32_t limits[kStreamedRows];  // keys seen, counted from the block's first
};

// Probabilities of a chunk, in place of its products.
//   first  row of the tile that the chunk begins with
__device__ __forceinline__ void make_probabilities(const RowFacts& facts, int first, bool masked,
                                                   float log2_scale, ChunkProducts& products) {
  const int own = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kChunkRows / 8; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(&facts.log2_lse[first + 8 * n + own]);
#pragma unroll
    for (int i = 0; i < kGroupsOfWarp; ++i) {
      float(&x)[4] = products[i][n];
      x[0] = fast_exp2(fmaf(x[0], log2_scale, -lse.x));
      x[1] = fast_exp2(fmaf(x[1], log2_scale, -lse.y));
      x[2] = fast_exp2(fmaf(x[2], log2_scale, -lse.x));
      x[3] = fast_exp2(fmaf(x[3], log2_scale, -lse.y));
    }
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < kChunkRows / 8; ++n) {
    const int2 limit = *reinterpret_cast<const int2*>(&facts.limits[first + 8 * n + own]);
#pragma unroll
    for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = held_row(i, half);
        float* x = &products[i][n][2 * half];
        x[0] = key < limit.x ? x[0] : 0.0f;
        x[1] = key < limit.y ? x[1] : 0.0f;
      }
    }
  }
}

// into[i][half] = reduced with the chunk's values of that key.
template <Reduce kOp>
__device__ __forceinline__ void reduce_queries(const ChunkProducts& values,
                                               float (&into)[kGroupsOfWarp][2]) {
#pragma unroll
  for (int n = 0; n < kChunkRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
      for (int v = 0; v < 4; ++v) into[i][v / 2] = reduce(kOp, into[i][v / 2], values[i][n][v]);
    }
  }
}

// into = reduced with the chunk's values of another head, of the same keys and queries.
template <Reduce kOp>
__device__ __forceinline__ void reduce_heads(const ChunkProducts& values, ChunkProducts& into) {
#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int n = 0; n < kChunkRows / 8; ++n) {
#pragma unroll
      for (int v = 0; v < 4; ++v) into[i][n][v] = reduce(kOp, into[i][n][v], values[i][n][v]);
    }
  }
}

// One block has kHeldRows keys of one head, or nested of all heads, and every gridDim.y-th tile of
// rows. Sums, or largest, without the factors of means.
//   order        of keys, in tiles of kHeldRows; of one head if kNested
//   softmax_lse  [num_heads_q, total_q] natural logarithms
//   sums         [gridDim.y, num_heads_k, total_k], nested [gridDim.y, total_k]
template <int kHeadDim, MmaType kType, bool kNested>
__global__ void __launch_bounds__(kScoreThreads, kNested ? 2 : 3)
    tile_scores_kernel(CudaScoreParams p, FlashSegments segments, FlashOrder order,
                       const float* softmax_lse, float* sums) {
  using Shared = ScoreShared<kHeadDim>;
  PRUNEOPS_DYNAMIC_SHARED(uint16_t, held_tile);
  __shared__ RowFacts facts[2];
  __shared__ FlashTile keys;
  uint16_t* slots = held_tile + Shared::kHeldElements;
  const int thread = static_cast<int>(threadIdx.x);
  {
    Heads heads = p.heads;
    if (kNested) heads.num_heads_k = 1;
    FlashTile found;
    if (!find_tile(order, segments, heads, blockIdx.x, found)) return;
    if (thread == 0) keys = found;
    __syncthreads();
  }
  const Segment& segment = keys.segment;
  RowTiles<kNested> tiles(p, keys, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y));
  float column[kGroupsOfWarp][2] = {};
  if (tiles.any()) {
    HeldFragments<kHeadDim> held;
    ChunkProducts of_heads[kNested ? kChunksOfTile : 1] = {};
    const float log2_scale = p.softmax_scale * kLog2OfE;
    const auto load_keys = [&] {
      held.begin_load(held_tile, keys.size,
                      tile_source(p.k, 0, segment.k_begin + keys.begin, tiles.head_k()));
    };
    const auto load_rows = [&](int slot) {
      const auto load = [&](const auto& row_of) {
        load_tile_async<kStreamedRows, kHeadDim, kScoreThreads>(
            slots + slot * Shared::kSlotElements, thread, tiles.num_rows(), row_of);
      };
      if constexpr (kNested) {
        load(tile_source(p.q, 0, segment.q_begin + tiles.rows().first_query, tiles.head()));
      } else {
        load(packed_source(p.q, segment.q_begin, tiles.head(), tiles.rows()));
      }
    };
    // Of one row of the tile a thread; read long before they are put down.
    float lse = INFINITY;
    int32_t limit = 0;
    const auto read_facts = [&] {
      lse = INFINITY;
      limit = 0;
      if (thread >= tiles.num_rows()) return;
      int query, head;
      const PackedRows& rows = tiles.rows();
      rows.locate(thread, query, head);
      const int64_t in_segment = rows.first_query + query;
      lse = softmax_lse[(static_cast<int64_t>(tiles.head()) * rows.group + head) * p.total_q +
                        segment.q_begin + in_segment];
      limit = static_cast<int32_t>(key_limit(p.visibility, segment, in_segment) - keys.begin);
    };
    const auto put_facts = [&](int slot) {
      if (thread >= kStreamedRows) return;
      facts[slot].log2_lse[thread] = lse * kLog2OfE;
      facts[slot].limits[thread] = limit;
    };

    load_keys();
    load_rows(0);
    commit_copies();
    read_facts();
    put_facts(0);
    bool takes_keys = true;
    for (int slot = 0, more = 1; more != 0; slot ^= 1) {
      wait_for_copies<0>();
      __syncthreads();  // the tile is there, and nobody reads the one before
      if (takes_keys) held.take(held_tile);
      const bool masked = tiles.masked(), is_last_head = tiles.is_last_head();
      const int head_k = tiles.head_k();
      tiles.advance();
      more = tiles.any();
      if (more != 0) {
        takes_keys = tiles.head_k() != head_k;
        if (takes_keys) load_keys();
        load_rows(slot ^ 1);
        read_facts();
      }
      commit_copies();
#pragma unroll
      for (int chunk = 0; chunk < kChunksOfTile; ++chunk) {
        ChunkProducts products;
        held.template multiply<kType>(slots + slot * Shared::kSlotElements, chunk * kChunkRows,
                                      products);
        make_probabilities(facts[slot], chunk * kChunkRows, masked, log2_scale, products);
        // One branch for all elements: a choice at each would cost more than what is chosen.
        const bool largest_query = p.query_reduce == Reduce::kMax;
        if constexpr (!kNested) {
          if (largest_query) {
            reduce_queries<Reduce::kMax>(products, column);
          } else {
            reduce_queries<Reduce::kSum>(products, column);
          }
          continue;
        }
        if (!largest_query) {  // nested, so it is the heads
          reduce_heads<Reduce::kMax>(products, of_heads[chunk]);
          if (is_last_head) reduce_queries<Reduce::kSum>(of_heads[chunk], column);
        } else {
          reduce_heads<Reduce::kSum>(products, of_heads[chunk]);
          if (is_last_head) reduce_queries<Reduce::kMax>(of_heads[chunk], column);
        }
        if (is_last_head) set_zero(of_heads[chunk]);
      }
      if (more != 0) put_facts(slot ^ 1);
    }
    wait_for_copies<0>();
  }

  float* out = sums + segment.k_begin + keys.begin +
               (kNested ? blockIdx.y : blockIdx.y * p.heads.num_heads_k + keys.head_k) * p.total_k;
#pragma unroll
  for (int i = 0; i < kGroupsOfWarp; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = column[i][half];
#pragma unroll
      for (int flip = 1; flip < 4; flip *= 2) {
        x = reduce(p.query_reduce, x, __shfl_xor_sync(kAllLanes, x, flip));
      }
      const int key = held_row(i, half);
      if (thread % 4 == 0 && key < keys.size) out[key] = x;
    }
  }
}

}  // namespace pruneops
