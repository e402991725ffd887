// The CUDA kernels of policy attention, run on the CPU, against the definition and its gradients in
// double precision: any lengths, head counts and dtypes, boundaries that lie, outputs and scratch
// full of NaN, in several orders of threads and blocks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/flash_policy_backward_sm80_hd128.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd64.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd80.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd96.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd128.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd64.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd80.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd96.cu"
#include "attention/cuda/flash_schedule.cu"
#include "attention/cuda/policy.cu"
#include "attention_case.h"
#include "check.h"
#include "common/segments.h"

namespace {

using pruneops::FloatType;
using pruneops::testing::check_close;
using pruneops::testing::kNan;
using pruneops::testing::Rows;
using pruneops::testing::tolerance;

struct Case {
  std::vector<int32_t> cu;  // any values
  int64_t total;
  int64_t heads_q, heads_k, head_dim;
  FloatType type = FloatType::kFloat32;
  float scale = 0.25f;
  float epsilon = 1e-6f;
  bool dense = false;  // rows without gaps, which may be read 16 bytes at a time
};

// Everything both directions write.
struct Result {
  Rows out, dq, dk, dv;
  std::vector<float> max, sum, dpolicy;

  explicit Result(const Case& c)
      : out(c.type, c.total, c.heads_q, c.head_dim, false),
        dq(out),
        dk(c.type, c.total, c.heads_k, c.head_dim, false),
        dv(dk),
        max(c.heads_q * c.total + 1, kNan),
        sum(max),
        dpolicy(c.total + 1, kNan) {}

  bool same_bytes(const Result& other) const {
    return out.bytes == other.out.bytes && dq.bytes == other.dq.bytes &&
           dk.bytes == other.dk.bytes && dv.bytes == other.dv.bytes &&
           std::equal(dpolicy.begin(), dpolicy.end() - 1, other.dpolicy.begin());
  }
};

void remove_gaps(Rows& rows) {
  std::vector<double> values;
  for (int64_t r = 0; r < rows.rows; ++r) {
    for (int64_t i = 0; i < rows.heads * rows.head_dim; ++i) {
      values.push_back(rows.at(r, i / rows.head_dim, i % rows.head_dim));
    }
  }
  rows.head_stride = rows.head_dim;
  rows.row_stride = rows.heads * rows.head_dim;
  for (size_t i = 0; i < values.size(); ++i) rows.set(static_cast<int64_t>(i), values[i]);
}

struct Inputs {
  Rows q, k, v, dout;
  std::vector<float> policy;

  explicit Inputs(const Case& c)
      : q(c.type, c.total, c.heads_q, c.head_dim, true),
        k(c.type, c.total, c.heads_k, c.head_dim, true),
        v(c.type, c.total, c.heads_k, c.head_dim, true),
        dout(c.type, c.total, c.heads_q, c.head_dim, true),
        policy(c.total) {
    for (float& x : policy) {
      x = static_cast<float>(pruneops::testing::random_int(0, 3)) / 2.0f;  // 0, 0.5, 1 or 1.5
    }
    if (c.dense) {
      for (Rows* rows : {&q, &k, &v, &dout}) remove_gaps(*rows);
    }
  }
};

Result run(const Case& c, Inputs& in) {
  Result result(c);
  const int64_t num_segments = static_cast<int64_t>(c.cu.size()) - 1;
  std::vector<int32_t> bounds(2 * c.cu.size(), -1);
  std::vector<int32_t> schedule(2 * pruneops::flash_schedule_ints(num_segments), -1);
  std::vector<float> sums(num_segments * c.heads_k * c.head_dim + 1, kNan);
  pruneops::CudaPolicyParams p{};
  p.q = in.q.view();
  p.k = in.k.view();
  p.v = in.v.view();
  p.out = result.out.view();
  p.heads = {c.heads_q, c.heads_k, c.head_dim, c.heads_q / c.heads_k};
  p.policy = in.policy.data();
  p.cu_seqlens = c.cu.data();
  p.num_segments = num_segments;
  p.total = c.total;
  p.softmax_scale = c.scale;
  p.epsilon = c.epsilon;
  p.softmax_max = result.max.data();
  p.softmax_sum = result.sum.data();
  p.bounds = bounds.data();
  p.schedule = schedule.data();
  p.sums = sums.data();
  CHECK(pruneops::launch_policy_forward(p, nullptr) == cudaSuccess);

  std::vector<float> of_heads(c.heads_k * c.total + 1, kNan);
  std::vector<float> delta(2 * pruneops::flash_row_terms(c.total, c.heads_q) + 1, kNan);
  std::fill(sums.begin(), sums.end(), kNan);
  std::fill(bounds.begin(), bounds.end(), -1);
  std::fill(schedule.begin(), schedule.end(), -1);
  pruneops::CudaPolicyBackwardParams b{};
  b.forward = p;
  b.dout = in.dout.view();
  b.dq = result.dq.view();
  b.dk = result.dk.view();
  b.dv = result.dv.view();
  b.dpolicy = result.dpolicy.data();
  b.dpolicy_of_heads = of_heads.data();
  b.delta = delta.data();
  CHECK(pruneops::launch_policy_backward(b, nullptr) == cudaSuccess);
  return result;
}

void check_result(const Case& c, const Inputs& in, const Result& result) {
  const int64_t num = static_cast<int64_t>(c.cu.size()), d_ = c.head_dim;
  const int64_t group = c.heads_q / c.heads_k;
  std::vector<int32_t> bounds(num);
  pruneops::sanitize_cu_seqlens(c.cu.data(), num, c.total, bounds.data());
  std::vector<double> out(c.total * c.heads_q * d_), dq(out.size());
  std::vector<double> dk(c.total * c.heads_k * d_), dv(dk.size()), dpolicy(c.total);
  for (int64_t b = 0; b + 1 < num; ++b) {
    const int64_t begin = bounds[b], length = bounds[b + 1] - bounds[b];
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t h = 0; h < c.heads_q; ++h) {
        const int64_t hk = h / group, row = begin + i;
        std::vector<double> e(i + 1), dp(length);
        for (int64_t j = 0; j <= i; ++j) {
          for (int64_t d = 0; d < d_; ++d) e[j] += in.q.at(row, h, d) * in.k.at(begin + j, hk, d);
          e[j] *= c.scale;
        }
        const double most = *std::max_element(e.begin(), e.end());
        double den = c.epsilon, mean = 0.0;
        const auto counts = [&](int64_t j) {
          return j == i ? 1.0 : static_cast<double>(in.policy[begin + j]);
        };
        for (int64_t j = 0; j <= i; ++j) den += (e[j] = std::exp(e[j] - most)) * counts(j);
        for (int64_t j = 0; j < length; ++j) {
          const double w = ((j <= i ? e[j] * counts(j) : 0.0) + c.epsilon / length) / den;
          for (int64_t d = 0; d < d_; ++d) {
            dp[j] += in.dout.at(row, h, d) * in.v.at(begin + j, hk, d);
            out[(row * c.heads_q + h) * d_ + d] += w * in.v.at(begin + j, hk, d);
            dv[((begin + j) * c.heads_k + hk) * d_ + d] += w * in.dout.at(row, h, d);
          }
          mean += w * dp[j];
        }
        for (int64_t j = 0; j <= i; ++j) {
          const double change = e[j] / den * (dp[j] - mean);
          if (j != i) dpolicy[begin + j] += change;
          const double ds = change * counts(j) * c.scale;
          for (int64_t d = 0; d < d_; ++d) {
            dq[(row * c.heads_q + h) * d_ + d] += ds * in.k.at(begin + j, hk, d);
            dk[((begin + j) * c.heads_k + hk) * d_ + d] += ds * in.q.at(row, h, d);
          }
        }
      }
    }
  }
  const double tol = tolerance(c.type);
  const auto check_rows = [&](const Rows& rows, const std::vector<double>& expected, double t) {
    for (size_t i = 0; i < expected.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i);
      check_close(rows.at(at / d_ / rows.heads, at / d_ % rows.heads, at % d_), expected[i], t);
    }
  };
  check_rows(result.out, out, tol);
  check_rows(result.dq, dq, 20 * tol);
  check_rows(result.dk, dk, 20 * tol);
  check_rows(result.dv, dv, 20 * tol);
  for (int64_t j = 0; j < c.total; ++j) check_close(result.dpolicy[j], dpolicy[j], 40 * tol);
}

void check_case(const Case& c, size_t num_schedules) {
  Inputs in(c);
  cuda_on_host::schedule = cuda_on_host::all_schedules()[0];
  const Result first = run(c, in);
  check_result(c, in, first);
  for (size_t s = 1; s < num_schedules; ++s) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    CHECK(run(c, in).same_bytes(first));  // in every order
  }
}

}  // namespace

int main() {
  const size_t all = cuda_on_host::all_schedules().size();
  // Segments that share tiles, one of several tiles, an empty one, rows of no segment.
  const std::vector<int32_t> cu{0, 5, 5, 6, 76, 210};
  check_case({cu, 213, 2, 1, 16}, all);
  check_case({cu, 213, 2, 2, 16, FloatType::kBFloat16, 0.25f, 1e-6f, true}, 2);
  for (int64_t group : {1, 4, 7, 8}) check_case({{0, 3, 40}, 40, group, 1, 24}, 1);

  const FloatType types[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};
  const int64_t head_dims[] = {1, 3, 8, 63, 64, 65, 72, 128, 129, 200, 256};
  for (size_t i = 0; i < 11; ++i) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dims[i]));
    Case c{{0, 9, 80}, 80, 2, 1, head_dims[i], types[i % 3], scale, 1e-6f, i % 2 == 0};
    check_case(c, 1);
    c.type = types[(i + 1) % 3];
    c.dense = !c.dense;
    check_case(c, 1);
  }
  for (float epsilon : {0.0f, 0.5f, 10.0f}) {
    check_case({{0, 70}, 70, 1, 1, 8, FloatType::kFloat32, 0.25f, epsilon}, 1);
  }
  for (float scale : {0.0f, -0.5f, 2.0f}) {
    check_case({{0, 70}, 70, 1, 1, 8, FloatType::kFloat32, scale}, 1);
  }

  Case many{{0}, 0, 2, 1, 8};
  for (int b = 0; b < 140; ++b) {
    many.total += b * 7 % 5;
    many.cu.push_back(static_cast<int32_t>(many.total));
  }
  check_case(many, 2);

  check_case({{5, -3, 9, 1000000, 4, 12, 12}, 30, 2, 2, 16}, 2);
  check_case({{30, 0, 0}, 30, 2, 2, 16}, 1);
  check_case({{-5, -1, 8, 12}, 20, 2, 2, 16}, 1);
  check_case({{0}, 3, 2, 2, 16}, 1);
  check_case({{0, 0}, 0, 2, 2, 16}, 1);
  return 0;
}
