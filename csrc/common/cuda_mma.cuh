// Matrix products on tensor cores. The instruction stands behind one function, so that the kernels
// themselves hold no inline assembly and also run on the host: in the tests, tensor_cores.h
// computes the same from the same fragments.

#pragma once

#include "common/cuda_kernel.h"

#ifdef PRUNEOPS_CUDA_ON_HOST
#include "tensor_cores.h"
#endif

namespace pruneops {

enum class MmaType { kBFloat16, kFloat16 };

// d += a b by one warp, a [16, 16], b [16, 8], d [16, 8]. Products are exact, sums in float. Lane
// 4 g + t holds, two elements a word with the first one in the lower half:
//   a  rows g, g + 8, g, g + 8 of columns 2 t, 2 t + 1, the last two words 8 columns further on
//   b  rows 2 t, 2 t + 1 of column g, the second word 8 rows further down
//   d  columns 2 t, 2 t + 1 of row g, then of row g + 8
// The instruction is volatile because all lanes must reach it: moved to where its result is used,
// it might end up behind a condition.
template <MmaType kType>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::mma_16x8x16<kType == MmaType::kBFloat16>(d, a, b);
#else
  if constexpr (kType == MmaType::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace pruneops
