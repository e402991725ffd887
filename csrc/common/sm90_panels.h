// How a tile of rows lies in shared memory so that Hopper's copies write it and its tensor cores
// read it without bank conflicts.
//
// A tile [rows, head_dim] of 16-bit elements is split by columns into panels, one behind the other.
// A panel [rows, width] is row-major without gaps; its rows are as long as a swizzle is wide, 128,
// 64 or 32 bytes, and the 16-byte chunks of a row are permuted by the swizzle. All panels of a tile
// have the same width, the widest that divides the head dim:
//
//   head_dim   width  panels  swizzle
//     64         64      1     128 bytes
//     80         16      5      32 bytes
//     96         32      3      64 bytes
//    128         64      2     128 bytes
//
// One width, because a product takes all columns of a transposed operand (values in P V) from one
// descriptor, and a descriptor names one swizzle: 80 as 64 + 16 would be two products, the second
// too narrow to keep the tensor cores busy. CuTe chooses the same for these sizes. All three
// swizzles are free of bank conflicts for the 8 rows x 16 bytes that tensor cores read at a time.

#pragma once

#include "common/float_types.h"

namespace pruneops {

// The element at byte `offset` of the unpermuted panel lies at swizzled(offset). Panels begin at
// multiples of 8 rows, as the hardware swizzles by address.
PRUNEOPS_HOST_DEVICE constexpr int swizzled(int offset, int row_bytes) {
  return offset ^ ((offset >> 3) & (row_bytes - 16));
}

template <int kTileRows, int kHeadDim>
struct PanelTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kHeadDim;
  static constexpr int kWidth = kHeadDim % 64 == 0 ? 64 : kHeadDim % 32 == 0 ? 32 : 16;
  static constexpr int kPanels = kHeadDim / kWidth;
  static constexpr int kRowBytes = 2 * kWidth;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  // Where a tile may begin: a multiple of this, from the start of shared memory.
  static constexpr int kAlignment = 1024;
  static_assert(kHeadDim % 16 == 0 && kRows % 8 == 0);

  // Byte offset in the tile of the element at (row, column). Chunks of 16 bytes stay together: with
  // a column that is a multiple of 8, the 7 elements that follow lie behind it.
  PRUNEOPS_HOST_DEVICE static constexpr int offset(int row, int column) {
    return column / kWidth * kPanelBytes +
           swizzled(row * kRowBytes + column % kWidth * 2, kRowBytes);
  }
};

}  // namespace pruneops
