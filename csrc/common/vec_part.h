// The end of a row that is no multiple of the vector width. Included by per-ISA files only.

#pragma once

#include <string.h>

#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// The first `count` lanes from p, 0 in the others; 0 < count < kVecWidth.
template <class T>
PRUNEOPS_INLINE Vec load_part(const T* p, int64_t count) {
  T lanes[kVecWidth] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

// The first `count` lanes to p.
template <class T>
PRUNEOPS_INLINE void store_part(T* p, Vec v, int64_t count) {
  T lanes[kVecWidth];
  store(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
