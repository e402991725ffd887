// Means over frames in plain C++, and what a kernel's results are held against.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/float_types.h"
#include "common/segments.h"

namespace pruneops::testing {

struct PositionCase {
  std::string name;
  std::vector<int32_t> cu_seqlens, num_positions;
  int64_t capacity;
  int64_t total, channels, padding;
  FloatType type = FloatType::kFloat32;
};

// Rows that a position shares from frame to frame, more or less; NaN between them, and exactly as
// long as the last one.
struct PositionRowsOf {
  std::vector<float> values;     // as rounded to the type
  std::vector<uint16_t> halves;  // the same, where the type is half precision
  int64_t stride;

  explicit PositionRowsOf(const PositionCase& c) : stride(c.channels + c.padding) {
    std::mt19937 random(static_cast<unsigned>(c.total * 31 + c.channels));
    std::normal_distribution<float> normal;
    values.assign(c.total > 0 ? c.total * stride - c.padding : 0,
                  std::numeric_limits<float>::quiet_NaN());
    halves.resize(c.type == FloatType::kFloat32 ? 0 : values.size());
    for (int64_t r = 0; r < c.total; ++r) {
      for (int64_t ch = 0; ch < c.channels; ++ch) {
        float& x = values[r * stride + ch];
        x = r % 11 == 3 ? 0.0f : std::sin(static_cast<float>(ch)) + 0.5f * normal(random);
        if (r % 13 == 5) x *= 1e-14f;
        if (r % 17 == 8 && c.type != FloatType::kFloat16) x *= 1e25f;
        if (c.type == FloatType::kBFloat16) round<BFloat16>(x, halves[r * stride + ch]);
        if (c.type == FloatType::kFloat16) round<Half>(x, halves[r * stride + ch]);
      }
    }
  }

  template <class T>
  static void round(float& x, uint16_t& bits) {
    T rounded;
    from_float(x, &rounded);
    bits = rounded.bits;
    x = to_float(rounded);
  }

  const void* data() const {
    return halves.empty() ? static_cast<const void*>(values.data()) : halves.data();
  }
};

template <class T>
uint16_t rounded_bits(float x) {
  T rounded;
  from_float(x, &rounded);
  return rounded.bits;
}

// Sums in float and in the order of frames, which leaves one right result; similarities in double.
//   means       [capacity, channels], as `halves` where the type is half precision
//   similarity  [capacity]
inline void check_positions(const PositionCase& c, const PositionRowsOf& x,
                            const std::vector<float>& means, const std::vector<uint16_t>& halves,
                            const std::vector<float>& similarity) {
  const auto require = [&](bool condition) {
    if (!condition) std::fprintf(stderr, "case: %s\n", c.name.c_str());
    CHECK(condition);
  };
  const int64_t num = static_cast<int64_t>(c.cu_seqlens.size());
  std::vector<int32_t> bounds(num);
  sanitize_cu_seqlens(c.cu_seqlens.data(), num, c.total, bounds.data());
  std::vector<float> row(c.channels);
  std::vector<double> units(c.channels);
  int64_t slot = 0;
  const auto check_row = [&]() {
    for (int64_t ch = 0; ch < c.channels; ++ch) {
      const int64_t i = slot * c.channels + ch;
      if (c.type == FloatType::kFloat32) require(means[i] == row[ch]);
      if (c.type == FloatType::kBFloat16) require(halves[i] == rounded_bits<BFloat16>(row[ch]));
      if (c.type == FloatType::kFloat16) require(halves[i] == rounded_bits<Half>(row[ch]));
    }
  };
  for (int64_t b = 0; b + 1 < num; ++b) {
    const int64_t positions = std::max(c.num_positions[b], 0);
    const int64_t frames = (bounds[b + 1] - bounds[b]) / std::max<int64_t>(positions, 1);
    for (int64_t j = 0; j < positions && slot < c.capacity; ++j, ++slot) {
      std::fill(row.begin(), row.end(), 0.0f);
      std::fill(units.begin(), units.end(), 0.0);
      for (int64_t w = 0; w < frames; ++w) {
        const float* values = x.values.data() + (bounds[b] + w * positions + j) * x.stride;
        double norm = 0.0;
        for (int64_t ch = 0; ch < c.channels; ++ch) norm += double{values[ch]} * values[ch];
        norm = std::max(std::sqrt(norm), 1e-12);
        for (int64_t ch = 0; ch < c.channels; ++ch) {
          row[ch] += values[ch];
          units[ch] += values[ch] / norm;
        }
      }
      for (float& value : row) value /= static_cast<float>(std::max<int64_t>(frames, 1));
      check_row();
      double square = 0.0;
      for (double value : units) square += value * value;
      const double pairs = static_cast<double>(frames) * static_cast<double>(frames - 1);
      const double want = (square - static_cast<double>(frames)) / pairs;
      require(frames < 2 ? std::isnan(similarity[slot])
                         : std::abs(similarity[slot] - want) <= 5e-7);
    }
  }
  std::fill(row.begin(), row.end(), 0.0f);
  for (; slot < c.capacity; ++slot) {
    check_row();
    require(similarity[slot] == 0.0f);
  }
}

}  // namespace pruneops::testing
