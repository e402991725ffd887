// What the tensor cores make of the 64 bits that name an operand in shared memory. Depends on
// nothing, so that it can be checked against CuTe.

#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_host {

struct OperandBits {
  size_t start, leading, stride;  // bytes
  unsigned swizzle;               // 1, 2, 3: 128, 64, 32 bytes; 0: none
  bool only_known;                // no other bits are set

  explicit OperandBits(uint64_t bits)
      : start((bits & kField) << 4),
        leading((bits >> 16 & kField) << 4),
        stride((bits >> 32 & kField) << 4),
        swizzle(static_cast<unsigned>(bits >> 62)),
        only_known((bits & ~(kField | kField << 16 | kField << 32 | uint64_t{3} << 62)) == 0) {}

  // Where the element (row, k) of a [rows, 16] operand of 16-bit elements lies; `transposed`: the
  // rows are contiguous, not the k. Only with a swizzle.
  size_t address(int row, int k, bool transposed) const {
    const size_t i = static_cast<size_t>(row), j = static_cast<size_t>(k);
    const size_t row_bytes = size_t{256} >> swizzle, width = row_bytes / 2;
    const size_t plain = transposed ? start + i % width * 2 + i / width * leading +
                                          j % 8 * row_bytes + j / 8 * stride
                                    : start + i % 8 * row_bytes + i / 8 * stride + j * 2;
    // By address: bits 4 to 6 are crossed with bits 7 to 9, as many of them as the swizzle is wide.
    return plain ^ (plain >> 7 & (row_bytes / 16 - 1)) << 4;
  }

 private:
  static constexpr uint64_t kField = 0x3fff;
};

}  // namespace cuda_on_host
