// What the torch wrappers of compaction share on every device.

#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_checks.h"

namespace pruneops {

// True if every row (dimension 0) of `t` is one dense block; rows may be any distance apart.
inline bool rows_are_dense(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 1; --d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline int64_t bytes_per_row(const Tensor& t) {
  int64_t bytes = static_cast<int64_t>(t.element_size());
  for (int64_t d = 1; d < t.dim(); ++d) bytes *= t.size(d);
  return bytes;
}

// The sizes of `t` with another number of rows.
inline std::vector<int64_t> sizes_with_rows(const Tensor& t, int64_t num_rows) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = num_rows;
  return sizes;
}

// Extent of dimension 0, which all tensors must share; -1 if there is no tensor.
inline int64_t check_same_rows(const std::vector<Tensor>& tensors) {
  int64_t num_rows = -1;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.dim() >= 1, "every tensor of tensors must have at least 1 dimension, got 0");
    if (num_rows < 0) num_rows = t.size(0);
    check_size(t, 0, num_rows, "every tensor of tensors");
  }
  STD_TORCH_CHECK(num_rows <= kMaxRows, "tensors have ", num_rows, " rows; at most ", kMaxRows,
                  " are supported");
  return num_rows;
}

}  // namespace pruneops
