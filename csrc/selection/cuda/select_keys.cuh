// Scores as keys of a radix select, held in shared memory by one block.
//
// A score becomes a uint32 key that sorts like the score does: NaN lowest, -0.0 equal to +0.0; a
// protected row gets the highest key of all.

#pragma once

#include "common/cuda_kernel.h"
#include "common/cuda_score_order.cuh"
#include "common/float_types.h"

namespace pruneops {

constexpr uint32_t kProtectedKey = 0xffffffffu;
// Keys that a block needs room for beyond those it holds.
constexpr int kKeyPadding = 8;

struct KeyCounts {
  uint32_t num_protected;
  uint32_t above;  // keys above the threshold, protected ones included
};

// Some rows that follow one another, and their keys once load_keys has run.
template <typename Score>
struct BlockKeys {
  static constexpr int kVector = 16 / sizeof(Score);  // scores read at once

  const Score* scores;     // [n]
  const uint8_t* protect;  // [n] or null
  uint32_t* cached;        // [n] in shared memory, 16-byte aligned where the scores are
  int n;

  // Rows [begin, begin + n) of the packed tensor.
  //   all_scores   [total], of Score
  //   all_protect  [total] or null
  //   room         [n + kKeyPadding] in shared memory, 16-byte aligned
  __device__ __forceinline__ BlockKeys(const void* all_scores, const uint8_t* all_protect,
                                       int64_t begin, int64_t n, uint32_t* room)
      : scores(static_cast<const Score*>(all_scores) + begin),
        protect(all_protect == nullptr ? nullptr : all_protect + begin),
        cached(room + first_place()),
        n(static_cast<int>(n)) {}

  __device__ __forceinline__ uint32_t operator[](int i) const { return cached[i]; }

  // Place of row 0 among kVector scores that are aligned together.
  __device__ __forceinline__ int first_place() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(scores) / sizeof(Score) % kVector);
  }

  __device__ __forceinline__ uint32_t key_of(int i, Score score) const {
    if (protect != nullptr && protect[i] != 0) return kProtectedKey;
    return ordered_key(to_float(score));
  }
};

// Fills keys.cached, by the whole block; a barrier has to follow. Returns counts of what this
// thread has loaded.
//   threshold  key that `above` counts from
template <typename Score>
__device__ __forceinline__ KeyCounts load_keys(const BlockKeys<Score>& keys, uint32_t threshold) {
  constexpr int kVector = BlockKeys<Score>::kVector;
  static_assert(kVector % 4 == 0 && kVector <= kKeyPadding, "keys are stored four at a time");
  KeyCounts counts{0, 0};
  const auto count = [&](uint32_t key) {
    counts.num_protected += key == kProtectedKey;
    counts.above += key > threshold;
    return key;
  };
  // Rows before the first aligned vector, all vectors, the rows behind them.
  const int before_first = (kVector - keys.first_place()) % kVector;
  const int head = before_first < keys.n ? before_first : keys.n;
  const int num_vectors = (keys.n - head) / kVector;
  for (int v = threadIdx.x; v < num_vectors; v += blockDim.x) {
    const int first = head + v * kVector;
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(keys.scores + first));
    Score scores[kVector];
    memcpy(scores, &raw, sizeof(raw));
    uint4* out = reinterpret_cast<uint4*>(keys.cached + first);
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      uint4 four;
      four.x = count(keys.key_of(first + j, scores[j]));
      four.y = count(keys.key_of(first + j + 1, scores[j + 1]));
      four.z = count(keys.key_of(first + j + 2, scores[j + 2]));
      four.w = count(keys.key_of(first + j + 3, scores[j + 3]));
      out[j / 4] = four;
    }
  }
  const int in_vectors = num_vectors * kVector;
  for (int edge = threadIdx.x; edge < keys.n - in_vectors; edge += blockDim.x) {
    const int i = edge < head ? edge : edge + in_vectors;
    keys.cached[i] = count(keys.key_of(i, keys.scores[i]));
  }
  return counts;
}

}  // namespace pruneops
