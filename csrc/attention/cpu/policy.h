// Attention in which each key has a weight of its own, the policy: the tiles of flash_forward.h and
// flash_backward.h with another softmax. With E = exp(S - max), weights G (policy[j], 1 for a row's
// own key), den = sum(E G) + epsilon and delta = rowsum(dO * O):
//   P = E G / den     dS = P * (dO V^T - delta)     dpolicy = colsum(E / den * (dO V^T - delta))
// where dpolicy leaves out a row's own key, and dV = P^T dO + epsilon / length * sum(dO / den). The
// maximum counts as a constant.

#pragma once

#include "attention/cpu/flash_backward.h"
#include "attention/cpu/flash_forward.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// The weights of a tile's keys for one row, as long as the object lives: the last key the row sees
// is its own and counts 1, and those behind it in the same vector count 0, whatever their policy.
class RowWeights {
 public:
  //   weights  [keys of the tile]      own  the row's own key, any number if it is not in the tile
  PRUNEOPS_INLINE RowWeights(float* weights, int64_t keys, int64_t own)
      : weights_(weights),
        changed_(own >= 0 && own < keys ? weights + own / kVecWidth * kVecWidth : nullptr) {
    if (changed_ == nullptr) return;
    saved_ = load(changed_);
    weights[own] = 1.0f;
    pad_row(weights, own + 1, 0.0f);
  }
  PRUNEOPS_INLINE ~RowWeights() {
    if (changed_ != nullptr) store(changed_, saved_);
  }
  RowWeights(const RowWeights&) = delete;
  RowWeights& operator=(const RowWeights&) = delete;

  PRUNEOPS_INLINE Vec operator()(Vec p, int64_t i) const { return p * load(weights_ + i); }

 private:
  float* weights_;
  float* changed_;  // the vector that holds the row's own key, or null
  Vec saved_ = zero();
};

// The policy of the keys of a tile of at most kMost, in whole vectors.
template <int64_t kMost>
class PolicyTile {
 public:
  PRUNEOPS_INLINE void load(const float* policy, int64_t keys) {
    keys_ = keys;
    memcpy(weights_, policy, static_cast<size_t>(keys) * sizeof(float));
    pad_row(weights_, keys, 0.0f);
  }
  // For a row that sees the tile's first `visible` keys; its own is the last of all it sees.
  PRUNEOPS_INLINE RowWeights row(int64_t visible) {
    return RowWeights(weights_, keys_, visible - 1);
  }

 private:
  alignas(64) float weights_[kMost];
  int64_t keys_ = 0;
};

// Where the sum over a segment's rows is kept.
PRUNEOPS_INLINE float* segment_sum(float* sums, const Heads& heads, int64_t segment,
                                   int64_t head_k) {
  return sums + (segment * heads.num_heads_k + head_k) * padded_head_dim(heads.head_dim);
}

// sum [padded] = sum over `count` rows of factor(r) * row r. Groups of rows are added up first: one
// running sum over thousands of rows would lose digits.
//   scratch  [2, padded]
template <class Factor>
void sum_rows(const Rows& rows, int64_t count, int64_t head_dim, const Factor& factor,
              float* scratch, float* sum) {
  constexpr int64_t kGroup = 32;
  const int64_t padded = round_up(head_dim, kVecWidth);
  float* row = scratch;
  float* group = scratch + padded;
  for (int64_t d = 0; d < padded; d += kVecWidth) store(sum + d, zero());
  for (int64_t first = 0; first < count; first += kGroup) {
    for (int64_t d = 0; d < padded; d += kVecWidth) store(group + d, zero());
    for (int64_t r = first; r < min_of(first + kGroup, count); ++r) {
      load_row(row, rows.at(r), rows.type, 0, head_dim, padded);
      const Vec f = broadcast(factor(r));
      for (int64_t d = 0; d < padded; d += kVecWidth) {
        store(group + d, fma(load(row + d), f, load(group + d)));
      }
    }
    for (int64_t d = 0; d < padded; d += kVecWidth) {
      store(sum + d, load(sum + d) + load(group + d));
    }
  }
}

struct PolicySoftmax {
  const PolicyForwardParams& params;

  class Tile {
   public:
    PRUNEOPS_INLINE Tile(const PolicySoftmax& softmax, const Segment& segment)
        : policy_(softmax.params.policy + segment.k_begin) {}
    PRUNEOPS_INLINE void load(int64_t first_key, int64_t keys) {
      tile_.load(policy_ + first_key, keys);
    }
    PRUNEOPS_INLINE RowWeights row(int64_t visible) { return tile_.row(visible); }

   private:
    const float* policy_;
    PolicyTile<kTileKeys> tile_;
  };

  PRUNEOPS_INLINE float finish(const ForwardParams& attention, const Segment& segment,
                               int64_t query, int64_t head, float max, float sum,
                               float* sum_of_values) const {
    const Heads& heads = attention.heads;
    const int64_t at = head * attention.lse_stride + segment.q_begin + query;
    params.softmax_max[at] = max;
    params.softmax_sum[at] = sum;
    const float* all =
        segment_sum(params.value_sums, heads, &segment - attention.segments, head / heads.group);
    const Vec share = broadcast(params.epsilon / static_cast<float>(segment.k_len));
    for (int64_t d = 0; d < heads.head_dim; d += kVecWidth) {
      store(sum_of_values + d, fma(load(all + d), share, load(sum_of_values + d)));
    }
    return 1.0f / (sum + params.epsilon);
  }
};

inline void policy_forward(const PolicyForwardParams& params, const ParallelFor& parallel,
                           char* workspace) {
  const ForwardParams& attention = params.attention;
  const Heads& heads = attention.heads;
  run_tasks(parallel, params.num_segments * heads.num_heads_k, workspace,
            forward_workspace_bytes(heads.head_dim), [&](int64_t task, char* base) {
              Arena arena(base);
              const ForwardWorkspace ws(arena, heads.head_dim);
              const int64_t b = task / heads.num_heads_k, head_k = task % heads.num_heads_k;
              const Segment& segment = attention.segments[b];
              sum_rows(
                  key_rows(attention.v, segment, head_k), segment.k_len, heads.head_dim,
                  [](int64_t) { return 1.0f; }, ws.staging,
                  segment_sum(params.value_sums, heads, b, head_k));
            });
  run_forward(attention, PolicySoftmax{params}, parallel, workspace);
}

// 1 / den of a row of a key head.
PRUNEOPS_INLINE float inverse_sum(const PolicyBackwardParams& params, const Segment& segment,
                                  int64_t head_k, int64_t row) {
  const BackwardParams& attention = params.attention;
  const int64_t group = attention.heads.group;
  const int64_t head = head_k * group + row % group;
  const int64_t query = segment.q_begin + row / group;
  return 1.0f / (params.softmax_sum[head * attention.lse_stride + query] + params.epsilon);
}

class PolicyGradient {
 public:
  PRUNEOPS_INLINE explicit PolicyGradient(const PolicyBackwardParams& params) : params_(params) {}

  PRUNEOPS_INLINE void load_rows(const BackwardParams& attention, const Segment& segment,
                                 int64_t head_k, int64_t first, int64_t rows,
                                 const BackwardWorkspace& ws) {
    const int64_t group = attention.heads.group;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = head_k * group + (first + r) % group;
      const int64_t query = segment.q_begin + (first + r) / group;
      ws.lse[r] = params_.softmax_max[head * attention.lse_stride + query];
      inverse_[r] = inverse_sum(params_, segment, head_k, first + r);
    }
  }

  PRUNEOPS_INLINE void load_keys(const Segment& segment, int64_t first_key, int64_t keys) {
    tile_.load(params_.policy + segment.k_begin + first_key, keys);
  }

  // Every row of the segment gives every value epsilon / length / den.
  PRUNEOPS_INLINE void begin_keys(const BackwardParams& attention, const Segment& segment,
                                  int64_t head_k, int64_t keys, const BackwardWorkspace& ws) {
    const float* all =
        segment_sum(params_.dout_sums, attention.heads, &segment - attention.segments, head_k);
    const Vec share = broadcast(params_.epsilon / static_cast<float>(segment.k_len));
    for (int64_t d = 0; d < ws.padded; d += kVecWidth) {
      const Vec value = load(all + d) * share;
      for (int64_t j = 0; j < keys; ++j) store(ws.dv + j * ws.padded + d, value);
    }
    for (int64_t j = 0; j < kGradKeys; j += kVecWidth) store(dpolicy_ + j, zero());
  }

  PRUNEOPS_INLINE void end_keys(const BackwardParams& attention, const Segment& segment,
                                int64_t head_k, int64_t first_key, int64_t keys) {
    memcpy(params_.dpolicy_of_heads + head_k * attention.lse_stride + segment.k_begin + first_key,
           dpolicy_, static_cast<size_t>(keys) * sizeof(float));
  }

  PRUNEOPS_INLINE void finish_tile(const BackwardParams& attention, const Scale& score_scale,
                                   const float* delta, int64_t rows, int64_t first_key,
                                   int64_t keys, const BackwardWorkspace& ws) {
    const int64_t padded_keys = round_up(keys, kVecWidth);
    const Vec scale = broadcast(attention.softmax_scale);
    const Vec factor = broadcast(score_scale.log2);
    for (int64_t j = 0; j < padded_keys; j += kVecWidth) store(column_ + j, zero());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t visible = ws.limit[r] - first_key;
      const int64_t count = min_of(visible, keys);
      float* p = ws.p + r * kGradKeys;
      float* ds = ws.ds + r * kGradKeys;
      int64_t end = 0;
      if (count > 0) {
        end = pad_row(p, count, -INFINITY);
        pad_row(ds, count, 0.0f);
        const bool has_own = visible <= keys;
        const float of_others = column_[count - 1];
        const RowWeights weights = tile_.row(visible);
        const Vec minus_max = broadcast(-ws.lse[r]);
        const Vec inverse = broadcast(inverse_[r]);
        const Vec d = broadcast(delta[r]);
        for (int64_t j = 0; j < end; j += kVecWidth) {
          const Vec x = exp2(fma(load(p + j), factor, minus_max)) * inverse;
          const Vec change = x * (load(ds + j) - d);
          store(column_ + j, load(column_ + j) + change);
          store(p + j, weights(x, j));
          store(ds + j, weights(change, j) * scale);
        }
        if (has_own) column_[count - 1] = of_others;
      }
      for (int64_t j = end; j < padded_keys; j += kVecWidth) {
        store(p + j, zero());
        store(ds + j, zero());
      }
    }
    for (int64_t j = 0; j < padded_keys; j += kVecWidth) {
      store(dpolicy_ + j, load(dpolicy_ + j) + load(column_ + j));
    }
  }

 private:
  const PolicyBackwardParams& params_;
  PolicyTile<kGradKeys> tile_;
  alignas(64) float inverse_[kGradRows];  // 1 / den
  alignas(64) float column_[kGradKeys];   // of the tile
  alignas(64) float dpolicy_[kGradKeys];  // of the tiles so far
};

inline void policy_backward(const PolicyBackwardParams& params, const ParallelFor& parallel,
                            char* workspace) {
  const BackwardParams& attention = params.attention;
  const Heads& heads = attention.heads;
  const int64_t bytes = backward_workspace_bytes(heads.head_dim);
  run_tasks(parallel, params.num_segments * heads.num_heads_k, workspace, bytes,
            [&](int64_t task, char* base) {
              Arena arena(base);
              const BackwardWorkspace ws(arena, heads.head_dim);
              const int64_t b = task / heads.num_heads_k, head_k = task % heads.num_heads_k;
              const Segment& segment = attention.segments[b];
              sum_rows(
                  query_rows(attention.dout, segment, heads, head_k), segment.q_len * heads.group,
                  heads.head_dim,
                  [&](int64_t row) { return inverse_sum(params, segment, head_k, row); },
                  ws.staging, segment_sum(params.dout_sums, heads, b, head_k));
            });
  run_backward(attention, [&] { return PolicyGradient(params); }, parallel, workspace);
  run_tasks(parallel, params.num_segments, workspace, 0, [&](int64_t task, char*) {
    const Segment& segment = attention.segments[task];
    for (int64_t j = segment.k_begin; j < segment.k_begin + segment.k_len; ++j) {
      float sum = 0.0f;
      for (int64_t head_k = 0; head_k < heads.num_heads_k; ++head_k) {
        sum += params.dpolicy_of_heads[head_k * attention.lse_stride + j];
      }
      params.dpolicy[j] = sum;
    }
  });
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
