// Dot products of rows with one vector, and their gradients. Included once by each
// router_<isa>.cpp.

#pragma once

#include <string.h>

#include "common/vec_part.h"
#include "routing/routing.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

PRUNEOPS_INLINE bool routed(const uint8_t* target, int64_t row) {
  return target == nullptr || target[row] != 0;
}

template <class T>
float dot(const T* x, const T* weight, int64_t columns) {
  constexpr int kSums = 4;  // independent, so that additions overlap
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  int64_t c = 0;
  for (; c + kSums * kVecWidth <= columns; c += kSums * kVecWidth) {
    for (int i = 0; i < kSums; ++i) {
      const int64_t at = c + i * kVecWidth;
      sums[i] = fma(load(x + at), load(weight + at), sums[i]);
    }
  }
  for (; c + kVecWidth <= columns; c += kVecWidth) {
    sums[0] = fma(load(x + c), load(weight + c), sums[0]);
  }
  const int64_t rest = columns - c;
  if (rest > 0) sums[1] = fma(load_part(x + c, rest), load_part(weight + c, rest), sums[1]);
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void dots_of(const RouterParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (!routed(p.target, t)) continue;
    p.logits[t] = dot(row_of<T>(p.x, t), static_cast<const T*>(p.weight), p.columns);
  }
}

constexpr int kGradRows = 4;  // rows that share one pass over weight and partial

// The gradients of kRows rows.
template <int kRows, class T>
void add_rows(const RouterGradParams& p, const int64_t* rows, float* partial) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* x[kRows];
  T* dx[kRows];
  Vec g[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = row_of<T>(p.x, rows[r]);
    dx[r] = static_cast<T*>(p.dx) + rows[r] * p.columns;
    g[r] = broadcast(p.dlogits[rows[r]]);
  }
  int64_t c = 0;
  for (; c + kVecWidth <= p.columns; c += kVecWidth) {
    const Vec w = load(weight + c);
    Vec sum = load(partial + c);
    for (int r = 0; r < kRows; ++r) {
      sum = fma(g[r], load(x[r] + c), sum);
      store(dx[r] + c, g[r] * w);
    }
    store(partial + c, sum);
  }
  const int64_t rest = p.columns - c;
  if (rest == 0) return;
  const Vec w = load_part(weight + c, rest);
  Vec sum = load_part(partial + c, rest);
  for (int r = 0; r < kRows; ++r) {
    sum = fma(g[r], load_part(x[r] + c, rest), sum);
    store_part(dx[r] + c, g[r] * w, rest);
  }
  store_part(partial + c, sum, rest);
}

template <class T>
void gradients_of(const RouterGradParams& p, int64_t begin, int64_t end, float* partial) {
  memset(partial, 0, static_cast<size_t>(p.columns) * sizeof(float));
  int64_t rows[kGradRows];
  int waiting = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!routed(p.target, t)) {
      memset(static_cast<T*>(p.dx) + t * p.columns, 0, static_cast<size_t>(p.columns) * sizeof(T));
      continue;
    }
    rows[waiting] = t;
    if (++waiting < kGradRows) continue;
    add_rows<kGradRows, T>(p, rows, partial);
    waiting = 0;
  }
  for (int r = 0; r < waiting; ++r) add_rows<1, T>(p, rows + r, partial);
}

void dots(const RouterParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return dots_of<BFloat16>(p, begin, end);
    case FloatType::kFloat16:
      return dots_of<Half>(p, begin, end);
    default:
      return dots_of<float>(p, begin, end);
  }
}

void gradients(const RouterGradParams& p, int64_t begin, int64_t end, float* partial) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return gradients_of<BFloat16>(p, begin, end, partial);
    case FloatType::kFloat16:
      return gradients_of<Half>(p, begin, end, partial);
    default:
      return gradients_of<float>(p, begin, end, partial);
  }
}

}  // namespace

extern const RouterKernels kRouterKernels;
const RouterKernels kRouterKernels = {dots, gradients};

}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
