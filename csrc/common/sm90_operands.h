// Which bits name an operand of a Hopper product, and which thread holds which element: plain index
// logic, checked against CuTe in csrc/tests/cute.

#pragma once

#include "common/float_types.h"
#include "common/sm90_panels.h"

namespace pruneops {

// A d [64, kColumns] is spread over the warpgroup like the d of mma_16x8x16, once for every 8
// columns: warp w has rows 16 w to 16 w + 15, and thread 32 w + 4 g + t holds in
//   d[4 j + 0], d[4 j + 1]   row 16 w + g,      columns 8 j + 2 t, 8 j + 2 t + 1
//   d[4 j + 2], d[4 j + 3]   row 16 w + g + 8,  the same columns
PRUNEOPS_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
PRUNEOPS_HOST_DEVICE constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// An a [64, 16] in registers is spread like a d of 16 columns, two elements to a word: a[i] holds
// what d[2 i] and d[2 i + 1] would, the first in the lower half.

// Operands in shared memory are named by 64 bits: where the first row begins, two distances in
// bytes, all of these in units of 16 bytes, and the swizzle. `tile` is the tile's address in shared
// memory; what is constant is added to the part that is not, so that the operands of one tile
// differ by one addition.
template <class Tile>
PRUNEOPS_HOST_DEVICE constexpr uint64_t operand_bits(uint32_t tile, int offset, int distance) {
  constexpr uint32_t kSwizzle = Tile::kRowBytes == 128 ? 1 : Tile::kRowBytes == 64 ? 2 : 3;
  constexpr uint32_t kHigh = 8 * Tile::kRowBytes / 16 | kSwizzle << 30;
  const uint32_t first = (tile & 0x3ffff) >> 4 | static_cast<uint32_t>(distance / 16) << 16;
  return uint64_t{kHigh} << 32 | (first + static_cast<uint32_t>(offset) / 16);
}

// See rows_operand() and columns_operand().
template <class Tile>
PRUNEOPS_HOST_DEVICE constexpr uint64_t rows_operand_bits(uint32_t tile, int row, int step) {
  constexpr int kSteps = Tile::kWidth / 16;  // of a panel
  const int offset = step / kSteps * Tile::kPanelBytes + row * Tile::kRowBytes + step % kSteps * 32;
  return operand_bits<Tile>(tile, offset, 16);
}

template <class Tile>
PRUNEOPS_HOST_DEVICE constexpr uint64_t columns_operand_bits(uint32_t tile, int step) {
  return operand_bits<Tile>(tile, step * 16 * Tile::kRowBytes, Tile::kPanelBytes);
}

}  // namespace pruneops
