// Choice of the instruction set, the parallel loops over segments, and the prefix sum between them.

#include "selection/selection.h"

#include <algorithm>

#include "common/cpu_features.h"

namespace pruneops {
namespace {

// Below this many rows a second thread costs more than it brings.
constexpr int64_t kRowsPerTask = 8192;

SelectKernels active_kernels() {
  switch (active_isa()) {
#if defined(PRUNEOPS_HAVE_AVX512)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return select_kernels_avx512();
#endif
#if defined(PRUNEOPS_HAVE_AVX2)
    case Isa::kAvx2:
      return select_kernels_avx2();
#endif
    default:
      return select_kernels_scalar();
  }
}

int64_t segments_per_task(const SelectParams& p) {
  const int64_t rows = p.cu_seqlens[p.num_segments] - p.cu_seqlens[0];
  return std::max<int64_t>(1, kRowsPerTask * p.num_segments / std::max<int64_t>(1, rows));
}

}  // namespace

void select_cuts(const SelectParams& p, const ParallelFor& parallel) {
  const SelectKernels kernels = active_kernels();
  parallel_for(parallel, 0, p.num_segments, segments_per_task(p), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) p.cuts[b] = kernels.cut(p, b);
  });
}

int64_t select_offsets(const SelectParams& p, int64_t capacity, int32_t* cu_seqlens_out) {
  int64_t kept = 0;
  cu_seqlens_out[0] = 0;
  for (int64_t b = 0; b < p.num_segments; ++b) {
    kept += p.cuts[b].count;
    cu_seqlens_out[b + 1] = static_cast<int32_t>(std::min(kept, capacity));
  }
  return kept;
}

void select_emit(const SelectParams& p, const int32_t* cu_seqlens_out, int32_t* indices,
                 int64_t capacity, const ParallelFor& parallel) {
  const SelectKernels kernels = active_kernels();
  parallel_for(parallel, 0, p.num_segments, segments_per_task(p), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      kernels.emit(p, b, indices + cu_seqlens_out[b], cu_seqlens_out[b + 1] - cu_seqlens_out[b]);
    }
  });
  std::fill(indices + cu_seqlens_out[p.num_segments], indices + capacity, -1);
}

}  // namespace pruneops
