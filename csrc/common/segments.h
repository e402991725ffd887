// Segment boundaries that a kernel may rely on, made from boundaries that it may not.

#pragma once

#include <cstdint>

namespace pruneops {

// Clamps each entry to [0, total] and to at least the entry before it.
//   cu_seqlens  [num_entries], int32, any values
//   out         [num_entries], int32, non-decreasing, within [0, total]
inline void sanitize_cu_seqlens(const int32_t* cu_seqlens, int64_t num_entries, int64_t total,
                                int32_t* out) {
  int64_t previous = 0;
  for (int64_t i = 0; i < num_entries; ++i) {
    int64_t value = cu_seqlens[i];
    if (value > total) value = total;
    if (value < previous) value = previous;
    out[i] = static_cast<int32_t>(value);
    previous = value;
  }
}

}  // namespace pruneops
