// Matrices of any float type for the tests of row kernels, of values whose sums and products are
// exact in float, so that the order of arithmetic cannot matter.

#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/float_types.h"
#include "common/rows.h"

namespace pruneops::testing {

constexpr FloatType kFloatTypes[] = {FloatType::kFloat32, FloatType::kBFloat16,
                                     FloatType::kFloat16};

inline void put_float(FloatType type, float value, void* data, int64_t at) {
  if (type == FloatType::kBFloat16) return from_float(value, static_cast<BFloat16*>(data) + at);
  if (type == FloatType::kFloat16) return from_float(value, static_cast<Half*>(data) + at);
  static_cast<float*>(data)[at] = value;
}

inline float get_float(FloatType type, const void* data, int64_t at) {
  if (type == FloatType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[at]);
  if (type == FloatType::kFloat16) return to_float(static_cast<const Half*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

// A multiple of 1/8 between -2 and 2.
inline float some_value(std::mt19937& random) {
  return (static_cast<int>(random() % 33) - 16) / 8.0f;
}

// [rows, columns], rows `padding` elements further apart than they are long, `shift` elements
// behind a 64-byte boundary, with NaN all around.
struct Matrix {
  FloatType type;
  int64_t rows, columns, padding, shift;
  std::vector<double> storage;  // for its alignment of 8 or more

  Matrix(FloatType type, int64_t rows, int64_t columns, int64_t padding = 0, int64_t shift = 0)
      : type(type), rows(rows), columns(columns), padding(padding), shift(shift) {
    storage.resize(static_cast<size_t>(((rows + 1) * stride() + shift + 64) * 4 / 8 + 64));
    clear();
  }

  int64_t stride() const { return columns + padding; }
  char* base() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data());
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
  void* data() const { return base() + shift * element_size(type); }
  Rows view() const { return {data(), stride()}; }
  float at(int64_t row, int64_t column) const {
    return get_float(type, data(), row * stride() + column);
  }

  // NaN everywhere, also behind the end.
  void clear() { std::memset(storage.data(), 0xff, storage.size() * sizeof(double)); }

  Matrix& fill(std::mt19937& random) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        put_float(type, some_value(random), data(), r * stride() + c);
      }
    }
    return *this;
  }

  // Every byte, so that a write beside the rows shows.
  bool same_bytes(const Matrix& other) const {
    const size_t end = static_cast<size_t>(storage.size() - 8) * sizeof(double) - 64;
    return std::memcmp(base(), other.base(), end) == 0;
  }
};

}  // namespace pruneops::testing
