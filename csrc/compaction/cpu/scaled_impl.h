// Weighted rows: one pass over memory, float arithmetic, one rounding. Included once by each
// scaled_<isa>.cpp.

#pragma once

#include <string.h>

#include "common/vec_part.h"
#include "compaction/scaled.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// out = residual + weight * branch
template <class T>
void add_scaled(const T* residual, const T* branch, float weight, T* out, int64_t columns) {
  const Vec w = broadcast(weight);
  int64_t c = 0;
  for (; c + kVecWidth <= columns; c += kVecWidth) {
    store(out + c, fma(w, load(branch + c), load(residual + c)));
  }
  const int64_t rest = columns - c;
  if (rest == 0) return;
  store_part(out + c, fma(w, load_part(branch + c, rest), load_part(residual + c, rest)), rest);
}

// out = weight * x
template <class T>
void scale(const T* x, float weight, T* out, int64_t columns) {
  const Vec w = broadcast(weight);
  int64_t c = 0;
  for (; c + kVecWidth <= columns; c += kVecWidth) store(out + c, w * load(x + c));
  const int64_t rest = columns - c;
  if (rest > 0) store_part(out + c, w * load_part(x + c, rest), rest);
}

// out = weight * dout; returns dout . y
template <class T>
float scale_and_dot(const T* dout, float weight, const T* y, T* out, int64_t columns) {
  constexpr int kSums = 4;  // independent, so that additions overlap
  const Vec w = broadcast(weight);
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  int64_t c = 0;
  for (; c + kSums * kVecWidth <= columns; c += kSums * kVecWidth) {
    for (int i = 0; i < kSums; ++i) {
      const int64_t at = c + i * kVecWidth;
      const Vec d = load(dout + at);
      store(out + at, w * d);
      sums[i] = fma(d, load(y + at), sums[i]);
    }
  }
  for (; c + kVecWidth <= columns; c += kVecWidth) {
    const Vec d = load(dout + c);
    store(out + c, w * d);
    sums[0] = fma(d, load(y + c), sums[0]);
  }
  const int64_t rest = columns - c;
  if (rest > 0) {
    const Vec d = load_part(dout + c, rest);
    store_part(out + c, w * d, rest);
    sums[1] = fma(d, load_part(y + c, rest), sums[1]);
  }
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward_of(const ScatterScaledParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(p.out) + t * p.columns;
    const int64_t i = p.source[t];
    if (i >= 0) {
      add_scaled(row_of<T>(p.residual, i), row_of<T>(p.branch, i), p.weights[t], out, p.columns);
    } else {
      scale(row_of<T>(p.x, t), p.weights[t], out, p.columns);
    }
  }
}

template <class T>
void backward_of(const ScatterScaledGradParams& p, int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(p.columns) * sizeof(T);
  for (int64_t t = begin; t < end; ++t) {
    const T* dout = row_of<T>(p.dout, t);
    T* dx = static_cast<T*>(p.dx) + t * p.columns;
    const int64_t i = p.source[t];
    if (i >= 0) {
      memset(dx, 0, row_bytes);
      memcpy(static_cast<T*>(p.dresidual) + i * p.columns, dout, row_bytes);
      p.dweights[t] = scale_and_dot(dout, p.weights[t], row_of<T>(p.branch, i),
                                    static_cast<T*>(p.dbranch) + i * p.columns, p.columns);
    } else {
      p.dweights[t] = scale_and_dot(dout, p.weights[t], row_of<T>(p.x, t), dx, p.columns);
    }
  }
}

void forward(const ScatterScaledParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return forward_of<BFloat16>(p, begin, end);
    case FloatType::kFloat16:
      return forward_of<Half>(p, begin, end);
    default:
      return forward_of<float>(p, begin, end);
  }
}

void backward(const ScatterScaledGradParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return backward_of<BFloat16>(p, begin, end);
    case FloatType::kFloat16:
      return backward_of<Half>(p, begin, end);
    default:
      return backward_of<float>(p, begin, end);
  }
}

}  // namespace

extern const ScaledKernels kScaledKernels;
const ScaledKernels kScaledKernels = {forward, backward};

}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
