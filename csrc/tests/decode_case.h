// Inputs of the decode tests, NaN wherever nothing may be read, and what comes out of them by plain
// loops.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "attention/attention.h"
#include "common/float_types.h"

namespace pruneops::testing {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline float rounded(float x, FloatType type) {
  BFloat16 b;
  Half h;
  from_float(x, &b);
  from_float(x, &h);
  return type == FloatType::kFloat32 ? x : type == FloatType::kBFloat16 ? to_float(b) : to_float(h);
}

inline double epsilon(FloatType type) {
  return type == FloatType::kFloat32 ? 0x1p-23 : type == FloatType::kBFloat16 ? 0x1p-7 : 0x1p-10;
}

// Slots of rows of heads, gaps between heads, rows and slots being full of NaN; exactly as long as
// the last element, and with `shift` elements before the first.
struct Slots {
  int64_t slots, rows, heads, head_dim, head_stride, row_stride, slot_stride, shift;
  FloatType type;
  std::vector<float> floats;  // as rounded to the type
  std::vector<uint16_t> halves;

  Slots(int64_t slots, int64_t rows, int64_t heads, int64_t head_dim, int64_t gap, int64_t shift,
        FloatType type)
      : slots(slots),
        rows(rows),
        heads(heads),
        head_dim(head_dim),
        head_stride(head_dim + gap),
        row_stride(heads * head_stride + gap),
        slot_stride(rows * row_stride + gap),
        shift(shift),
        type(type) {
    const bool any = slots > 0 && rows > 0;
    const int64_t count = any ? (slots - 1) * slot_stride + (rows - 1) * row_stride +
                                    (heads - 1) * head_stride + head_dim + shift
                              : 0;
    floats.assign(count, kNan);
    if (type != FloatType::kFloat32) halves.assign(count, 0x7fff);  // NaN of both types
  }
  int64_t place(int64_t slot, int64_t row, int64_t head, int64_t d) const {
    return shift + slot * slot_stride + row * row_stride + head * head_stride + d;
  }
  void set(int64_t i, float x) {
    floats[i] = rounded(x, type);
    if (type == FloatType::kBFloat16) {
      BFloat16 b;
      from_float(x, &b);
      halves[i] = b.bits;
    } else if (type == FloatType::kFloat16) {
      Half h;
      from_float(x, &h);
      halves[i] = h.bits;
    }
  }
  float get(int64_t i) const {
    if (type == FloatType::kBFloat16) return to_float(BFloat16{halves[i]});
    if (type == FloatType::kFloat16) return to_float(Half{halves[i]});
    return floats[i];
  }
  RowView view() {
    void* data = nullptr;
    if (!floats.empty()) {
      data = type == FloatType::kFloat32 ? static_cast<void*>(floats.data() + shift)
                                         : static_cast<void*>(halves.data() + shift);
    }
    return {data, slot_stride, row_stride, head_stride, type};
  }
};

struct Case {
  std::string name;
  std::vector<int32_t> lengths;  // as the kernel gets them
  int64_t capacity;
  int64_t heads_q, heads_k, head_dim;
  FloatType type = FloatType::kFloat32;
  int64_t num_splits = 0;
  bool with_scores = true;
  int64_t gap = 0, shift = 0;
  float scale = 0.25f;
  float spread = 1.0f;  // of the queries: how different logits are

  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t used(int64_t row) const { return std::clamp<int64_t>(lengths[row], 0, capacity); }
};

struct Inputs {
  Slots q, k, v;

  Inputs(const Case& c, unsigned seed)
      : q(1, c.batch(), c.heads_q, c.head_dim, c.gap, c.shift, c.type),
        k(c.batch(), c.capacity, c.heads_k, c.head_dim, c.gap, c.shift, c.type),
        v(k) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < c.batch(); ++b) {
      for (int64_t h = 0; h < c.heads_q; ++h) {
        for (int64_t d = 0; d < c.head_dim; ++d) {
          q.set(q.place(0, b, h, d), normal(random) * c.spread);
        }
      }
      for (int64_t j = 0; j < c.used(b); ++j) {
        for (int64_t h = 0; h < c.heads_k; ++h) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            k.set(k.place(b, j, h, d), normal(random));
            v.set(v.place(b, j, h, d), normal(random));
          }
        }
      }
    }
  }
};

// Real is double for the expected results, or float for the straightforward computation in the
// dtype: sums in float, probabilities rounded.
template <class Real>
struct Results {
  std::vector<Real> out, lse, scores;

  Results(const Case& c, const Inputs& in)
      : out(c.batch() * c.heads_q * c.head_dim, 0),
        lse(c.heads_q * c.batch(), -std::numeric_limits<Real>::infinity()),
        scores(c.batch() * c.capacity, 0) {
    constexpr bool kPlain = std::is_same_v<Real, float>;
    for (int64_t b = 0; b < c.batch(); ++b) {
      const int64_t used = c.used(b);
      std::vector<Real> p(used);
      for (int64_t h = 0; h < c.heads_q && used > 0; ++h) {
        const int64_t of_k = h / (c.heads_q / c.heads_k);
        for (int64_t j = 0; j < used; ++j) {
          p[j] = 0;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            p[j] += Real{in.q.floats[in.q.place(0, b, h, d)]} *
                    Real{in.k.floats[in.k.place(b, j, of_k, d)]};
          }
          p[j] *= c.scale;
        }
        const Real most = *std::max_element(p.begin(), p.end());
        Real sum = 0;
        for (Real& x : p) sum += x = std::exp(x - most);
        lse[h * c.batch() + b] = most + std::log(sum);
        for (int64_t j = 0; j < used; ++j) {
          scores[b * c.capacity + j] += p[j] / sum / static_cast<Real>(c.heads_q);
          const Real weight = kPlain ? rounded(static_cast<float>(p[j]), c.type) : p[j];
          for (int64_t d = 0; d < c.head_dim; ++d) {
            out[(b * c.heads_q + h) * c.head_dim + d] +=
                weight * Real{in.v.floats[in.v.place(b, j, of_k, d)]};
          }
        }
        for (int64_t d = 0; d < c.head_dim; ++d) {
          Real& x = out[(b * c.heads_q + h) * c.head_dim + d];
          x /= sum;
          if (kPlain) x = rounded(static_cast<float>(x), c.type);
        }
      }
    }
  }
};

}  // namespace pruneops::testing
