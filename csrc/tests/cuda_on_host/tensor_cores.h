// Stands in for the tensor cores: the product of one warp, from the fragments of its lanes as the
// PTX manual lays them out, and the loads of fragments. Sums are cut off towards zero, as the
// hardware's are, so that an algorithm which needs them rounded shows.

#pragma once

#include <math.h>
#include <stdint.h>

#include <array>
#include <cstring>

#include "common/float_types.h"
#include "engine.h"

namespace cuda_on_host {

inline float cut_off(double x) {
  const float rounded = static_cast<float>(x);
  if (fabs(double{rounded}) <= fabs(x) || x != x) return rounded;
  return pruneops::float_from_bits(pruneops::bits_of_float(rounded) - 1);  // next towards zero
}

template <bool kBFloat16>
inline float element(uint16_t bits) {
  if constexpr (kBFloat16) {
    return pruneops::to_float(pruneops::BFloat16{bits});
  } else {
    // Looked up: tests multiply a lot.
    static const auto table = [] {
      std::array<float, 1 << 16> t;
      for (uint32_t i = 0; i < t.size(); ++i)
        t[i] = pruneops::to_float(pruneops::Half{static_cast<uint16_t>(i)});
      return t;
    }();
    return table[bits];
  }
}

template <bool kBFloat16>
inline void put_elements(uint32_t word, double* out, int distance) {
  out[0] = element<kBFloat16>(static_cast<uint16_t>(word & 0xffffu));
  out[distance] = element<kBFloat16>(static_cast<uint16_t>(word >> 16));
}

struct Fragments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// Eight columns at once, as far as the compiler has vectors for that.
using Columns = double __attribute__((vector_size(64)));

template <bool kBFloat16>
void multiply(const std::array<Fragments*, 32>& lanes) {
  double a[16][16];
  union {
    Columns columns;
    double of[8];
  } b[16], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      put_elements<kBFloat16>(mine.a[i], &a[g + i % 2 * 8][2 * t + i / 2 * 8], 1);
    for (int i = 0; i < 2; ++i) put_elements<kBFloat16>(mine.b[i], &b[2 * t + i * 8].of[g], 8);
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8].of[2 * t + i % 2] = mine.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    Columns sum = d[row].columns;
    for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k].columns;
    d[row].columns = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      lanes[lane]->d[i] = cut_off(d[lane / 4 + i / 2 * 8].of[2 * (lane % 4) + i % 2]);
  }
}

// See mma_16x8x16 in common/cuda_mma.cuh.
template <bool kBFloat16>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{d, a, b};
  Block::current().together(kBFloat16 ? "mma of bfloat16" : "mma of float16", mine,
                            multiply<kBFloat16>);
}

// Rows of the same matrix that lay in the same banks, since the program began: each costs the
// hardware one more turn. A layout that is free of conflicts leaves it 0.
inline int64_t bank_conflicts = 0;

struct MatrixRow {
  const unsigned char* row;  // 16 bytes
  uint32_t* r;               // [matrices]
};

template <int kMatrices, bool kTransposed>
void load_rows(const std::array<MatrixRow*, 32>& lanes) {
  for (int i = 0; i < kMatrices; ++i) {
    uint16_t matrix[8][8];
    int rows_in_banks[8] = {}, turns = 1;
    for (int j = 0; j < 8; ++j) {
      const unsigned char* row = lanes[8 * i + j]->row;
      std::memcpy(matrix[j], row, sizeof(matrix[j]));
      int& rows = rows_in_banks[reinterpret_cast<uintptr_t>(row) / 16 % 8];
      // Lanes that name the same row share it.
      bool shared = false;
      for (int other = 0; other < j; ++other) shared |= lanes[8 * i + other]->row == row;
      rows += !shared;
      turns = rows > turns ? rows : turns;
    }
    bank_conflicts += turns - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      lanes[lane]->r[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

// See load_matrices and load_matrices_transposed in common/cuda_mma.cuh.
template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t (&r)[kMatrices], const void* row) {
  Block& block = Block::current();
  if (block.lane() < 8 * kMatrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
      block.fail("ldmatrix reads a row that is not on 16 bytes");
    if (block.is_private(row)) block.fail("ldmatrix reads memory that is not shared");
  }
  constexpr const char* kNames[2][2] = {{"ldmatrix x2", "ldmatrix x4"},
                                        {"ldmatrix x2 trans", "ldmatrix x4 trans"}};
  MatrixRow mine{static_cast<const unsigned char*>(row), r};
  block.together(kNames[kTransposed][kMatrices == 4], mine, load_rows<kMatrices, kTransposed>);
}

template <bool kBFloat16>
uint32_t pack_pair(float low, float high) {
  using Element = std::conditional_t<kBFloat16, pruneops::BFloat16, pruneops::Half>;
  Element first, second;
  pruneops::from_float(low, &first);
  pruneops::from_float(high, &second);
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

}  // namespace cuda_on_host
