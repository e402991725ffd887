// Selections that the CUDA kernels, run on the CPU, must make as the CPU kernels do, row for row.

#pragma once

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/segments.h"
#include "selection/cuda/select.cu"
#include "selection/selection.h"

namespace pruneops::testing {

struct Case {
  FloatType type = FloatType::kFloat32;
  std::vector<float> scores;
  int64_t shift = 0;             // rows from a 16-byte boundary to the first score
  std::vector<uint8_t> protect;  // empty: none
  std::vector<int32_t> cu_seqlens;
  std::vector<int32_t> keep_counts;  // empty: none
  bool use_threshold = false;
  float threshold = 0.0f;
  int64_t capacity = 0;
};

// Sizes other than those that the launcher would choose; 0 leaves the choice to it.
struct BlockSizes {
  int32_t num_threads = 0;
  int64_t key_capacity = 0;
  int64_t stretch_rows = 0;
};

struct Selected {
  std::vector<int32_t> indices;
  std::vector<int32_t> cu_seqlens;
  // Pieces that segments too long for one block were cut into.
  int64_t num_stretches = 0;
};

// The scores as an array of the case's type, behind `shift` others.
inline std::vector<char> encoded(const Case& c) {
  std::vector<char> bytes((c.shift + c.scores.size()) * element_size(c.type));
  for (size_t i = 0; i < c.scores.size(); ++i) {
    const size_t place = c.shift + i;
    if (c.type == FloatType::kFloat32) {
      reinterpret_cast<float*>(bytes.data())[place] = c.scores[i];
    } else if (c.type == FloatType::kBFloat16) {
      from_float(c.scores[i], reinterpret_cast<BFloat16*>(bytes.data()) + place);
    } else {
      from_float(c.scores[i], reinterpret_cast<Half*>(bytes.data()) + place);
    }
  }
  return bytes;
}

template <typename T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

inline Selected select_on_cpu(const Case& c) {
  const int64_t total = static_cast<int64_t>(c.scores.size());
  const int64_t num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  const std::vector<char> scores = encoded(c);
  std::vector<int32_t> bounds(num_segments + 1), keys(total);
  std::vector<SegmentCut> cuts(num_segments);
  sanitize_cu_seqlens(c.cu_seqlens.data(), num_segments + 1, total, bounds.data());
  SelectParams p{};
  p.scores = scores.data() + c.shift * element_size(c.type);
  p.score_type = c.type;
  p.protect = data_or_null(c.protect);
  p.cu_seqlens = bounds.data();
  p.keep_counts = data_or_null(c.keep_counts);
  p.use_threshold = c.use_threshold;
  p.threshold = c.threshold;
  p.num_segments = num_segments;
  p.keys = keys.data();
  p.cuts = cuts.data();
  Selected out{std::vector<int32_t>(c.capacity), std::vector<int32_t>(num_segments + 1)};
  select_cuts(p, serial());
  select_offsets(p, c.capacity, out.cu_seqlens.data());
  select_emit(p, out.cu_seqlens.data(), out.indices.data(), c.capacity, serial());
  return out;
}

inline Selected select_on_device(const Case& c, const BlockSizes& sizes) {
  const int64_t num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  const std::vector<char> scores = encoded(c);
  // Filled with values that nothing may rely on.
  Selected out{std::vector<int32_t>(c.capacity, -7), std::vector<int32_t>(num_segments + 1, -7)};
  CudaSelectParams p{};
  p.scores = scores.data() + c.shift * element_size(c.type);
  p.score_type = c.type;
  p.protect = data_or_null(c.protect);
  p.cu_seqlens = c.cu_seqlens.data();
  p.keep_counts = data_or_null(c.keep_counts);
  p.use_threshold = c.use_threshold;
  p.threshold = c.threshold;
  p.num_sms = 8;
  p.max_shared_bytes = 100 * 1024;
  p.total = static_cast<int64_t>(c.scores.size());
  p.num_segments = num_segments;
  p.capacity = c.capacity;
  p.indices = out.indices.data();
  p.cu_seqlens_out = out.cu_seqlens.data();
  const CudaSelectPlan plan =
      sizes.num_threads == 0
          ? plan_select(p)
          : plan_with(p, sizes.num_threads, sizes.key_capacity, sizes.stretch_rows);
  std::vector<uint4> workspace(plan.workspace_bytes / sizeof(uint4), uint4{~0u, 77, ~0u, 77});
  CHECK(workspace.size() * sizeof(uint4) == static_cast<size_t>(plan.workspace_bytes));
  CHECK(launch_select(p, plan, workspace.data(), nullptr) == cudaSuccess);
  if (plan.max_long > 0) {
    out.num_stretches = lay_out(p, plan, workspace.data()).work.totals->num_stretches;
  }
  return out;
}

// Returns the number of stretches.
inline int64_t check_case(const Case& c, const BlockSizes& sizes = {}) {
  const Selected expected = select_on_cpu(c);
  const Selected got = select_on_device(c, sizes);
  CHECK(got.cu_seqlens == expected.cu_seqlens);
  CHECK(got.indices == expected.indices);
  return got.num_stretches;
}

enum class Scores { kSmooth, kSpecial, kTied, kEqual };

inline std::vector<float> make_scores(int64_t n, Scores kind, std::mt19937& random) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-42f, -1e-42f, 1.0f, -1.0f};
  std::vector<float> scores(n);
  for (float& s : scores) {
    const int r = static_cast<int>(random() % 100000);
    s = kind == Scores::kSmooth    ? 1e-3f * static_cast<float>(r - 50000)
        : kind == Scores::kSpecial ? special[r % 10]
        : kind == Scores::kTied    ? static_cast<float>(r % 3)
                                   : 0.25f;
  }
  return scores;
}

inline Case make_case(const std::vector<int32_t>& lengths, Scores kind, unsigned seed) {
  std::mt19937 random(seed);
  Case c;
  c.cu_seqlens = {0};
  for (int32_t n : lengths) {
    c.cu_seqlens.push_back(c.cu_seqlens.back() + n);
    c.keep_counts.push_back(static_cast<int32_t>(random() % (n + 4)) - 2);
  }
  const int64_t total = c.cu_seqlens.back() + 3;  // an unused tail
  c.scores = make_scores(total, kind, random);
  c.capacity = total;
  return c;
}

inline void protect_some(Case& c, unsigned seed) {
  std::mt19937 random(seed);
  c.protect.resize(c.scores.size());
  for (uint8_t& flag : c.protect) flag = random() % 4 == 0 ? 2 : 0;
}

// Every kind of scores, with and without protected rows, with too little room, and with thresholds
// alone and beside counts. Returns the number of stretches of one selection.
inline int64_t check_every_rule(const std::vector<int32_t>& lengths, const BlockSizes& sizes = {}) {
  unsigned seed = 1;
  int64_t num_stretches = 0;
  for (Scores kind : {Scores::kSmooth, Scores::kSpecial, Scores::kTied}) {
    for (bool with_protect : {false, true}) {
      Case c = make_case(lengths, kind, ++seed);
      if (with_protect) protect_some(c, seed);
      num_stretches = check_case(c, sizes);
      c.capacity = static_cast<int64_t>(c.scores.size()) / 5;
      check_case(c, sizes);
      c.use_threshold = true;
      for (float threshold : {0.0f, 1.5f, std::numeric_limits<float>::quiet_NaN()}) {
        c.threshold = threshold;
        check_case(c, sizes);
      }
      c.keep_counts.clear();
      check_case(c, sizes);
    }
  }
  return num_stretches;
}

}  // namespace pruneops::testing
