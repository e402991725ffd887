// How much attention each key receives. Heads are reduced first, then query rows; probabilities
// exist only in tiles.

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

constexpr int64_t kScoreRows = 96;  // queries in a tile
constexpr int64_t kScoreKeys = 64;  // keys in a tile
static_assert(kScoreRows >= kDirectRows && kScoreKeys >= kDirectKeys, "direct tiles fit as well");

struct ScoreWorkspace {
  float* q;        // [kScoreRows, padded]
  float* k;        // panels, transposed: [padded, kScoreKeys]
  float* p;        // [kScoreRows, kScoreKeys]
  float* reduced;  // [kScoreRows, kScoreKeys] heads reduced
  float* column;   // [kScoreKeys]
  float* staging;  // [kDirectKeys, padded]
  int32_t* limit;  // [kScoreRows]
  int64_t padded;  // head_dim in whole vectors

  ScoreWorkspace(Arena& arena, int64_t head_dim) : padded(round_up(head_dim, kVecWidth)) {
    q = arena.take<float>(kScoreRows * padded);
    k = arena.take<float>(kScoreKeys * padded);
    p = arena.take<float>(kScoreRows * kScoreKeys);
    reduced = arena.take<float>(kScoreRows * kScoreKeys);
    column = arena.take<float>(kScoreKeys);
    staging = arena.take<float>(kDirectKeys * padded);
    limit = arena.take<int32_t>(kScoreRows);
  }
};

// Sum or max of two vectors of probabilities. They are not negative, so both reductions start at 0.
// A NaN wins over any number.
PRUNEOPS_INLINE Vec combine(Reduce reduce, Vec a, Vec b) {
  return reduce == Reduce::kMax ? vmax(a, b) : a + b;
}

PRUNEOPS_INLINE void reduce_into(Reduce reduce, float* accumulated, Vec value) {
  store(accumulated, combine(reduce, load(accumulated), value));
}

// column = column op rows [count, kScoreKeys]. Groups of rows are reduced first: one running sum
// over thousands of rows would lose digits that torch's pairwise sums keep.
PRUNEOPS_INLINE void reduce_rows(Reduce reduce, float* column, const float* rows, int64_t count,
                                 int64_t padded_keys) {
  constexpr int64_t kGroup = 8;
  for (int64_t j = 0; j < padded_keys; j += kVecWidth) {
    Vec total = zero();
    for (int64_t first = 0; first < count; first += kGroup) {
      Vec group = zero();
      for (int64_t r = first; r < min_of(first + kGroup, count); ++r) {
        group = combine(reduce, group, load(rows + r * kScoreKeys + j));
      }
      total = combine(reduce, total, group);
    }
    reduce_into(reduce, column + j, total);
  }
}

PRUNEOPS_INLINE float mean_factor(Reduce reduce, int64_t count) {
  return reduce == Reduce::kMean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
}

// scores[begin, end) of the segment from all its query rows.
inline void score_key_tile(const ScoreParams& params, const Segment& segment, int64_t begin,
                           int64_t end, const ScoreWorkspace& ws) {
  const Heads& heads = params.heads;
  const int64_t head_dim = heads.head_dim;
  const int64_t keys = end - begin;
  const int64_t padded_keys = round_up(keys, kVecWidth);
  const Scale scale(params.softmax_scale);
  const Vec log2_scale = broadcast(scale.log2);
  for (int64_t j = 0; j < kScoreKeys; ++j) ws.column[j] = 0.0f;
  for (int64_t first = 0; first < segment.q_len; first += kScoreRows) {
    const int64_t rows = min_of(kScoreRows, segment.q_len - first);
    if (row_limits(params.visibility, segment, 1, first, rows, ws.limit) <= begin) continue;
    int32_t visible[(kScoreRows + kMicroRows - 1) / kMicroRows];
    group_columns(ws.limit, rows, kMicroRows, begin, keys, visible);
    for (int64_t i = 0; i < rows * kScoreKeys; i += kVecWidth) store(ws.reduced + i, zero());

    for (int64_t head = 0; head < heads.num_heads_q; ++head) {
      if (head % heads.group == 0) {
        Pack<FloatOps<float>>::transposed(ws.k, key_rows(params.k, segment, head / heads.group),
                                          begin, keys, head_dim, ws.staging);
      }
      Pack<FloatOps<float>>::rows(ws.q, ws.padded, rows_of(params.q, 0, segment.q_begin, head, 1),
                                  first, rows, head_dim);
      Product<FloatOps<float>> product;
      product.a = ws.q;
      product.lda = ws.padded;
      product.b = ws.k;
      product.b_depth = product.depth = head_dim;
      product.c = ws.p;
      product.ldc = kScoreKeys;
      product.rows = rows;
      product.cols = keys;
      product.col_limit = visible;
      product.scale = scale.sign;
      multiply<FloatOps<float>, Update::kScale, false>(product);

      const float* lse = params.softmax_lse + head * params.lse_stride + segment.q_begin + first;
      for (int64_t r = 0; r < rows; ++r) {
        float* p = ws.p + r * kScoreKeys;
        const int64_t count = min_of<int64_t>(ws.limit[r] - begin, keys);
        if (count <= 0) continue;
        const int64_t padded = pad_row(p, count, -INFINITY);
        const Vec minus_lse = broadcast(-lse[r] * kLog2E);
        for (int64_t j = 0; j < padded; j += kVecWidth) {
          reduce_into(params.head_reduce, ws.reduced + r * kScoreKeys + j,
                      exp2(fma(load(p + j), log2_scale, minus_lse)));
        }
      }
    }
    reduce_rows(params.query_reduce, ws.column, ws.reduced, rows, padded_keys);
  }
  const float factor = mean_factor(params.head_reduce, heads.num_heads_q) *
                       mean_factor(params.query_reduce, segment.q_len);
  float* out = params.scores + segment.k_begin + begin;
  for (int64_t j = 0; j < keys; ++j) out[j] = ws.column[j] * factor;
}

inline int64_t score_workspace_bytes(int64_t head_dim) {
  Arena arena(nullptr);
  ScoreWorkspace ws(arena, head_dim);
  return arena.used();
}

inline void column_scores(const ScoreParams& params, const ParallelFor& parallel, char* workspace) {
  const int64_t bytes = score_workspace_bytes(params.heads.head_dim);
  run_tasks(parallel, params.num_blocks, workspace, bytes, [&](int64_t task, char* base) {
    Arena arena(base);
    const ScoreWorkspace ws(arena, params.heads.head_dim);
    const Block& block = params.blocks[task];
    for (int64_t key = block.begin; key < block.end; key += kScoreKeys) {
      score_key_tile(params, params.segments[block.segment], key,
                     min_of(key + kScoreKeys, block.end), ws);
    }
  });
}

// Where direct_scores keeps the score of (query, head) with the first key of the packed tensor.
PRUNEOPS_INLINE float* raw_row(const ScoreParams& params, int64_t query, int64_t head) {
  return params.raw_scores + (head * kDirectQueries + query) * params.total_k;
}

// Raw scores of the block's keys with the query rows of `count` key heads from head_k on.
inline void direct_raw_scores(const ScoreParams& params, const Block& block, int64_t head_k,
                              int64_t count, const ScoreWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const Rows keys_of = rows_of(params.k, 0, segment.k_begin, head_k, 1);
  const Scale scale(params.softmax_scale);
  for (int64_t query = 0; query < segment.q_len; ++query) {
    for (int64_t row = 0; row < heads.group; row += kDirectRows) {
      const int64_t rows = min_of(kDirectRows, heads.group - row);
      const int64_t head_q = head_k * heads.group + row;
      // All rows are heads of one query. With several key heads the whole groups follow each other.
      Pack<FloatOps<float>>::rows(
          ws.q, ws.padded, rows_of(params.q, 0, segment.q_begin + query, head_q, count * rows), 0,
          count * rows, heads.head_dim);
      for (int64_t key = block.begin; key < block.end; key += kDirectKeys) {
        const int64_t keys = min_of(kDirectKeys, block.end - key);
        with_direct_tile(keys_of, key, keys, heads.head_dim, ws.staging, [&](const auto& tile) {
          direct_scores_tile(ws.q, ws.padded, count, rows, tile, keys, ws.padded, ws.p, kDirectKeys,
                             scale.sign);
        });
        for (int64_t r = 0; r < count * rows; ++r) {
          memcpy(raw_row(params, query, head_q + r) + segment.k_begin + key, ws.p + r * kDirectKeys,
                 static_cast<size_t>(keys) * sizeof(float));
        }
      }
    }
  }
}

// row_lse of one (query, head): base-2 logarithm of the sum of exp2 over the visible keys.
inline void direct_row_lse(const ScoreParams& params, const Segment& segment, int64_t query,
                           int64_t head) {
  int32_t limit;
  row_limits(params.visibility, segment, 1, query, 1, &limit);
  const float* raw = raw_row(params, query, head) + segment.k_begin;
  const int64_t whole = limit / kVecWidth * kVecWidth;
  Vec most = broadcast(-INFINITY);
  for (int64_t j = 0; j < whole; j += kVecWidth) most = vmax(load(raw + j), most);
  float m = reduce_max(most);
  for (int64_t j = whole; j < limit; ++j) m = max_of(m, raw[j]);
  const Vec factor = broadcast(Scale(params.softmax_scale).log2);
  const float shift = m == -INFINITY ? 0.0f : m * first_lane(factor);
  const Vec minus_shift = broadcast(-shift);
  Vec sum = zero();
  for (int64_t j = 0; j < whole; j += kVecWidth) {
    sum = sum + exp2(fma(load(raw + j), factor, minus_shift));
  }
  float total = reduce_sum(sum);
  for (int64_t j = whole; j < limit; ++j) {
    total += first_lane(exp2(fma(broadcast(raw[j]), factor, minus_shift)));
  }
  params.row_lse[head * params.total_q + segment.q_begin + query] =
      total == 0.0f ? -INFINITY : shift + log2f(total);
}

// Scores of the block's keys from the raw scores.
inline void direct_reduce(const ScoreParams& params, const Block& block, const ScoreWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const float factor = mean_factor(params.head_reduce, heads.num_heads_q) *
                       mean_factor(params.query_reduce, segment.q_len);
  const Vec log2_scale = broadcast(Scale(params.softmax_scale).log2);
  for (int64_t key = block.begin; key < block.end; key += kScoreKeys) {
    const int64_t keys = min_of(kScoreKeys, block.end - key);
    for (int64_t j = 0; j < kScoreKeys; ++j) ws.column[j] = 0.0f;
    for (int64_t query = 0; query < segment.q_len; ++query) {
      int32_t limit;
      row_limits(params.visibility, segment, 1, query, 1, &limit);
      const int64_t count = min_of<int64_t>(limit - key, keys);
      if (count <= 0) continue;
      for (int64_t j = 0; j < kScoreKeys; ++j) ws.reduced[j] = 0.0f;
      for (int64_t head = 0; head < heads.num_heads_q; ++head) {
        memcpy(ws.p, raw_row(params, query, head) + segment.k_begin + key,
               static_cast<size_t>(count) * sizeof(float));
        const int64_t padded = pad_row(ws.p, count, -INFINITY);
        const Vec minus_lse =
            broadcast(-params.row_lse[head * params.total_q + segment.q_begin + query]);
        for (int64_t j = 0; j < padded; j += kVecWidth) {
          reduce_into(params.head_reduce, ws.reduced + j,
                      exp2(fma(load(ws.p + j), log2_scale, minus_lse)));
        }
      }
      for (int64_t j = 0; j < kScoreKeys; j += kVecWidth) {
        reduce_into(params.query_reduce, ws.column + j, load(ws.reduced + j));
      }
    }
    float* out = params.scores + segment.k_begin + key;
    for (int64_t j = 0; j < keys; ++j) out[j] = ws.column[j] * factor;
  }
}

// Scores when every segment has at most kDirectQueries query rows: keys are read once, in place.
inline void direct_scores(const ScoreParams& params, const ParallelFor& parallel, char* workspace) {
  const Heads& heads = params.heads;
  const int64_t bytes = score_workspace_bytes(heads.head_dim);
  const auto with_workspace = [&](int64_t count, const auto& f) {
    run_tasks(parallel, count, workspace, bytes, [&](int64_t task, char* base) {
      Arena arena(base);
      const ScoreWorkspace ws(arena, heads.head_dim);
      f(task, ws);
    });
  };
  const int64_t together = heads_together(params.k, heads, heads.group);
  const int64_t parts = (heads.num_heads_k + together - 1) / together;
  with_workspace(params.num_blocks * parts, [&](int64_t task, const ScoreWorkspace& ws) {
    const int64_t head_k = task % parts * together;
    direct_raw_scores(params, params.blocks[task / parts], head_k,
                      min_of(together, heads.num_heads_k - head_k), ws);
  });
  with_workspace(params.num_segments * heads.num_heads_q, [&](int64_t task, const ScoreWorkspace&) {
    const Segment& segment = params.segments[task / heads.num_heads_q];
    for (int64_t query = 0; query < segment.q_len; ++query) {
      direct_row_lse(params, segment, query, task % heads.num_heads_q);
    }
  });
  with_workspace(params.num_blocks, [&](int64_t task, const ScoreWorkspace& ws) {
    direct_reduce(params, params.blocks[task], ws);
  });
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
