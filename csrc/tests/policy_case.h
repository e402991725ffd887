// Batches for the tests of policy attention on tensor cores, what it makes of them in double
// precision, and the straightforward computation that a kernel's error is compared with.

#pragma once

#include "attention/cuda/policy.h"
#include "flash_case.h"

namespace pruneops::testing {

struct PolicyCase {
  std::string name;
  std::vector<int32_t> cu;  // any values
  int64_t total;
  int64_t heads_q = 2, heads_k = 2;
  float scale = 0.0f;  // 0: 1 / sqrt(head_dim)
  float epsilon = 1e-6f;
  int64_t padding = 0;
  // What keys count, drawn from these.
  std::vector<float> counts{0.0f, 1.0f};
};

inline std::vector<PolicyCase> policy_cases() {
  const std::vector<float> any{0.0f, 1.0f, 1.0f, 0.5f, 1.5f, 3e-6f, -0.02f};
  std::vector<PolicyCase> cases;
  cases.push_back({"one segment", {0, 200}, 200});
  cases.push_back({"mixed lengths, any policy", boundaries({0, 1, 70, 130, 0}), 201});
  cases.back().counts = any;
  cases.push_back({"4 heads a key head, tails, strides", boundaries({33, 1, 70}, 2), 110, 8, 2});
  cases.back().padding = 8;
  cases.back().epsilon = 0.5f;
  cases.push_back({"7 heads a key head, negative scale", {0, 40, 41, 130}, 130, 7, 1, -0.3f});
  cases.back().counts = any;
  cases.push_back({"8 heads a key head, lies", {-5, 20, 10, 45, 900}, 50, 8, 1});
  cases.back().epsilon = 10.0f;
  cases.push_back({"policy of ones, no epsilon", {0, 80}, 80});
  cases.back().counts = {1.0f};
  cases.back().epsilon = 0.0f;
  cases.push_back({"large and small counts", {0, 90}, 90});
  cases.back().counts = {1e6f, 1e-7f, 0.0f};
  cases.push_back({"no segment", {0}, 3});
  cases.push_back({"no row", {0, 0}, 0});
  return cases;
}

// A case's tensors. Rows of no segment are NaN, and so is the policy there and for the last key of
// a segment, which only its own row sees.
struct PolicyInputs : FlashInputs {
  float epsilon;
  std::vector<float> policy;  // [total]

  PolicyInputs(const PolicyCase& c, int64_t head_dim, FloatType t, unsigned seed)
      : FlashInputs({c.name, c.cu, c.cu, c.total, c.total, c.heads_q, c.heads_k, true, false,
                     c.scale, c.padding},
                    head_dim, t, seed),
        epsilon(c.epsilon),
        policy(c.total, NAN) {
    std::mt19937 random(seed);
    for (const Segment& s : segments) {
      for (int64_t j = 0; j + 1 < s.k_len; ++j) {
        policy[s.k_begin + j] = c.counts[random() % c.counts.size()];
      }
    }
  }
  // What key j of a segment counts for row i of it.
  float count(const Segment& s, int64_t i, int64_t j) const {
    return i == j ? 1.0f : policy[s.k_begin + j];
  }
};

// [total, heads_q, head_dim], and [heads_q, total]: the largest exponent of 2 and the sum of what
// keys count, without epsilon; and the sum of its absolute values.
struct PolicyResults {
  std::vector<double> out, max, sum, absolute;
};

// Every sum in Real: double for the reference, float for the straightforward computation, which
// rounds probabilities and output to the dtype.
template <class Real>
PolicyResults attend_under_policy(const PolicyInputs& in) {
  const bool rounds = sizeof(Real) == sizeof(float);
  const auto handed_on = [&](Real x) {
    return rounds ? static_cast<Real>(rounded(static_cast<float>(x), in.type)) : x;
  };
  const int64_t dims = in.heads.head_dim, heads_q = in.heads.num_heads_q;
  const int64_t total = in.shape.total_q;
  const Real epsilon = in.epsilon;
  PolicyResults results;
  results.out.assign(total * heads_q * dims, 0.0);
  results.max.assign(heads_q * total, -std::numeric_limits<double>::infinity());
  results.sum.assign(heads_q * total, 0.0);
  results.absolute = results.sum;
  for (const Segment& s : in.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < heads_q; ++h) {
        const int64_t row = s.q_begin + i, head_k = h / in.heads.group;
        std::vector<Real> e(i + 1), out(dims, 0), all(dims, 0);
        for (int64_t j = 0; j <= i; ++j) {
          Real dot = 0;
          for (int64_t d = 0; d < dims; ++d) {
            dot += static_cast<Real>(in.q.at(row, h, d)) * in.k.at(s.k_begin + j, head_k, d);
          }
          e[j] = dot * in.scale;
        }
        const Real most = *std::max_element(e.begin(), e.end());
        Real sum = 0, absolute = 0;
        for (int64_t j = 0; j <= i; ++j) {
          e[j] = std::exp(e[j] - most) * in.count(s, i, j);
          sum += e[j];
          absolute += std::abs(e[j]);
        }
        for (int64_t j = 0; j < s.k_len; ++j) {
          const Real weight = j <= i ? handed_on(e[j] / (sum + epsilon)) : 0;
          for (int64_t d = 0; d < dims; ++d) {
            const Real v = in.v.at(s.k_begin + j, head_k, d);
            out[d] += weight * v;
            all[d] += v;
          }
        }
        for (int64_t d = 0; d < dims; ++d) {
          const Real share = epsilon / static_cast<Real>(s.k_len) / (sum + epsilon);
          results.out[(row * heads_q + h) * dims + d] =
              static_cast<double>(handed_on(out[d] + share * all[d]));
        }
        results.max[h * total + row] = static_cast<double>(most) / std::log(2.0);
        results.sum[h * total + row] = static_cast<double>(sum);
        results.absolute[h * total + row] = static_cast<double>(absolute);
      }
    }
  }
  return results;
}

}  // namespace pruneops::testing
