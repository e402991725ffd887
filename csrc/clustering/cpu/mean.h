// The mean of the rows of a cluster: a few vectors of channels at a time stay in registers while
// the members pass by in order.

#pragma once

#include "clustering/clustering.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int kMeanVectors = 8;

// Channels [first, first + kVectors * kVecWidth) of one cluster.
template <class T, int kVectors>
PRUNEOPS_INLINE void mean_block(const T* x, int64_t row_stride, const float* weights,
                                const int32_t* members, int64_t count, float weight, int64_t first,
                                T* out) {
  Vec sum[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) sum[j] = zero();
  for (int64_t i = 0; i < count; ++i) {
    const T* row = x + members[i] * row_stride + first;
    const Vec w = broadcast(weights == nullptr ? 1.0f : weights[members[i]]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = fma(w, load(row + j * kVecWidth), sum[j]);
  }
  float sums[kVectors * kVecWidth];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) store(sums + j * kVecWidth, sum[j]);
  for (int i = 0; i < kVectors * kVecWidth; ++i) sums[i] /= weight;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) store(out + first + j * kVecWidth, load(sums + j * kVecWidth));
}

template <class T>
void mean_of(const MeanParams& p, int64_t cluster) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.merged) + cluster * p.channels;
  const int32_t* members = p.members + p.member_begin[cluster];
  const int64_t count = p.member_begin[cluster + 1] - p.member_begin[cluster];
  float weight = static_cast<float>(count);
  if (p.weights != nullptr) {
    weight = 0.0f;
    for (int64_t i = 0; i < count; ++i) weight += p.weights[members[i]];
  }
  int64_t c = 0;
  if (weight == 0.0f) {
    for (; c < p.channels; ++c) from_float(0.0f, out + c);
    return;
  }
  for (; c + kMeanVectors * kVecWidth <= p.channels; c += kMeanVectors * kVecWidth) {
    mean_block<T, kMeanVectors>(x, p.row_stride, p.weights, members, count, weight, c, out);
  }
  for (; c + kVecWidth <= p.channels; c += kVecWidth) {
    mean_block<T, 1>(x, p.row_stride, p.weights, members, count, weight, c, out);
  }
  for (; c < p.channels; ++c) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float w = p.weights == nullptr ? 1.0f : p.weights[members[i]];
      sum += w * to_float(x[members[i] * p.row_stride + c]);
    }
    from_float(sum / weight, out + c);
  }
}

// See ClusterKernels::mean.
void mean(const MeanParams& p, int64_t begin, int64_t end) {
  for (int64_t cluster = begin; cluster < end; ++cluster) {
    switch (p.type) {
      case FloatType::kFloat32:
        mean_of<float>(p, cluster);
        break;
      case FloatType::kBFloat16:
        mean_of<BFloat16>(p, cluster);
        break;
      case FloatType::kFloat16:
        mean_of<Half>(p, cluster);
        break;
    }
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
