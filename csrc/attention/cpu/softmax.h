// Softmax pieces on rows of scores. Exponentials are powers of two, exp2(s * log2_scale - shift)
// with one rounding in the argument: scores are scaled inside that multiply-add and nowhere before,
// so large scores cost no accuracy beyond that of the dot product itself.

#pragma once

#include <math.h>

#include "attention/attention.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// softmax_scale as the kernels apply it. Tiles hold sign * <q, k>, so that the largest entry of a
// row is the one with the largest probability.
struct Scale {
  float sign;  // 1, -1, or 0 for a scale of 0
  float log2;  // |softmax_scale| * log2(e), positive

  explicit Scale(float softmax_scale)
      : sign(softmax_scale > 0.0f ? 1.0f : (softmax_scale < 0.0f ? -1.0f : 0.0f)),
        log2(softmax_scale == 0.0f ? kLog2E : fabsf(softmax_scale) * kLog2E) {}
};

// Running state of a row's softmax, in base-2 logarithms.
struct RowStates {
  float* max;    // [rows] largest scaled score so far, -inf at first
  float* sum;    // [rows, kVecWidth] sum of exp2(scaled score - max), by lane
  float* alpha;  // [rows] what the last tile's maximum asks earlier results to be multiplied by
};

PRUNEOPS_INLINE void reset(const RowStates& state, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    state.max[r] = -INFINITY;
    state.alpha[r] = 1.0f;
    store(state.sum + r * kVecWidth, zero());
  }
}

// Fills s[count, up to the next whole vector) and returns its end.
PRUNEOPS_INLINE int64_t pad_row(float* s, int64_t count, float value) {
  const int64_t padded = round_up(count, kVecWidth);
  for (int64_t i = count; i < padded; ++i) s[i] = value;
  return padded;
}

PRUNEOPS_INLINE Vec row_max(const float* s, int64_t padded) {
  Vec m = load(s);
  for (int64_t i = kVecWidth; i < padded; i += kVecWidth) m = vmax(load(s + i), m);
  return m;
}

// How much each key of a tile counts in a row's sum: all alike. weights(p, i) is p, the
// exponentials of keys [i, i + kVecWidth) of the tile, times their weights.
struct EqualWeights {
  PRUNEOPS_INLINE Vec operator()(Vec p, int64_t) const { return p; }
};

// Turns the first `count` scores of a row into exp2(scaled score - max), times the weights of their
// keys, updating the row's state; `out` may be `s`. The maximum is that of all scores, whatever
// their weights. Entries [count, zero_to) of out become 0; zero_to is a multiple of kVecWidth.
template <class T, class Weights = EqualWeights>
PRUNEOPS_INLINE void online_softmax(float* s, int64_t count, int64_t zero_to, const Scale& scale,
                                    T* out, const RowStates& state, int64_t r,
                                    const Weights& weights = Weights()) {
  int64_t padded = 0;
  state.alpha[r] = 1.0f;
  if (count > 0) {
    padded = pad_row(s, count, -INFINITY);
    const float before = state.max[r];
    const float tile = reduce_max(row_max(s, padded)) * scale.log2;
    Vec sum = load(state.sum + r * kVecWidth);
    float m = before;
    if (tile > before) {
      const Vec alpha = exp2(broadcast(before - tile));
      state.alpha[r] = first_lane(alpha);
      sum = sum * alpha;
      state.max[r] = m = tile;
    }
    // A row that has seen only -inf has no finite maximum to take away.
    const Vec minus_shift = broadcast(m == -INFINITY ? 0.0f : -m);
    const Vec factor = broadcast(scale.log2);
    for (int64_t i = 0; i < padded; i += kVecWidth) {
      const Vec p = weights(exp2(fma(load(s + i), factor, minus_shift)), i);
      sum = sum + p;
      store(out + i, p);
    }
    store(state.sum + r * kVecWidth, sum);
  }
  for (int64_t i = padded; i < zero_to; i += kVecWidth) store(out + i, zero());
}

// Turns the first `count` scores into probabilities, the rest up to zero_to into 0.
//   lse  base-2 logarithm of the sum of the row's exponentials
PRUNEOPS_INLINE void probabilities(float* s, int64_t count, int64_t zero_to, const Scale& scale,
                                   float lse) {
  const int64_t padded = count > 0 ? pad_row(s, count, -INFINITY) : 0;
  const Vec minus_lse = broadcast(-lse);
  const Vec factor = broadcast(scale.log2);
  for (int64_t i = 0; i < padded; i += kVecWidth) {
    store(s + i, exp2(fma(load(s + i), factor, minus_lse)));
  }
  for (int64_t i = padded; i < zero_to; i += kVecWidth) store(s + i, zero());
}

PRUNEOPS_INLINE float natural_lse(float max, float sum) {
  if (sum == 0.0f) return -INFINITY;
  return static_cast<float>(static_cast<double>(max) * kLn2 + logf(sum));
}

// limit[i] = keys that row first + i of the segment sees; returns the largest.
PRUNEOPS_INLINE int64_t row_limits(const Visibility& visibility, const Segment& segment,
                                   int64_t group, int64_t first, int64_t count, int32_t* limit) {
  int64_t largest = 0;
  int64_t query = first / group, head = first % group;
  for (int64_t i = 0; i < count; ++i) {
    int64_t value = segment.k_len;
    if (visibility.kv_limit != nullptr) {
      value = visibility.kv_limit[segment.q_begin + query];
    } else if (visibility.causal) {
      value = segment.k_len - segment.q_len + query + 1;
    }
    value = min_of(max_of<int64_t>(value, 0), segment.k_len);
    limit[i] = static_cast<int32_t>(value);
    largest = max_of(largest, value);
    if (++head == group) {
      head = 0;
      ++query;
    }
  }
  return largest;
}

// visible[g] = keys [first_key, first_key + keys) that any of the group's kMicroRows rows sees,
// counted from first_key; returns the largest.
PRUNEOPS_INLINE int64_t group_columns(const int32_t* limit, int64_t rows, int64_t rows_per_group,
                                      int64_t first_key, int64_t keys, int32_t* visible) {
  int64_t largest = 0;
  for (int64_t r = 0, g = 0; r < rows; r += rows_per_group, ++g) {
    int64_t most = 0;
    for (int64_t i = r; i < min_of(r + rows_per_group, rows); ++i) {
      most = max_of<int64_t>(most, limit[i]);
    }
    most = min_of(max_of<int64_t>(most - first_key, 0), keys);
    visible[g] = static_cast<int32_t>(most);
    largest = max_of(largest, most);
  }
  return largest;
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
