// One pass over a row of squared distances for each step of DPC-kNN. Rows are padded with +inf to
// whole vectors, so no step has a remainder.

#pragma once

#include "clustering/clustering.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// Replaces the largest value of a heap.
//   heap  [size], each element at least its children at 2 i + 1 and 2 i + 2
PRUNEOPS_INLINE void replace_largest(float* heap, int64_t size, float value) {
  int64_t hole = 0;
  for (;;) {
    int64_t child = 2 * hole + 1;
    if (child >= size) break;
    if (child + 1 < size && heap[child + 1] > heap[child]) ++child;
    if (heap[child] <= value) break;
    heap[hole] = heap[child];
    hole = child;
  }
  heap[hole] = value;
}

// See ClusterKernels::update_nearest.
float update_nearest(const float* values, int64_t count, int64_t padded, float* heap, int64_t k,
                     float largest) {
  Vec top = broadcast(largest);
  Vec limit = broadcast(heap[0]);
  const int64_t whole = count - count % kVecWidth;
  for (int64_t i = 0; i < padded; i += kVecWidth) {
    const Vec v = load(values + i);
    if (i < whole) top = vmax(v, top);
    uint32_t smaller = less_mask(v, limit);
    if (smaller == 0) continue;
    for (; smaller != 0; smaller &= smaller - 1) {
      const float value = values[i + __builtin_ctz(smaller)];
      if (value < heap[0]) replace_largest(heap, k, value);
    }
    limit = broadcast(heap[0]);
  }
  largest = reduce_max(top);
  for (int64_t i = whole; i < count; ++i) largest = max_of(largest, values[i]);
  return largest;
}

// See ClusterKernels::update_delta.
float update_delta(const float* values, const float* density, int64_t padded, float own_density,
                   bool ties, int64_t row, float best) {
  const Vec own = broadcast(own_density);
  const Vec infinity = broadcast(__builtin_inff());
  Vec smallest = infinity;
  for (int64_t i = 0; i < padded; i += kVecWidth) {
    const Vec other = load(density + i);
    const Vec v = load(values + i);
    smallest = vmin(where_less(own, other, v, infinity), smallest);
    if (!ties) continue;
    for (uint32_t equal = equal_mask(other, own); equal != 0; equal &= equal - 1) {
      const int64_t column = i + __builtin_ctz(equal);
      if (column >= row) break;
      best = min_of(best, values[column]);
    }
  }
  return min_of(best, -reduce_max(zero() - smallest));
}

// See ClusterKernels::update_nearest_center. Ranks are exact in float up to 2^24.
void update_nearest_center(const float* values, int64_t padded, int64_t rank, float* best,
                           float* ids) {
  const Vec id = broadcast(static_cast<float>(rank));
  for (int64_t i = 0; i < padded; i += kVecWidth) {
    const Vec v = load(values + i);
    const Vec old = load(best + i);
    store(ids + i, where_less(v, old, id, load(ids + i)));
    store(best + i, vmin(v, old));
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
