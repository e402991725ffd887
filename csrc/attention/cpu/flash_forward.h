// Attention forward: blocks of query rows against tiles of keys with an online softmax. One task is
// one block of rows of one key head; the heads of a group share each packed key tile. What a row's
// softmax weighs and leaves behind is a template parameter: PlainSoftmax here, another in policy.h.

#pragma once

#include "attention/attention.h"
#include "attention/cpu/direct.h"
#include "attention/cpu/microkernel.h"
#include "attention/cpu/pack.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tasks.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int64_t kQueryBlockRows = 288;  // rows that share one packing of a key tile
constexpr int64_t kSubRows = 48;          // rows whose scores stay in the first-level cache
constexpr int64_t kTileKeys = 128;        // keys in a tile
constexpr int64_t kFewRows = 32;          // segments up to here do without packed tiles
constexpr int64_t kSubGroups = kSubRows / kMicroRows;
static_assert(kSubRows % kMicroRows == 0 && kQueryBlockRows % kSubRows == 0, "whole row groups");
static_assert(kFewRows <= kDirectRows && kDirectRows <= kQueryBlockRows, "direct rows fit as well");
static_assert(kTileKeys * kSubRows >= kDirectKeys * kDirectRows, "direct scores fit as well");
static_assert(kTileKeys % (kVecWidth * 2) == 0, "whole vectors and pairs");

struct ForwardWorkspace {
  float* q;         // [kQueryBlockRows, padded]; pairs use half of each array below
  float* k;         // panels of one tile: [padded, kTileKeys]
  float* v;         // panels of one tile: [kTileKeys, padded]
  float* scores;    // [kSubRows, kTileKeys]
  float* weights;   // [kSubRows, kTileKeys / 2] bf16 pairs
  float* out;       // [kQueryBlockRows, padded]
  float* staging;   // [max(kVecWidth, kDirectKeys), padded]
  int32_t* limit;   // [kQueryBlockRows]
  RowStates state;  // of kQueryBlockRows rows
  int64_t padded;   // head_dim in whole vectors

  ForwardWorkspace(Arena& arena, int64_t head_dim) : padded(round_up(head_dim, kVecWidth)) {
    q = arena.take<float>(kQueryBlockRows * padded);
    k = arena.take<float>(kTileKeys * padded);
    v = arena.take<float>(kTileKeys * padded);
    scores = arena.take<float>(kSubRows * kTileKeys);
    weights = arena.take<float>(kSubRows * kTileKeys / 2);
    out = arena.take<float>(kQueryBlockRows * padded);
    staging = arena.take<float>(kDirectKeys * padded);
    limit = arena.take<int32_t>(kQueryBlockRows);
    state.max = arena.take<float>(kQueryBlockRows);
    state.sum = arena.take<float>(kQueryBlockRows * kVecWidth);
    state.alpha = arena.take<float>(kQueryBlockRows);
  }
};

// Decided by the segment, not the block: how rows are cut into blocks must not show in the result.
PRUNEOPS_INLINE bool has_few_rows(const Segment& segment, const Heads& heads) {
  return segment.q_len * heads.group <= kFewRows;
}

// The softmax of varlen_attention: all keys count alike, and a row leaves its LSE.
struct PlainSoftmax {
  // What is known of the keys of a tile, by one thread.
  struct Tile {
    PRUNEOPS_INLINE Tile(const PlainSoftmax&, const Segment&) {}
    PRUNEOPS_INLINE void load(int64_t /*first_key*/, int64_t /*keys*/) {}
    // Weights for a row that sees the tile's first `visible` keys, or all if there are fewer.
    PRUNEOPS_INLINE EqualWeights row(int64_t /*visible*/) { return {}; }
  };

  // Takes the state of a finished row and returns what to multiply its sum of values by.
  //   sum_of_values  [round_up(head_dim, kVecWidth)]
  PRUNEOPS_INLINE float finish(const ForwardParams& params, const Segment& segment, int64_t query,
                               int64_t head, float max, float sum, float* /*sum_of_values*/) const {
    params.softmax_lse[head * params.lse_stride + segment.q_begin + query] = natural_lse(max, sum);
    return sum == 0.0f ? 0.0f : 1.0f / sum;
  }
};

// Scores of the sub-block to weights in the element type of the product with the values.
template <class Tile>
PRUNEOPS_INLINE void softmax_rows(const ForwardWorkspace& ws, FloatOps<float>, const Scale& scale,
                                  int64_t row, int64_t rows, int64_t first_key,
                                  const int32_t* visible, Tile& tile) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t keys = visible[r / kMicroRows];
    const int64_t limit = ws.limit[row + r] - first_key;
    float* s = ws.scores + r * kTileKeys;
    online_softmax(s, min_of(limit, keys), round_up(keys, kVecWidth), scale, s, ws.state, row + r,
                   tile.row(limit));
  }
}

PRUNEOPS_INLINE const float* weights_of(const ForwardWorkspace& ws, FloatOps<float>) {
  return ws.scores;
}

#if defined(PRUNEOPS_ISA_AVX512BF16)
template <class Tile>
PRUNEOPS_INLINE void softmax_rows(const ForwardWorkspace& ws, PairOps, const Scale& scale,
                                  int64_t row, int64_t rows, int64_t first_key,
                                  const int32_t* visible, Tile& tile) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t keys = visible[r / kMicroRows];
    const int64_t limit = ws.limit[row + r] - first_key;
    online_softmax(ws.scores + r * kTileKeys, min_of(limit, keys), round_up(keys, kVecWidth), scale,
                   reinterpret_cast<BFloat16*>(ws.weights) + r * kTileKeys, ws.state, row + r,
                   tile.row(limit));
  }
}

PRUNEOPS_INLINE const uint32_t* weights_of(const ForwardWorkspace& ws, PairOps) {
  return reinterpret_cast<const uint32_t*>(ws.weights);
}
#endif

// Rows [block.begin, block.end) against all visible keys, in tiles that are packed once for all
// rows.
template <class Ops, class Tile>
void forward_tiles(const ForwardParams& params, const Block& block, int64_t head_k,
                   const ForwardWorkspace& ws, int64_t visible_keys, Tile& tile) {
  using A = typename Ops::A;
  using B = typename Ops::B;
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const int64_t head_dim = heads.head_dim;
  const int64_t rows = block.end - block.begin;
  const bool with_values = params.out.data != nullptr;
  const Scale scale(params.softmax_scale);
  const int64_t steps = Pack<Ops>::depth(head_dim);
  const int64_t ld_q = round_up(steps, kVecWidth);
  A* q = reinterpret_cast<A*>(ws.q);
  B* k = reinterpret_cast<B*>(ws.k);
  B* v = reinterpret_cast<B*>(ws.v);
  const Rows keys_of = key_rows(params.k, segment, head_k);
  const Rows values_of = key_rows(params.v, segment, head_k);
  Pack<Ops>::rows(q, ld_q, query_rows(params.q, segment, heads, head_k), block.begin, rows,
                  head_dim);

  for (int64_t first = 0; first < visible_keys; first += kTileKeys) {
    const int64_t keys = min_of(kTileKeys, visible_keys - first);
    Pack<Ops>::transposed(k, keys_of, first, keys, head_dim, ws.staging);
    if (with_values) Pack<Ops>::panels(v, values_of, first, keys, head_dim);
    tile.load(first, keys);
    for (int64_t row = 0; row < rows; row += kSubRows) {
      const int64_t sub_rows = min_of(kSubRows, rows - row);
      int32_t visible[kSubGroups], depth_end[kSubGroups];
      if (group_columns(ws.limit + row, sub_rows, kMicroRows, first, keys, visible) == 0) continue;

      Product<Ops> qk;
      qk.a = q + row * ld_q;
      qk.lda = ld_q;
      qk.b = k;
      qk.b_depth = qk.depth = steps;
      qk.c = ws.scores;
      qk.ldc = kTileKeys;
      qk.rows = sub_rows;
      qk.cols = keys;
      qk.col_limit = visible;
      qk.scale = scale.sign;
      multiply<Ops, Update::kScale, false>(qk);

      softmax_rows(ws, Ops(), scale, row, sub_rows, first, visible, tile);
      if (!with_values) continue;

      for (int64_t g = 0; g < kSubGroups; ++g) {
        depth_end[g] = static_cast<int32_t>(Pack<Ops>::depth(visible[g]));
      }
      Product<Ops> pv;
      pv.a = weights_of(ws, Ops());
      pv.lda = Pack<Ops>::depth(kTileKeys);
      pv.b = v;
      pv.b_depth = pv.depth = Pack<Ops>::depth(keys);
      pv.c = ws.out + row * ws.padded;
      pv.ldc = ws.padded;
      pv.rows = sub_rows;
      pv.cols = head_dim;
      pv.depth_end = depth_end;
      pv.alpha = ws.state.alpha + row;
      multiply<Ops, Update::kRescale, false>(pv);
    }
  }
}

// The same for few rows, reading keys and values in place, for `count` key heads from head_k on.
// The rows of the heads follow each other.
template <class Tile>
void forward_direct(const ForwardParams& params, const Block& block, int64_t head_k, int64_t count,
                    const ForwardWorkspace& ws, int64_t visible_keys, Tile& tile) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const int64_t rows = block.end - block.begin;
  const int64_t padded = ws.padded;
  const Scale scale(params.softmax_scale);
  const Rows keys_of = key_rows(params.k, segment, head_k);
  const Rows values_of = key_rows(params.v, segment, head_k);
  for (int64_t h = 0; h < count; ++h) {
    Pack<FloatOps<float>>::rows(ws.q + h * rows * padded, padded,
                                query_rows(params.q, segment, heads, head_k + h), block.begin, rows,
                                heads.head_dim);
  }
  for (int64_t first = 0; first < visible_keys; first += kDirectKeys) {
    const int64_t keys = min_of(kDirectKeys, visible_keys - first);
    with_direct_tile(keys_of, first, keys, heads.head_dim, ws.staging, [&](const auto& k) {
      direct_scores_tile(ws.q, padded, count, rows, k, keys, padded, ws.scores, kDirectKeys,
                         scale.sign);
    });
    tile.load(first, keys);
    for (int64_t r = 0; r < count * rows; ++r) {
      const int64_t limit = ws.limit[r % rows] - first;
      float* s = ws.scores + r * kDirectKeys;
      online_softmax(s, min_of(limit, keys), round_up(keys, kVecWidth), scale, s, ws.state, r,
                     tile.row(limit));
    }
    if (params.out.data == nullptr) continue;
    with_direct_tile(values_of, first, keys, heads.head_dim, ws.staging, [&](const auto& v) {
      direct_values_tile(ws.scores, kDirectKeys, count, rows, v, keys, padded, ws.out, padded,
                         ws.state.alpha);
    });
  }
}

// Normalises the block's rows of one key head, whose state and sums begin at row `row`, and writes
// them.
template <class Softmax>
void finish_rows(const ForwardParams& params, const Softmax& softmax, const Block& block,
                 int64_t head_k, int64_t row, const ForwardWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const Rows out = query_rows(params.out, segment, heads, head_k);
  for (int64_t r = block.begin; r < block.end; ++r, ++row) {
    const float sum = reduce_sum(load(ws.state.sum + row * kVecWidth));
    const int64_t head = head_k * heads.group + r % heads.group;
    float* values = ws.out + row * ws.padded;
    const float factor =
        softmax.finish(params, segment, r / heads.group, head, ws.state.max[row], sum, values);
    if (params.out.data != nullptr) {
      store_row(out.at(r), out.type, values, heads.head_dim, factor);
    }
  }
}

// `count` key heads from head_k on; more than one only for a segment of few rows.
template <class Softmax>
void forward_block(const ForwardParams& params, const Softmax& softmax, const Block& block,
                   int64_t head_k, int64_t count, const ForwardWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const int64_t rows = block.end - block.begin;
  const int64_t visible_keys =
      row_limits(params.visibility, segment, heads.group, block.begin, rows, ws.limit);
  reset(ws.state, count * rows);
  for (int64_t i = 0; i < count * rows * ws.padded; i += kVecWidth) store(ws.out + i, zero());

  typename Softmax::Tile tile(softmax, segment);
  if (has_few_rows(segment, heads)) {
    forward_direct(params, block, head_k, count, ws, visible_keys, tile);
#if defined(PRUNEOPS_ISA_AVX512BF16)
  } else if (params.q.type == FloatType::kBFloat16) {
    forward_tiles<PairOps>(params, block, head_k, ws, visible_keys, tile);
#endif
  } else {
    forward_tiles<FloatOps<float>>(params, block, head_k, ws, visible_keys, tile);
  }
  for (int64_t h = 0; h < count; ++h) finish_rows(params, softmax, block, head_k + h, h * rows, ws);
}

inline int64_t forward_workspace_bytes(int64_t head_dim) {
  Arena arena(nullptr);
  ForwardWorkspace ws(arena, head_dim);
  return arena.used();
}

template <class Softmax>
void run_forward(const ForwardParams& params, const Softmax& softmax, const ParallelFor& parallel,
                 char* workspace) {
  const Heads& heads = params.heads;
  const int64_t bytes = forward_workspace_bytes(heads.head_dim);
  const int64_t heads_k = heads.num_heads_k;
  const int64_t tasks = params.num_blocks * heads_k;
  // Heads that are worked on together must leave enough tasks for the threads.
  const int64_t most_together = max_of<int64_t>(tasks / (2 * max_of(parallel.num_threads, 1)), 1);
  run_tasks(parallel, tasks, workspace, bytes, [&](int64_t task, char* base) {
    const Block& block = params.blocks[task / heads_k];
    const int64_t head_k = task % heads_k;
    int64_t together = 1;
    if (has_few_rows(params.segments[block.segment], heads)) {
      together = min_of(heads_together(params.k, heads, block.end - block.begin), most_together);
      if (head_k % together != 0) return;
    }
    Arena arena(base);
    const ForwardWorkspace ws(arena, heads.head_dim);
    forward_block(params, softmax, block, head_k, min_of(together, heads_k - head_k), ws);
  });
}

inline void forward(const ForwardParams& params, const ParallelFor& parallel, char* workspace) {
  run_forward(params, PlainSoftmax(), parallel, workspace);
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
