// Stands in for copies of boxes of a tensor to shared memory (TMA).

#pragma once

#include "sm90_barriers.h"

namespace cuda_on_host {

// What the 16 words of a tensor map hold here.
struct BoxMap {
  uint64_t base;
  uint64_t strides[4];  // bytes
  uint32_t sizes[5];    // the innermost first; 0 is 2^32
  uint32_t box[5];
  uint32_t row_bytes;  // of the swizzle
};
static_assert(sizeof(BoxMap) <= 128);

// False where cuTensorMapEncodeTiled() refuses.
inline bool make_box_map(uint64_t (&words)[16], const void* base, const uint64_t (&sizes)[5],
                         const uint64_t (&strides)[4], const uint32_t (&box)[5], int row_bytes) {
  constexpr uint64_t kElement = 2;
  BoxMap map{};
  map.base = reinterpret_cast<uintptr_t>(base);
  map.row_bytes = static_cast<uint32_t>(row_bytes);
  bool legal =
      map.base % 16 == 0 && box[0] * kElement % 16 == 0 && box[0] * kElement <= map.row_bytes;
  for (int i = 0; i < 5; ++i) {
    legal &= sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256;
    map.sizes[i] = static_cast<uint32_t>(sizes[i]);
    map.box[i] = box[i];
  }
  for (int i = 0; i < 4; ++i) {
    legal &= strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    map.strides[i] = strides[i];
  }
  memcpy(words, &map, sizeof(map));
  return legal;
}

// One thread asks for the box at these coordinates. Elements outside of the sizes become zero and
// their memory is not read; they count as bytes all the same.
inline void load_box_async(void* to, const uint64_t (&words)[16], uint64_t* barrier,
                           const std::array<int, 5>& at) {
  Block& block = Block::current();
  block.maybe_yield();
  phase_barrier(barrier);
  BoxMap map;
  memcpy(&map, words, sizeof(map));
  size_t rows = 1;
  for (int i = 1; i < 5; ++i) rows *= map.box[i];
  const size_t row_bytes = size_t{map.box[0]} * 2;
  BoxCopy copy{static_cast<unsigned char*>(to), std::vector<unsigned char>(rows * row_bytes),
               barrier};
  if (!sm90_block.is_shared(to, copy.bytes.size())) {
    block.fail("a copy of a box leaves the block's shared memory");
  }
  const size_t start = sm90_block.offset(to);
  if (start % 128 != 0) block.fail("a copy of a box to an address that is not on 128 bytes");
  if (start / (8 * row_bytes) * (8 * row_bytes) != start) {
    block.fail("a panel begins in the middle of a pattern of its swizzle");
  }
  for (size_t row = 0; row < rows; ++row) {
    uint64_t from = map.base;
    bool inside = true;
    size_t rest = row;
    for (int i = 1; i < 5; ++i) {
      const int64_t coordinate = int64_t{at[i]} + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside &= coordinate >= 0 && static_cast<uint64_t>(coordinate) < map.sizes[i];
      from += static_cast<uint64_t>(coordinate) * map.strides[i - 1];
    }
    for (uint32_t column = 0; column < map.box[0]; ++column) {
      const int64_t coordinate = int64_t{at[0]} + column;
      if (!inside || coordinate < 0 || static_cast<uint64_t>(coordinate) >= map.sizes[0]) continue;
      // The pattern of the swizzle goes by address: bits 4 to 6 are crossed with bits 7 to 9, as
      // many of them as its width has.
      const size_t plain = start + row * row_bytes + column * size_t{2};
      const size_t swizzle = plain >> 7 & (map.row_bytes / 16 - 1);
      memcpy(copy.bytes.data() + ((plain ^ swizzle << 4) - start),
             reinterpret_cast<const void*>(from + static_cast<uint64_t>(coordinate) * 2), 2);
    }
  }
  sm90_block.begin_copy(std::move(copy));
}

}  // namespace cuda_on_host
