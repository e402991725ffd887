// Matrix products on tensor cores, and the way of their fragments. Every instruction stands behind
// one function, so that the kernels themselves hold no inline assembly and also run on the host: in
// the tests, tensor_cores.h computes the same from the same fragments.

#pragma once

#include "common/cuda_kernel.h"
#include "common/float_types.h"

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

// Loads matrices of 8 x 8 16-bit elements from shared memory, by one warp: lane 8 i + j names row j
// of matrix i, 16 bytes on 16 bytes. Lane 4 g + t gets columns 2 t, 2 t + 1 of row g of matrix i as
// r[i]. So four matrices, upper left, lower left, upper right, lower right, make the `a` of a
// product that lies in memory row by row, and two, left and right half of its rows, a `b` that lies
// column by column (keys, for scores).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::load_matrices<4, false>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// Two matrices, named by lanes 0 to 15.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::load_matrices<2, false>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The same transposed: lane 4 g + t gets rows 2 t, 2 t + 1 of column g. So two matrices, upper and
// lower, make a `b` that lies in memory row by row (values).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::load_matrices<4, true>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::load_matrices<2, true>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// Two floats, rounded to the nearest even, as a word of a fragment.
template <MmaType kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  return cuda_on_host::pack_pair<kType == MmaType::kBFloat16>(low, high);
#else
  uint32_t word;
  if constexpr (kType == MmaType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

}  // namespace pruneops
