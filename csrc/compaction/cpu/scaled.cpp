// Weighted rows: the choice of an instruction set, and the loops over rows.

#include "compaction/scaled.h"

#include <algorithm>
#include <cstring>

namespace pruneops {

namespace scalar {
extern const ScaledKernels kScaledKernels;
}
#if defined(PRUNEOPS_HAVE_AVX2)
namespace avx2 {
extern const ScaledKernels kScaledKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
namespace avx512 {
extern const ScaledKernels kScaledKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const ScaledKernels kScaledKernels;
}
#endif

const ScaledKernels& scaled_kernels(Isa isa) {
  switch (isa) {
#if defined(PRUNEOPS_HAVE_AVX512BF16)
    case Isa::kAvx512Bf16:
      return avx512bf16::kScaledKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
    case Isa::kAvx512:
      return avx512::kScaledKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kScaledKernels;
#endif
    default:
      return scalar::kScaledKernels;
  }
}

namespace {

// Below this much data a second thread costs more than it brings.
constexpr int64_t kBytesPerTask = 64 * 1024;

// Rows of a task, of which each stands for `rows_moved` rows read or written.
int64_t grain(FloatType type, int64_t columns, int64_t rows_moved) {
  return std::max<int64_t>(1, kBytesPerTask / (rows_moved * columns * element_size(type) + 1));
}

}  // namespace

void scatter_scaled(const ScatterScaledParams& p, const ParallelFor& parallel) {
  if (p.columns == 0) return;  // matrices without data may have no address either
  const ScaledKernels& kernels = scaled_kernels(active_isa());
  parallel_for(parallel, 0, p.total, grain(p.type, p.columns, 3),
               [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
}

void scatter_scaled_backward(const ScatterScaledGradParams& p, const ParallelFor& parallel) {
  if (p.columns == 0) {
    std::fill(p.dweights, p.dweights + p.total, 0.0f);
    return;
  }
  const ScaledKernels& kernels = scaled_kernels(active_isa());
  parallel_for(parallel, 0, p.total, grain(p.type, p.columns, 5),
               [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
  // Rows that came nowhere: their index is out of range, or another row has the same one.
  const int64_t row_bytes = p.columns * element_size(p.type);
  for (int64_t i = 0; i < p.kept; ++i) {
    const int64_t t = p.indices[i];
    if (t >= 0 && t < p.total && p.source[t] == i) continue;
    std::memset(static_cast<char*>(p.dresidual) + i * row_bytes, 0, static_cast<size_t>(row_bytes));
    std::memset(static_cast<char*>(p.dbranch) + i * row_bytes, 0, static_cast<size_t>(row_bytes));
  }
}

}  // namespace pruneops
