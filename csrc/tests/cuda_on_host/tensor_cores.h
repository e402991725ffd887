// Stands in for the tensor cores: the product of one warp, from the fragments of its lanes as the
// PTX manual lays them out. Sums are cut off towards zero, as the hardware's are, so that an
// algorithm which needs them rounded shows.

#pragma once

#include <math.h>
#include <stdint.h>

#include "common/float_types.h"
#include "engine.h"

namespace cuda_on_host {

inline float cut_off(double x) {
  const float rounded = static_cast<float>(x);
  return fabs(double{rounded}) > fabs(x) ? nextafterf(rounded, 0.0f) : rounded;
}

template <bool kBFloat16>
double element(uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(half == 0 ? word & 0xffffu : word >> 16);
  if (kBFloat16) return pruneops::to_float(pruneops::BFloat16{bits});
  return pruneops::to_float(pruneops::Half{bits});
}

// See mma_16x8x16 in common/cuda_mma.cuh.
template <bool kBFloat16>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Block& block = Block::current();
  block.exchange("mma", {a[0], a[1], a[2], a[3], b[0], b[1]});
  const int lane = block.lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int word_of_a = row / 8 + 2 * (k / 8), word_of_b = 4 + k / 8;
      const uint32_t x = block.exchanged(row % 8 * 4 + k % 8 / 2, word_of_a);
      const uint32_t y = block.exchanged(column * 4 + k % 8 / 2, word_of_b);
      sum += element<kBFloat16>(x, k % 2) * element<kBFloat16>(y, k % 2);
    }
    d[i] = cut_off(sum);
  }
}

}  // namespace cuda_on_host
