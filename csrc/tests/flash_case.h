// Ragged batches for the tests of the flash kernels, what attention makes of them in double
// precision, and how far from that a kernel may be.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/flash.h"
#include "check.h"
#include "common/segments.h"

namespace pruneops::testing {

struct FlashCase {
  std::string name;
  std::vector<int32_t> cu_q, cu_k;  // any values; cu_k empty with seqused_k
  int64_t total_q, total_k;
  int64_t heads_q = 2, heads_k = 2;
  bool causal = true;
  bool with_limit = false;
  float scale = 0.0f;                // 0: 1 / sqrt(head_dim)
  int64_t padding = 0;               // elements between heads and between rows, a multiple of 8
  std::vector<int32_t> seqused_k{};  // any values; not empty: keys in slots
  int64_t capacity = 0;
};

// Boundaries of segments of these lengths, from `begin` on.
inline std::vector<int32_t> boundaries(const std::vector<int32_t>& lengths, int32_t begin = 0) {
  std::vector<int32_t> cu{begin};
  for (int32_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

// What every flash kernel is tested with; sizes that the emulation of a GPU gets through.
inline std::vector<FlashCase> flash_cases() {
  const std::vector<int32_t> mixed_q{0, 1, 70, 130, 0}, mixed_k{3, 1, 100, 64, 0};
  std::vector<FlashCase> cases;
  cases.push_back({"one segment", {0, 200}, {0, 200}, 200, 200});
  cases.push_back({"mixed lengths, causal", boundaries(mixed_q), boundaries(mixed_k), 201, 168});
  cases.push_back({"mixed lengths, all keys", boundaries(mixed_q), boundaries(mixed_k), 201, 168});
  cases.back().causal = false;
  cases.push_back({"kv_limit, 4 heads a key head, tails, strides", boundaries({33, 1, 60}, 2),
                   boundaries({150, 7, 0}, 1), 103, 163});
  cases.back().heads_q = 8;
  cases.back().with_limit = true;
  cases.back().padding = 8;
  cases.push_back({"7 heads a key head, negative scale", {0, 40, 41}, {0, 129, 140}, 41, 140});
  cases.back().heads_q = 7;
  cases.back().heads_k = 1;
  cases.back().scale = -0.3f;
  cases.push_back({"8 heads a key head, boundaries that lie, kv_limit",
                   {-5, 20, 10, 45, 900},
                   {3, 70, 60, 80, 77},
                   50,
                   90});
  cases.back().heads_q = 8;
  cases.back().heads_k = 1;
  cases.back().with_limit = true;
  cases.push_back({"all keys, tails", {0, 21}, {0, 40}, 30, 50});
  cases.back().causal = false;
  cases.push_back({"no segment", {0}, {0}, 3, 2});
  cases.push_back({"no query and no key", {0, 0}, {0, 0}, 0, 0});
  return cases;
}

// Cache slots, for forward passes.
inline std::vector<FlashCase> flash_slot_cases() {
  FlashCase c{"slots", boundaries({5, 0, 80, 2}), {}, 90, 0};
  c.heads_q = 4;
  c.seqused_k = {70, 10, 500, -3};
  c.capacity = 100;
  FlashCase limited = c;
  limited.name = "slots, kv_limit, strides";
  limited.with_limit = true;
  limited.padding = 16;
  return {c, limited};
}

// More segments than any GPU has multiprocessors, of lengths that a seed makes.
inline FlashCase many_segments(int64_t num_segments, int32_t longest, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> q(num_segments), k(num_segments);
  for (int32_t& n : q) n = static_cast<int32_t>(random() % (longest + 1));
  for (int32_t& n : k) n = static_cast<int32_t>(random() % (longest + 1));
  FlashCase c{"many segments", boundaries(q), boundaries(k), 0, 0, 1, 1};
  c.total_q = c.cu_q.back();
  c.total_k = c.cu_k.back();
  return c;
}

inline float rounded(float x, FloatType type) {
  if (type == FloatType::kFloat32) return x;
  BFloat16 b;
  Half h;
  from_float(x, &b);
  from_float(x, &h);
  return type == FloatType::kBFloat16 ? to_float(b) : to_float(h);
}

// Rows of heads in 16 bits, exactly as long as their last element, full of NaN to begin with.
struct FlashTensor {
  int64_t rows, heads, head_dim, head_stride, row_stride;
  FloatType type;
  std::vector<uint16_t> bits;

  FlashTensor(int64_t rows, int64_t heads, int64_t head_dim, int64_t padding, FloatType type)
      : rows(rows),
        heads(heads),
        head_dim(head_dim),
        head_stride(head_dim + padding),
        row_stride(heads * head_stride + padding),
        type(type) {
    const int64_t last = (rows - 1) * row_stride + (heads - 1) * head_stride + head_dim;
    bits.assign(rows > 0 ? last : 0, 0x7fff);  // NaN in either type
  }
  uint16_t& bits_of(int64_t row, int64_t head, int64_t d) {
    return bits[row * row_stride + head * head_stride + d];
  }
  void set(int64_t row, int64_t head, int64_t d, float value) {
    BFloat16 b;
    Half h;
    from_float(value, &b);
    from_float(value, &h);
    bits_of(row, head, d) = type == FloatType::kBFloat16 ? b.bits : h.bits;
  }
  float at(int64_t row, int64_t head, int64_t d) const {
    const uint16_t x = bits[row * row_stride + head * head_stride + d];
    return type == FloatType::kBFloat16 ? to_float(BFloat16{x}) : to_float(Half{x});
  }
  void randomize_row(int64_t row, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t d = 0; d < head_dim; ++d) set(row, h, d, normal(random));
    }
  }
  RowView view(int64_t rows_of_slot = 0) {
    return {bits.data(), rows_of_slot * row_stride, row_stride, head_stride, type};
  }
  // [rows, heads, head_dim] without gaps.
  std::vector<double> values() const {
    std::vector<double> out;
    for (int64_t i = 0; i < rows * heads * head_dim; ++i) {
      out.push_back(at(i / (heads * head_dim), i / head_dim % heads, i % head_dim));
    }
    return out;
  }
};

// A case's tensors. Rows of no segment and unused slots are NaN.
struct FlashInputs {
  FlashCase shape;
  Heads heads;
  FloatType type;
  float scale;
  std::vector<Segment> segments;
  std::vector<int32_t> kv_limit;  // [total_q] or empty
  FlashTensor q, k, v, dout;
  std::vector<float> dlse;  // [heads_q, total_q]

  FlashInputs(const FlashCase& c, int64_t head_dim, FloatType t, unsigned seed)
      : shape(c),
        heads{c.heads_q, c.heads_k, head_dim, c.heads_q / c.heads_k},
        type(t),
        scale(c.scale != 0.0f ? c.scale : 1.0f / std::sqrt(static_cast<float>(head_dim))),
        q(c.total_q, c.heads_q, head_dim, c.padding, t),
        k(key_rows(c), c.heads_k, head_dim, c.padding, t),
        v(key_rows(c), c.heads_k, head_dim, c.padding, t),
        dout(c.total_q, c.heads_q, head_dim, c.padding, t),
        dlse(c.heads_q * c.total_q, std::numeric_limits<float>::quiet_NaN()) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t n = static_cast<int64_t>(c.cu_q.size());
    std::vector<int32_t> bq(n), bk(n);
    sanitize_cu_seqlens(c.cu_q.data(), n, c.total_q, bq.data());
    if (c.seqused_k.empty()) sanitize_cu_seqlens(c.cu_k.data(), n, c.total_k, bk.data());
    for (int64_t b = 0; b + 1 < n; ++b) {
      Segment s{bq[b], bq[b + 1] - bq[b], bk[b], bk[b + 1] - bk[b], 0};
      if (!c.seqused_k.empty()) {
        s.slot = b;
        s.k_len = std::clamp<int64_t>(c.seqused_k[b], 0, c.capacity);
      }
      segments.push_back(s);
      for (int64_t i = s.q_begin; i < s.q_begin + s.q_len; ++i) {
        q.randomize_row(i, random);
        dout.randomize_row(i, random);
        for (int64_t h = 0; h < c.heads_q; ++h) dlse[h * c.total_q + i] = normal(random);
      }
      for (int64_t j = 0; j < s.k_len; ++j) {
        k.randomize_row(key_row(s, j), random);
        v.randomize_row(key_row(s, j), random);
      }
    }
    if (c.with_limit) {
      // Falls as often as it rises; 0, negative and beyond the keys among them.
      for (int64_t i = 0; i < c.total_q; ++i) {
        kv_limit.push_back(static_cast<int32_t>(random() % 200) - 20);
      }
    }
  }

  static int64_t key_rows(const FlashCase& c) {
    return c.seqused_k.empty() ? c.total_k : static_cast<int64_t>(c.seqused_k.size()) * c.capacity;
  }
  int64_t key_row(const Segment& s, int64_t j) const {
    return s.slot * shape.capacity + s.k_begin + j;
  }
  // Leading keys of the segment that its query sees.
  int64_t visible(const Segment& s, int64_t query) const {
    int64_t limit = s.k_len;
    if (!kv_limit.empty()) {
      limit = kv_limit[s.q_begin + query];
    } else if (shape.causal) {
      limit = s.k_len - s.q_len + query + 1;
    }
    return std::clamp<int64_t>(limit, 0, s.k_len);
  }
  FlashSegments flash_segments() const {
    const bool slots = !shape.seqused_k.empty();
    return {shape.cu_q.data(),
            slots ? nullptr : shape.cu_k.data(),
            slots ? shape.seqused_k.data() : nullptr,
            shape.capacity,
            static_cast<int64_t>(shape.cu_q.size()) - 1,
            shape.total_q,
            shape.total_k};
  }
  Visibility visibility() const {
    return {shape.causal, kv_limit.empty() ? nullptr : kv_limit.data()};
  }
};

// Results without gaps: [rows, heads, head_dim], lse [heads_q, total_q].
struct FlashResults {
  std::vector<double> out, lse, dq, dk, dv;
};

// Attention and, if wanted, its gradients, every sum in Real. In double it is the reference; in
// float, with what a kernel hands from one product to the next rounded to the dtype, it is the
// straightforward computation that a kernel's error is compared with.
template <class Real>
FlashResults attend(const FlashInputs& in, bool gradients) {
  const bool rounds = sizeof(Real) == sizeof(float);
  const auto handed_on = [&](Real x) {
    return rounds ? static_cast<Real>(rounded(static_cast<float>(x), in.type)) : x;
  };
  const int64_t dims = in.heads.head_dim, heads_q = in.heads.num_heads_q;
  const int64_t heads_k = in.heads.num_heads_k, total_q = in.shape.total_q;
  std::vector<Real> out(total_q * heads_q * dims, 0), dq(out.size(), 0);
  std::vector<Real> dk(in.k.rows * heads_k * dims, 0), dv(dk.size(), 0);
  FlashResults results;
  results.lse.assign(heads_q * total_q, -std::numeric_limits<double>::infinity());
  for (const Segment& s : in.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < heads_q; ++h) {
        const int64_t row = s.q_begin + i, head_k = h / in.heads.group, n = in.visible(s, i);
        if (n == 0) continue;
        std::vector<Real> p(n);
        for (int64_t j = 0; j < n; ++j) {
          Real dot = 0;
          for (int64_t d = 0; d < dims; ++d) {
            dot += static_cast<Real>(in.q.at(row, h, d)) * in.k.at(in.key_row(s, j), head_k, d);
          }
          p[j] = dot * in.scale;
        }
        const Real most = *std::max_element(p.begin(), p.end());
        Real sum = 0;
        for (Real& x : p) sum += x = std::exp(x - most);
        for (Real& x : p) x /= sum;
        const Real lse = most + std::log(sum);
        results.lse[h * total_q + row] = static_cast<double>(lse);
        Real* o = &out[(row * heads_q + h) * dims];
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t d = 0; d < dims; ++d) {
            o[d] += handed_on(p[j]) * in.v.at(in.key_row(s, j), head_k, d);
          }
        }
        for (int64_t d = 0; d < dims; ++d) o[d] = handed_on(o[d]);
        if (!gradients) continue;
        Real delta = -static_cast<Real>(in.dlse[h * total_q + row]);
        for (int64_t d = 0; d < dims; ++d) delta += o[d] * in.dout.at(row, h, d);
        for (int64_t j = 0; j < n; ++j) {
          const int64_t key = in.key_row(s, j), to = (key * heads_k + head_k) * dims;
          Real dp = 0;
          for (int64_t d = 0; d < dims; ++d) {
            dp += static_cast<Real>(in.dout.at(row, h, d)) * in.v.at(key, head_k, d);
          }
          const Real ds = handed_on(p[j] * (dp - delta)), weight = handed_on(p[j]);
          for (int64_t d = 0; d < dims; ++d) {
            dq[(row * heads_q + h) * dims + d] += ds * in.k.at(key, head_k, d);
            dk[to + d] += ds * in.q.at(row, h, d);
            dv[to + d] += weight * in.dout.at(row, h, d);
          }
        }
      }
    }
  }
  for (Real& x : dq) x = handed_on(x * in.scale);
  for (Real& x : dk) x = handed_on(x * in.scale);
  for (Real& x : dv) x = handed_on(x);
  results.out.assign(out.begin(), out.end());
  if (gradients) {
    results.dq.assign(dq.begin(), dq.end());
    results.dk.assign(dk.begin(), dk.end());
    results.dv.assign(dv.begin(), dv.end());
  }
  return results;
}

// The largest error may be `factor` times that of the straightforward computation, and one rounding
// of the reference more.
inline void check_errors(const std::string& what, const std::vector<double>& got,
                         const std::vector<double>& exact,
                         const std::vector<double>& straightforward, double factor,
                         FloatType type) {
  CHECK(got.size() == exact.size() && straightforward.size() == exact.size());
  double error = 0.0, allowed = 0.0, rounding = 0.0;
  size_t worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = std::abs(got[i] - exact[i]);
    if (!(e <= error) && error == error) error = e, worst = i;  // NaN stays
    allowed = std::max(allowed, factor * std::abs(straightforward[i] - exact[i]));
    const float x = static_cast<float>(exact[i]);
    rounding = std::max(rounding, std::abs(static_cast<double>(rounded(x, type)) - exact[i]));
  }
  if (!(error <= allowed + rounding)) {
    std::fprintf(stderr, "%s: element %zu is %g, expected %g; error %g, allowed %g + %g\n",
                 what.c_str(), worst, got[worst], exact[worst], error, allowed, rounding);
    std::exit(1);
  }
}

//   lse  [heads_q, total_q] as a kernel wrote it
inline void check_lse(const std::string& what, const std::vector<float>& lse,
                      const std::vector<double>& exact) {
  CHECK(lse.size() == exact.size());
  for (size_t i = 0; i < lse.size(); ++i) {
    const bool none = std::isinf(exact[i]);
    if (none ? lse[i] == exact[i]
             : std::abs(lse[i] - exact[i]) <= 1e-5 * std::max(1.0, std::abs(exact[i]))) {
      continue;
    }
    std::fprintf(stderr, "%s: lse %zu is %.9g, expected %.9g\n", what.c_str(), i, lse[i], exact[i]);
    std::exit(1);
  }
}

}  // namespace pruneops::testing
