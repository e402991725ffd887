// Means and similarity of the rows that stand at one position in every frame. A few neighbouring
// positions at a time: their rows come from memory once, while their norms are computed, and are
// still in the cache when a few vectors of channels of each are added up in registers.

#pragma once

#include "clustering/clustering.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// As many sums as there are registers for.
constexpr int kPositionVectors = kVecWidth == 16 ? 8 : 4;
// Rows of one step, whose norms are kept and which stay in the cache together.
constexpr int64_t kStepRows = 256;
constexpr int64_t kStepBytes = 192 * 1024;
// The least norm that a row is divided by.
constexpr double kLeastNorm = 1e-12;

template <class T>
double square_norm_in_double(const T* row, int64_t channels) {
  double total = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    const double x = to_float(row[c]);
    total += x * x;
  }
  return total;
}

// The squared norm of a row, in float as far as that has the range and for a stretch at a time.
template <class T>
PRUNEOPS_INLINE double square_norm(const T* row, int64_t channels) {
  constexpr int64_t kAtOnce = 4 * kVecWidth;
  constexpr int64_t kStretch = 2048;
  static_assert(kStretch % kAtOnce == 0, "whole vectors");
  const int64_t whole = channels - channels % kAtOnce;
  double total = 0.0;
  for (int64_t first = 0; first < whole; first += kStretch) {
    const int64_t last = min_of(first + kStretch, whole);
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t c = first; c < last; c += kAtOnce) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec x = load(row + c + j * kVecWidth);
        sum[j] = fma(x, x, sum[j]);
      }
    }
    total += reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  total += square_norm_in_double(row + whole, channels - whole);
  return total < 1e38 ? total : square_norm_in_double(row, channels);
}

// The rows of one position in the frames of one step.
template <class T>
struct Column {
  const T* x;  // [frames] rows, `stride` elements apart
  int64_t stride;
  int64_t frames;
  const float* inverse_norms;  // [frames], `norm_stride` apart
  int64_t norm_stride;
  bool first;     // nothing was added up before
  float divisor;  // 0 if there are frames to come
};

// Channels [first, first + kVectors * kVecWidth) of one position; the square of the sum of unit
// vectors where that is finished.
//   sums, units  [channels] what was added up before and what is to be continued
//   out          [channels]
template <class T, int kVectors>
PRUNEOPS_INLINE double add_frames(const Column<T>& column, int64_t first, float* sums, float* units,
                                  T* out) {
  Vec sum[kVectors], unit[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    sum[j] = column.first ? zero() : load(sums + first + j * kVecWidth);
    unit[j] = column.first ? zero() : load(units + first + j * kVecWidth);
  }
  for (int64_t w = 0; w < column.frames; ++w) {
    const T* row = column.x + w * column.stride + first;
    const Vec inverse = broadcast(column.inverse_norms[w * column.norm_stride]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = load(row + j * kVecWidth);
      sum[j] = sum[j] + x;
      unit[j] = fma(inverse, x, unit[j]);
    }
  }
  if (column.divisor == 0.0f) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      store(sums + first + j * kVecWidth, sum[j]);
      store(units + first + j * kVecWidth, unit[j]);
    }
    return 0.0;
  }
  Vec square = zero();
  float means[kVectors * kVecWidth];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    square = fma(unit[j], unit[j], square);
    store(means + j * kVecWidth, sum[j]);
  }
  for (int i = 0; i < kVectors * kVecWidth; ++i) means[i] /= column.divisor;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    store(out + first + j * kVecWidth, load(means + j * kVecWidth));
  }
  return reduce_sum(square);
}

// All channels of one position; the square of the sum of unit vectors where that is finished.
template <class T>
PRUNEOPS_INLINE double add_column(const Column<T>& column, int64_t channels, float* sums,
                                  float* units, T* out) {
  double total = 0.0;
  int64_t c = 0;
  for (; c + kPositionVectors * kVecWidth <= channels; c += kPositionVectors * kVecWidth) {
    total += add_frames<T, kPositionVectors>(column, c, sums, units, out);
  }
  for (; c + kVecWidth <= channels; c += kVecWidth) {
    total += add_frames<T, 1>(column, c, sums, units, out);
  }
  for (; c < channels; ++c) {
    float sum = column.first ? 0.0f : sums[c], unit = column.first ? 0.0f : units[c];
    for (int64_t w = 0; w < column.frames; ++w) {
      const float x = to_float(column.x[w * column.stride + c]);
      sum += x;
      unit += column.inverse_norms[w * column.norm_stride] * x;
    }
    if (column.divisor == 0.0f) {
      sums[c] = sum;
      units[c] = unit;
    } else {
      from_float(sum / column.divisor, out + c);
      total += static_cast<double>(unit) * unit;
    }
  }
  return total;
}

template <class T>
void positions_of(const PositionParams& p, const PositionRun& run, float* scratch) {
  const T* x = static_cast<const T*>(p.x) + run.first_row * p.row_stride;
  const int64_t row_bytes = max_of<int64_t>(p.channels * static_cast<int64_t>(sizeof(T)), 1);
  const int64_t step_rows = max_of<int64_t>(min_of(kStepBytes / row_bytes, kStepRows), 1);
  const int64_t group = max_of<int64_t>(step_rows / max_of<int64_t>(run.frames, 1), 1);
  float* sums = scratch;
  float* units = scratch + p.channels;
  float inverse_norms[kStepRows];
  // Sums over the frames of a position: lengths of the unit vectors as they are rounded, and the
  // squares of these. What rounding does to the square of the sum of the vectors, it does to both.
  double lengths[kStepRows], squares[kStepRows];
  for (int64_t i = 0; i < run.positions; i += group) {
    const int64_t positions = min_of(group, run.positions - i);
    for (int64_t j = 0; j < positions; ++j) lengths[j] = squares[j] = 0.0;
    int64_t w = 0;
    do {
      const int64_t frames = min_of(step_rows / positions, run.frames - w);
      for (int64_t f = 0; f < frames; ++f) {
        for (int64_t j = 0; j < positions; ++j) {
          const T* row = x + ((w + f) * run.frame_rows + i + j) * p.row_stride;
          const double square = square_norm(row, p.channels);
          const double norm =
              square < kLeastNorm * kLeastNorm ? kLeastNorm : __builtin_sqrt(square);
          const float inverse = static_cast<float>(1.0 / norm);
          inverse_norms[f * positions + j] = inverse;
          lengths[j] += inverse * norm;
          squares[j] += inverse * norm * (inverse * norm);
        }
      }
      const bool last = w + frames == run.frames;
      for (int64_t j = 0; j < positions; ++j) {
        Column<T> column;
        column.x = x + (w * run.frame_rows + i + j) * p.row_stride;
        column.stride = run.frame_rows * p.row_stride;
        column.frames = frames;
        column.inverse_norms = inverse_norms + j;
        column.norm_stride = positions;
        column.first = w == 0;
        column.divisor = last ? static_cast<float>(max_of<int64_t>(run.frames, 1)) : 0.0f;
        const int64_t out = run.first_out + i + j;
        const double square = add_column(column, p.channels, sums, units,
                                         static_cast<T*>(p.means) + out * p.channels);
        if (!last) continue;
        const double pairs = lengths[j] * lengths[j] - squares[j];
        p.similarity[out] =
            run.frames < 2 ? __builtin_nanf("") : static_cast<float>((square - squares[j]) / pairs);
      }
      w += frames;
    } while (w < run.frames);
  }
}

// See ClusterKernels::position_means.
void position_means(const PositionParams& p, const PositionRun& run, float* scratch) {
  switch (p.type) {
    case FloatType::kFloat32:
      positions_of<float>(p, run, scratch);
      break;
    case FloatType::kBFloat16:
      positions_of<BFloat16>(p, run, scratch);
      break;
    case FloatType::kFloat16:
      positions_of<Half>(p, run, scratch);
      break;
  }
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
