// One new token per sequence against its cache slots. The keys are split into ranges that are
// worked on independently and combined afterwards, so that one long sequence keeps all threads
// busy.

#pragma once

#include "attention/attention.h"
#include "attention/cpu/direct.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tasks.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

struct DecodeWorkspace {
  float* q;         // [kDirectRows, padded]
  float* scores;    // [kDirectRows, kDirectKeys]
  float* out;       // [kDirectRows, padded]
  float* staging;   // [kDirectKeys, padded]
  RowStates state;  // of kDirectRows rows
  int64_t padded;   // head_dim in whole vectors

  DecodeWorkspace(Arena& arena, int64_t head_dim) : padded(round_up(head_dim, kVecWidth)) {
    q = arena.take<float>(kDirectRows * padded);
    scores = arena.take<float>(kDirectRows * kDirectKeys);
    out = arena.take<float>(kDirectRows * padded);
    staging = arena.take<float>(kDirectKeys * padded);
    state.max = arena.take<float>(kDirectRows);
    state.sum = arena.take<float>(kDirectRows * kVecWidth);
    state.alpha = arena.take<float>(kDirectRows);
  }
};

// Unnormalised result of `count` key heads from head_k on, each with query rows [first_row,
// first_row + rows) of its group, over keys [begin, end) of one sequence.
inline void decode_split(const DecodeParams& params, int64_t split, int64_t b, int64_t head_k,
                         int64_t count, int64_t first_row, int64_t rows, int64_t begin, int64_t end,
                         const DecodeWorkspace& ws) {
  const Heads& heads = params.heads;
  const int64_t head_dim = heads.head_dim;
  const int64_t head_q = head_k * heads.group + first_row;
  const int64_t all_rows = count * rows;
  const Scale scale(params.softmax_scale);
  const Rows keys_of = rows_of(params.k, b, 0, head_k, 1);
  const Rows values_of = rows_of(params.v, b, 0, head_k, 1);
  // All rows are heads of one token. With several key heads the whole groups follow each other.
  Pack<FloatOps<float>>::rows(ws.q, ws.padded, rows_of(params.q, 0, b, head_q, all_rows), 0,
                              all_rows, head_dim);
  reset(ws.state, all_rows);
  for (int64_t i = 0; i < all_rows * ws.padded; i += kVecWidth) store(ws.out + i, zero());

  for (int64_t first = begin; first < end; first += kDirectKeys) {
    const int64_t keys = min_of(kDirectKeys, end - first);
    with_direct_tile(keys_of, first, keys, head_dim, ws.staging, [&](const auto& tile) {
      direct_scores_tile(ws.q, ws.padded, count, rows, tile, keys, ws.padded, ws.scores,
                         kDirectKeys, scale.sign);
    });
    for (int64_t r = 0; r < all_rows; ++r) {
      float* s = ws.scores + r * kDirectKeys;
      if (params.raw_scores != nullptr) {
        memcpy(params.raw_scores + (b * heads.num_heads_q + head_q + r) * params.capacity + first,
               s, static_cast<size_t>(keys) * sizeof(float));
      }
      online_softmax(s, keys, 0, scale, s, ws.state, r);
    }
    with_direct_tile(values_of, first, keys, head_dim, ws.staging, [&](const auto& tile) {
      direct_values_tile(ws.scores, kDirectKeys, count, rows, tile, keys, ws.padded, ws.out,
                         ws.padded, ws.state.alpha);
    });
  }

  const int64_t result = (split * params.batch + b) * heads.num_heads_q + head_q;
  for (int64_t r = 0; r < all_rows; ++r) {
    memcpy(params.partial_out + (result + r) * head_dim, ws.out + r * ws.padded,
           static_cast<size_t>(head_dim) * sizeof(float));
    params.partial_max[result + r] = ws.state.max[r];
    params.partial_sum[result + r] = reduce_sum(load(ws.state.sum + r * kVecWidth));
  }
}

// Adds up the splits of one query head in order; row: [head_dim] fp32 scratch.
inline void decode_combine(const DecodeParams& params, int64_t b, int64_t head, float* row) {
  const Heads& heads = params.heads;
  const int64_t head_dim = heads.head_dim;
  const int64_t stride = params.batch * heads.num_heads_q;
  const int64_t first = b * heads.num_heads_q + head;
  float m = -INFINITY;
  for (int64_t s = 0; s < params.num_splits; ++s) {
    const float split_max = params.partial_max[first + s * stride];
    if (split_max > m) m = split_max;
  }
  float sum = 0.0f;
  for (int64_t d = 0; d < head_dim; ++d) row[d] = 0.0f;
  for (int64_t s = 0; s < params.num_splits; ++s) {
    const int64_t i = first + s * stride;
    if (params.partial_sum[i] == 0.0f) continue;
    const float weight =
        first_lane(exp2(broadcast(m == -INFINITY ? 0.0f : params.partial_max[i] - m)));
    sum += weight * params.partial_sum[i];
    const float* part = params.partial_out + i * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) row[d] += weight * part[d];
  }
  params.softmax_lse[head * params.batch + b] = natural_lse(m, sum);
  const Rows out = rows_of(params.out, 0, b, head, 1);
  store_row(out.at(0), out.type, row, head_dim, sum == 0.0f ? 0.0f : 1.0f / sum);
}

// scores[b, begin .. end) = mean over the query heads of the softmax; 0 past the sequence.
inline void decode_scores(const DecodeParams& params, int64_t b, int64_t begin, int64_t end) {
  const int64_t heads_q = params.heads.num_heads_q;
  const Vec factor = broadcast(Scale(params.softmax_scale).log2);
  float* scores = params.scores + b * params.capacity;
  const int64_t used = min_of(max_of<int64_t>(params.lengths[b], begin), end);
  for (int64_t j = begin; j < end; ++j) scores[j] = 0.0f;
  for (int64_t head = 0; head < heads_q; ++head) {
    const float* raw = params.raw_scores + (b * heads_q + head) * params.capacity;
    const Vec minus_lse = broadcast(-params.softmax_lse[head * params.batch + b] * kLog2E);
    int64_t j = begin;
    for (; j + kVecWidth <= used; j += kVecWidth) {
      store(scores + j, load(scores + j) + exp2(fma(load(raw + j), factor, minus_lse)));
    }
    for (; j < used; ++j) {
      scores[j] += first_lane(exp2(fma(broadcast(raw[j]), factor, minus_lse)));
    }
  }
  const float mean = 1.0f / static_cast<float>(heads_q);
  for (int64_t j = begin; j < used; ++j) scores[j] *= mean;
}

inline int64_t decode_workspace_bytes(int64_t head_dim) {
  Arena arena(nullptr);
  DecodeWorkspace ws(arena, head_dim);
  return arena.used();
}

inline void decode(const DecodeParams& params, const ParallelFor& parallel, char* workspace) {
  const Heads& heads = params.heads;
  const int64_t bytes = decode_workspace_bytes(heads.head_dim);
  const int64_t splits = params.num_splits;
  const int64_t together = heads_together(params.k, heads, heads.group);
  const int64_t parts = (heads.num_heads_k + together - 1) / together;
  run_tasks(parallel, params.batch * splits * parts, workspace, bytes,
            [&](int64_t task, char* base) {
              Arena arena(base);
              const DecodeWorkspace ws(arena, heads.head_dim);
              const int64_t head_k = task % parts * together;
              const int64_t split = task / parts % splits;
              const int64_t b = task / parts / splits;
              const int64_t length = params.lengths[b];
              const int64_t count = min_of(together, heads.num_heads_k - head_k);
              // Whole tiles a split, so that the order of additions depends on num_splits only.
              const int64_t per_split = round_up((length + splits - 1) / splits, kDirectKeys);
              const int64_t begin = min_of(split * per_split, length);
              const int64_t end = min_of(begin + per_split, length);
              for (int64_t row = 0; row < heads.group; row += kDirectRows) {
                decode_split(params, split, b, head_k, count, row,
                             min_of(kDirectRows, heads.group - row), begin, end, ws);
              }
            });
  // Combining is little work; a second pass over the pool pays only for many partial results.
  ParallelFor combine = parallel;
  constexpr int64_t kSerialElements = 1 << 16;
  if (params.batch * splits * heads.num_heads_q * heads.head_dim <= kSerialElements) {
    combine.num_threads = 1;
  }
  run_tasks(combine, params.batch * heads.num_heads_q, workspace, bytes,
            [&](int64_t task, char* base) {
              decode_combine(params, task / heads.num_heads_q, task % heads.num_heads_q,
                             reinterpret_cast<float*>(base));
            });
  if (params.scores == nullptr) return;
  constexpr int64_t kScoreKeys = 512;
  const int64_t chunks = (params.capacity + kScoreKeys - 1) / kScoreKeys;
  run_tasks(parallel, params.batch * chunks, workspace, bytes, [&](int64_t task, char*) {
    const int64_t begin = task % chunks * kScoreKeys;
    decode_scores(params, task / chunks, begin, min_of(begin + kScoreKeys, params.capacity));
  });
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
