// A matrix whose rows are dense and any distance apart, of one of the float types.

#pragma once

#include <stdint.h>

#include "common/float_types.h"

namespace pruneops {

// [rows, columns]; the user knows how many, and of which type.
struct Rows {
  const void* data;
  int64_t stride;  // elements from one row to the next; 0 and overlapping rows are fine
};

template <class T>
PRUNEOPS_HOST_DEVICE static inline const T* row_of(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

}  // namespace pruneops
