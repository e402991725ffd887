// One case of the CUDA score kernels, run on the CPU, against plain loops in double precision:
// outputs, scratch and rows of no segment full of NaN, in several orders of threads and blocks.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/flash_schedule.cu"
#include "attention/cuda/scores.cu"
#include "attention/cuda/tile_scores_hd128.cu"
#include "attention/cuda/tile_scores_hd64.cu"
#include "attention/cuda/tile_scores_hd80.cu"
#include "attention/cuda/tile_scores_hd96.cu"
#include "check.h"
#include "common/segments.h"

namespace pruneops::testing {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  std::string name;
  std::vector<int32_t> cu_q, cu_k;
  int64_t total_q, total_k;
  int64_t heads_q, heads_k, head_dim;
  FloatType type = FloatType::kFloat32;
  bool causal = false;
  bool with_limit = false;
  bool given_lse = false;
  float scale = 0.25f;
  Reduce head_reduce = Reduce::kMean, query_reduce = Reduce::kMean;
  int64_t padding = 0;  // elements between rows, full of NaN
};

// Rows of heads with `padding` elements of NaN between rows; exactly as long as their last element.
struct Matrix {
  int64_t heads, head_dim, row_stride;
  FloatType type;
  std::vector<float> values;  // as rounded to the type
  std::vector<uint16_t> halves;

  Matrix(int64_t rows, int64_t heads, int64_t head_dim, int64_t padding, FloatType type,
         std::mt19937& random)
      : heads(heads), head_dim(head_dim), row_stride(heads * head_dim + padding), type(type) {
    std::normal_distribution<float> normal;
    values.assign(rows > 0 ? rows * row_stride - padding : 0, kNan);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < heads * head_dim; ++i) values[r * row_stride + i] = normal(random);
    }
    if (type == FloatType::kFloat32) return;
    halves.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      if (type == FloatType::kBFloat16) {
        BFloat16 x;
        from_float(values[i], &x);
        halves[i] = x.bits;
        values[i] = to_float(x);
      } else {
        Half x;
        from_float(values[i], &x);
        halves[i] = x.bits;
        values[i] = to_float(x);
      }
    }
  }

  // NaN in the rows that belong to no segment.
  //   bounds  sanitized
  void spoil_outside(const std::vector<int32_t>& bounds) {
    const int64_t rows = (static_cast<int64_t>(values.size()) + row_stride - 1) / row_stride;
    for (int64_t r = 0; r < rows; ++r) {
      if (r >= bounds.front() && r < bounds.back()) continue;
      for (int64_t i = r * row_stride; i < r * row_stride + heads * head_dim; ++i) {
        values[i] = kNan;
        if (!halves.empty()) halves[i] = 0x7fff;
      }
    }
  }

  float at(int64_t row, int64_t head, int64_t d) const {
    return values[row * row_stride + head * head_dim + d];
  }

  RowView view() {
    void* data = type == FloatType::kFloat32 ? static_cast<void*>(values.data()) : halves.data();
    return {data, 0, row_stride, head_dim, type};
  }
};

inline double reduced(Reduce op, double accumulated, double value) {
  return op == Reduce::kMax ? std::max(accumulated, value) : accumulated + value;
}

inline double factor(Reduce op, int64_t count) {
  return op == Reduce::kMean && count > 0 ? 1.0 / count : 1.0;
}

inline std::vector<int32_t> bounds_of(const std::vector<int32_t>& cu_seqlens, int64_t total) {
  std::vector<int32_t> bounds(cu_seqlens.size());
  sanitize_cu_seqlens(cu_seqlens.data(), static_cast<int64_t>(bounds.size()), total, bounds.data());
  return bounds;
}

struct Expected {
  std::vector<double> scores;  // [total_k]
  std::vector<float> lse;      // [heads_q, total_q]
};

inline Expected expect(const Case& c, const Matrix& q, const Matrix& k,
                       const std::vector<int32_t>& kv_limit) {
  Expected expected{std::vector<double>(c.total_k, 0.0),
                    std::vector<float>(c.heads_q * c.total_q, -INFINITY)};
  const std::vector<int32_t> bq = bounds_of(c.cu_q, c.total_q), bk = bounds_of(c.cu_k, c.total_k);
  const int64_t num = static_cast<int64_t>(bq.size());
  for (int64_t b = 0; b + 1 < num; ++b) {
    const int64_t lq = bq[b + 1] - bq[b], lk = bk[b + 1] - bk[b];
    std::vector<double> column(lk, 0.0);
    for (int64_t i = 0; i < lq; ++i) {
      int64_t limit = lk;
      if (c.with_limit)
        limit = kv_limit[bq[b] + i];
      else if (c.causal)
        limit = lk - lq + i + 1;
      limit = std::clamp<int64_t>(limit, 0, lk);
      std::vector<double> of_heads(lk, 0.0);
      for (int64_t h = 0; h < c.heads_q && limit > 0; ++h) {
        std::vector<double> s(limit);
        for (int64_t j = 0; j < limit; ++j) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            s[j] += double{q.at(bq[b] + i, h, d)} * k.at(bk[b] + j, h / (c.heads_q / c.heads_k), d);
          }
          s[j] *= c.scale;
        }
        const double most = *std::max_element(s.begin(), s.end());
        double sum = 0;
        for (double x : s) sum += std::exp(x - most);
        expected.lse[h * c.total_q + bq[b] + i] = static_cast<float>(most + std::log(sum));
        for (int64_t j = 0; j < limit; ++j) {
          of_heads[j] = reduced(c.head_reduce, of_heads[j], std::exp(s[j] - most) / sum);
        }
      }
      for (int64_t j = 0; j < lk; ++j) column[j] = reduced(c.query_reduce, column[j], of_heads[j]);
    }
    for (int64_t j = 0; j < lk; ++j) {
      expected.scores[bk[b] + j] =
          column[j] * factor(c.head_reduce, c.heads_q) * factor(c.query_reduce, lq);
    }
  }
  return expected;
}

// Runs of the tensor-core kernels so far.
inline int runs_on_tensor_cores_seen = 0;

//   tile_keys  what the plan would say for more keys than a test can afford
inline std::vector<float> run(CudaScoreParams p, bool few, int32_t tile_keys, int64_t total_k) {
  std::vector<float> scores(total_k, kNan);
  p.scores = scores.data();
  ScorePlan plan = plan_scores(p, few);
  if (plan.few_queries) plan.tile_keys = tile_keys;
  runs_on_tensor_cores_seen += plan.on_tensor_cores;
  std::vector<int32_t> bounds(2 * (p.num_segments + 1), -1);
  std::vector<float> workspace(plan.workspace_floats, kNan);
  p.bounds = bounds.data();
  p.workspace = workspace.data();
  CHECK(launch_scores(p, plan, nullptr) == cudaSuccess);
  return scores;
}

inline void check_case(const Case& c, unsigned seed, size_t num_schedules) {
  std::mt19937 random(seed);
  Matrix q(c.total_q, c.heads_q, c.head_dim, c.padding, c.type, random);
  Matrix k(c.total_k, c.heads_k, c.head_dim, c.padding, c.type, random);
  q.spoil_outside(bounds_of(c.cu_q, c.total_q));
  k.spoil_outside(bounds_of(c.cu_k, c.total_k));
  std::vector<int32_t> kv_limit(c.total_q);
  for (int32_t& limit : kv_limit) limit = static_cast<int32_t>(random() % 120) - 10;
  Expected expected = expect(c, q, k, kv_limit);
  const std::vector<int32_t> bounds = bounds_of(c.cu_q, c.total_q);
  for (int64_t i = 0; i < c.heads_q * c.total_q; ++i) {
    const int64_t row = i % c.total_q;
    if (row < bounds.front() || row >= bounds.back()) expected.lse[i] = kNan;
  }

  CudaScoreParams p{};
  p.q = q.view();
  p.k = k.view();
  p.heads = {c.heads_q, c.heads_k, c.head_dim, c.heads_q / c.heads_k};
  p.cu_seqlens_q = c.cu_q.data();
  p.cu_seqlens_k = c.cu_k.data();
  p.num_segments = static_cast<int64_t>(c.cu_q.size()) - 1;
  p.total_q = c.total_q;
  p.total_k = c.total_k;
  p.visibility = {c.causal, c.with_limit ? kv_limit.data() : nullptr};
  p.softmax_scale = c.scale;
  p.head_reduce = c.head_reduce;
  p.query_reduce = c.query_reduce;
  p.softmax_lse = c.given_lse ? expected.lse.data() : nullptr;

  // An error of the LSE's last bit, times what the scale makes of its size.
  const double tolerance = 2e-5 * std::max(1.0f, std::abs(c.scale));
  for (bool few : {false, true}) {
    if (few && (c.causal || c.given_lse)) continue;
    std::vector<float> first;
    for (size_t s = 0; s < num_schedules; ++s) {
      cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
      const std::vector<float> scores = run(p, few, 16 << seed % 3, c.total_k);
      if (s == 0) first = scores;
      for (int64_t j = 0; j < c.total_k; ++j) {
        const double want = expected.scores[j];
        if (!(std::abs(scores[j] - want) <= tolerance * want + 1e-7)) {
          std::fprintf(stderr, "%s, few=%d: key %d is %.9g, expected %.9g\n", c.name.c_str(), few,
                       static_cast<int>(j), scores[j], want);
          std::exit(1);
        }
        CHECK(scores[j] == first[j]);  // the same bits in every order
      }
    }
  }
}

}  // namespace pruneops::testing
