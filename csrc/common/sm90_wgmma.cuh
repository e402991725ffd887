// The wgmma instructions behind sm90_mma.cuh: one for every number of columns that kernels use, all
// of the same form, which differ in how many registers they name.

#pragma once

#include "common/cuda_mma.cuh"

#ifndef PRUNEOPS_CUDA_ON_HOST

// Eight registers of d at a time: as text, and as operands.
#define PRUNEOPS_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PRUNEOPS_TEXT_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define PRUNEOPS_TEXT_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define PRUNEOPS_TEXT_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define PRUNEOPS_TEXT_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define PRUNEOPS_TEXT_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define PRUNEOPS_TEXT_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define PRUNEOPS_TEXT_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define PRUNEOPS_REGISTERS(i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRUNEOPS_TEXTS_1 PRUNEOPS_TEXT_0
#define PRUNEOPS_OPERANDS_1 PRUNEOPS_REGISTERS(0)
#define PRUNEOPS_TEXTS_2 PRUNEOPS_TEXTS_1 ", " PRUNEOPS_TEXT_1
#define PRUNEOPS_OPERANDS_2 PRUNEOPS_OPERANDS_1, PRUNEOPS_REGISTERS(8)
#define PRUNEOPS_TEXTS_3 PRUNEOPS_TEXTS_2 ", " PRUNEOPS_TEXT_2
#define PRUNEOPS_OPERANDS_3 PRUNEOPS_OPERANDS_2, PRUNEOPS_REGISTERS(16)
#define PRUNEOPS_TEXTS_4 PRUNEOPS_TEXTS_3 ", " PRUNEOPS_TEXT_3
#define PRUNEOPS_OPERANDS_4 PRUNEOPS_OPERANDS_3, PRUNEOPS_REGISTERS(24)
#define PRUNEOPS_TEXTS_5 PRUNEOPS_TEXTS_4 ", " PRUNEOPS_TEXT_4
#define PRUNEOPS_OPERANDS_5 PRUNEOPS_OPERANDS_4, PRUNEOPS_REGISTERS(32)
#define PRUNEOPS_TEXTS_6 PRUNEOPS_TEXTS_5 ", " PRUNEOPS_TEXT_5
#define PRUNEOPS_OPERANDS_6 PRUNEOPS_OPERANDS_5, PRUNEOPS_REGISTERS(40)
#define PRUNEOPS_TEXTS_7 PRUNEOPS_TEXTS_6 ", " PRUNEOPS_TEXT_6
#define PRUNEOPS_OPERANDS_7 PRUNEOPS_OPERANDS_6, PRUNEOPS_REGISTERS(48)
#define PRUNEOPS_TEXTS_8 PRUNEOPS_TEXTS_7 ", " PRUNEOPS_TEXT_7
#define PRUNEOPS_OPERANDS_8 PRUNEOPS_OPERANDS_7, PRUNEOPS_REGISTERS(56)

// What follows d in the instruction: the numbers of its operands from n, the number of registers of
// d. The last three constants are the signs of a and b, and where allowed that a is rows as rows.
#define PRUNEOPS_WGMMA_SHARED(columns, chunks, type, n0, n1, n2, n3)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                       \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type          \
               " {" PRUNEOPS_TEXTS_##chunks "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, %" #n3 ";\n}" \
               : PRUNEOPS_OPERANDS_##chunks                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposed ? 1 : 0))
#define PRUNEOPS_WGMMA_REGISTERS(columns, chunks, type, n0, n1, n2, n3, n4, n5, n6)              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                          \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type             \
               " {" PRUNEOPS_TEXTS_##chunks "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 \
                                            ", p, 1, 1, %" #n6 ";\n}"                            \
               : PRUNEOPS_OPERANDS_##chunks                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                 "r"(static_cast<int>(accumulate)), "n"(kTransposed ? 1 : 0))

#define PRUNEOPS_WGMMA(columns, chunks, n0, n1, n2, n3, n4, n5, n6)                             \
  template <>                                                                                   \
  struct Wgmma<columns> {                                                                       \
    template <MmaType kType, bool kTransposed>                                                  \
    static __device__ __forceinline__ void run(float (&d)[columns / 2], uint64_t a, uint64_t b, \
                                               bool accumulate) {                               \
      if constexpr (kType == MmaType::kBFloat16) {                                              \
        PRUNEOPS_WGMMA_SHARED(columns, chunks, "bf16", n0, n1, n2, n3);                         \
      } else {                                                                                  \
        PRUNEOPS_WGMMA_SHARED(columns, chunks, "f16", n0, n1, n2, n3);                          \
      }                                                                                         \
    }                                                                                           \
    template <MmaType kType, bool kTransposed>                                                  \
    static __device__ __forceinline__ void run(float (&d)[columns / 2], const uint32_t (&a)[4], \
                                               uint64_t b, bool accumulate) {                   \
      if constexpr (kType == MmaType::kBFloat16) {                                              \
        PRUNEOPS_WGMMA_REGISTERS(columns, chunks, "bf16", n0, n1, n2, n3, n4, n5, n6);          \
      } else {                                                                                  \
        PRUNEOPS_WGMMA_REGISTERS(columns, chunks, "f16", n0, n1, n2, n3, n4, n5, n6);           \
      }                                                                                         \
    }                                                                                           \
  }

namespace pruneops {

// run<kType, kTransposed>(d, a, b, accumulate): d (+)= a b. kTransposed: b's rows are the inner
// dimension.
template <int kColumns>
struct Wgmma;

PRUNEOPS_WGMMA(64, 4, 32, 33, 34, 35, 36, 37, 38);
PRUNEOPS_WGMMA(80, 5, 40, 41, 42, 43, 44, 45, 46);
PRUNEOPS_WGMMA(96, 6, 48, 49, 50, 51, 52, 53, 54);
PRUNEOPS_WGMMA(112, 7, 56, 57, 58, 59, 60, 61, 62);
PRUNEOPS_WGMMA(128, 8, 64, 65, 66, 67, 68, 69, 70);

}  // namespace pruneops

#endif
