// Random ragged batches for the attention tests, and the dense computation in double precision.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/plan.h"
#include "check.h"
#include "common/float_types.h"

namespace pruneops::testing {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::mt19937& generator() {
  static std::mt19937 g(7);
  return g;
}

inline int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator());
}

// Rows of one dtype, [rows, heads, head_dim] with gaps between heads and between rows.
struct Rows {
  FloatType type;
  int64_t rows, heads, head_dim, head_stride, row_stride;
  std::vector<unsigned char> bytes;

  Rows(FloatType t, int64_t n, int64_t h, int64_t d, bool random)
      : type(t), rows(n), heads(h), head_dim(d), head_stride(d + 3), row_stride((d + 3) * h + 1) {
    bytes.resize(static_cast<size_t>(std::max<int64_t>(n * row_stride * element_size(t), 1)));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n * row_stride; ++i) set(i, kNan);
    for (int64_t i = 0; random && i < n * h * d; ++i) {
      set(i / (h * d) * row_stride + i / d % h * head_stride + i % d, normal(generator()));
    }
  }
  void set(int64_t i, float value) {
    unsigned char* p = bytes.data() + i * element_size(type);
    if (type == FloatType::kFloat32) std::memcpy(p, &value, 4);
    BFloat16 b;
    Half h;
    from_float(value, &b);
    from_float(value, &h);
    if (type == FloatType::kBFloat16) std::memcpy(p, &b, 2);
    if (type == FloatType::kFloat16) std::memcpy(p, &h, 2);
  }
  double at(int64_t row, int64_t head, int64_t d) const {
    const unsigned char* p =
        bytes.data() + (row * row_stride + head * head_stride + d) * element_size(type);
    float value;
    BFloat16 b;
    Half h;
    if (type == FloatType::kFloat32) return std::memcpy(&value, p, 4), value;
    if (type == FloatType::kBFloat16) return std::memcpy(&b, p, 2), to_float(b);
    return std::memcpy(&h, p, 2), to_float(h);
  }
  RowView view() { return {bytes.data(), 0, row_stride, head_stride, type}; }
};

// One random batch and everything a kernel needs to run on it.
struct Case {
  Heads heads;
  FloatType type;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  std::vector<int32_t> kv_limit;
  Visibility visibility{};
  float scale;
  std::vector<Segment> segments;
  Rows q, k, v, dout;

  Case(Heads h, FloatType t, int64_t batch, int64_t longest, int mode)
      : heads(h),
        type(t),
        scale(1.0f / std::sqrt(static_cast<float>(h.head_dim))),
        q(t, lengths(cu_q, batch, longest), h.num_heads_q, h.head_dim, true),
        k(t, lengths(cu_k, batch, longest), h.num_heads_k, h.head_dim, true),
        v(t, cu_k.back(), h.num_heads_k, h.head_dim, true),
        dout(t, cu_q.back(), h.num_heads_q, h.head_dim, true) {
    visibility.causal = mode == 1;
    if (mode == 2) {
      kv_limit.resize(cu_q.back() + 1);
      for (int32_t& limit : kv_limit) limit = static_cast<int32_t>(random_int(-2, longest + 2));
      visibility.kv_limit = kv_limit.data();
    }
    segments = packed_segments(cu_q.data(), cu_k.data(), batch, cu_q.back(), cu_k.back());
  }
  static int64_t lengths(std::vector<int32_t>& cu, int64_t batch, int64_t longest) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = random_int(0, 3) == 0 ? random_int(0, 4) : random_int(1, longest);
      cu.push_back(cu.back() + static_cast<int32_t>(length));
    }
    return cu.back();
  }
  int64_t total_q() const { return cu_q.back(); }
  int64_t total_k() const { return cu_k.back(); }
  int64_t visible(const Segment& s, int64_t query) const {
    if (!kv_limit.empty()) return std::clamp<int64_t>(kv_limit[s.q_begin + query], 0, s.k_len);
    if (!visibility.causal) return s.k_len;
    return std::clamp<int64_t>(s.k_len - s.q_len + query + 1, 0, s.k_len);
  }
  // Probabilities of one query and head; lse is set.
  std::vector<double> softmax(const Segment& s, int64_t query, int64_t head, double& lse) const {
    std::vector<double> p(visible(s, query));
    double most = -kInf, sum = 0.0;
    for (size_t j = 0; j < p.size(); ++j) {
      p[j] = 0.0;
      for (int64_t d = 0; d < heads.head_dim; ++d) {
        p[j] += q.at(s.q_begin + query, head, d) * k.at(s.k_begin + j, head / heads.group, d);
      }
      p[j] *= scale;
      most = std::max(most, p[j]);
    }
    for (double& x : p) sum += x = std::exp(x - most);
    for (double& x : p) x /= sum;
    lse = p.empty() ? -kInf : most + std::log(sum);
    return p;
  }
};

inline double tolerance(FloatType type) {
  return type == FloatType::kFloat32 ? 2e-5 : (type == FloatType::kFloat16 ? 4e-3 : 3e-2);
}

inline void check_close(double got, double expected, double tol) {
  if (!(std::abs(got - expected) <= tol * std::max(1.0, std::abs(expected)))) {
    std::fprintf(stderr, "got %g, expected %g\n", got, expected);
    CHECK(false);
  }
}

inline std::vector<char> poisoned_workspace(const AttentionKernels& kernels, const Heads& heads,
                                            char** p) {
  std::vector<char> workspace(static_cast<size_t>(2 * kernels.workspace_bytes(heads) + 64),
                              static_cast<char>(0xff));
  *p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  return workspace;
}

}  // namespace pruneops::testing
