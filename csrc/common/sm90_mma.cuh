// Matrix products of a Hopper warpgroup (four warps in a row, 128 threads, the first a multiple of
// 128): asynchronous, with operands in shared memory.

#pragma once

#include "common/cuda_mma.cuh"
#include "common/sm90_barrier.cuh"
#include "common/sm90_operands.h"
#include "common/sm90_wgmma.cuh"

namespace pruneops {

// Products come in batches:
//   fence_products(d);                   // after d, and operands in registers, were last touched
//   multiply<...>(d, ...); ...           // any number, also into several d
//   commit_products();
//   wait_for_products<kPending>(d);      // all batches but the newest kPending are finished
// All threads of the warpgroup call all of these, with the same operands in shared memory. Until
// the wait, d and operands in registers must not be touched and operands in shared memory not be
// written. Data in shared memory must be visible to the tensor cores: as asynchronous copies are
// after their barrier, and stores after fence_async_proxy() and a barrier.
//
// sm90_operands.h says which thread holds which element of d [64, kColumns] and a [64, 16]. Two
// neighbouring groups of 8 columns of a d, rounded and packed, are an a:
//   a = {pack(d[8 k], d[8 k + 1]), pack(d[8 k + 2], d[8 k + 3]),
//        pack(d[8 k + 4], d[8 k + 5]), pack(d[8 k + 6], d[8 k + 7])}
// is columns 16 k to 16 k + 15.

// Rows as rows: 64 rows (for a) or kColumns rows (for b) from `row`, a multiple of 8, of the tile,
// and its columns 16 step to 16 step + 15 as the inner dimension. So Q K^T is a sum over steps of
// rows_operand<QTile>(q, row, step) and rows_operand<KTile>(k, 0, step).
template <class Tile>
__device__ __forceinline__ uint64_t rows_operand(const void* tile, int row, int step) {
  return rows_operand_bits<Tile>(shared_address(tile), row, step);
}

// Rows as the inner dimension (b only): rows 16 step to 16 step + 15 of the tile, and all its
// columns as the columns of the product. So P V is a sum over steps of P's columns 16 step to
// 16 step + 15 in registers and columns_operand<VTile>(v, step).
template <class Tile>
__device__ __forceinline__ uint64_t columns_operand(const void* tile, int step) {
  return columns_operand_bits<Tile>(shared_address(tile), step);
}

// Which of the two made b.
enum class Operand { kRows, kColumns };

// d (+)= a b^T or a b, a [64, 16]; b [kColumns, 16] if it is kRows, [16, kColumns] if kColumns;
// without `accumulate` d starts from zero, whatever it holds. kColumns: 64, 80, 96, 112 or 128.
template <MmaType kType, int kColumns, Operand kB>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                         bool accumulate) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::multiply_warpgroup<kType == MmaType::kBFloat16>(
      d, kColumns, a, nullptr, b, kB == Operand::kColumns, accumulate);
#else
  Wgmma<kColumns>::template run<kType, kB == Operand::kColumns>(d, a, b, accumulate);
#endif
}

template <MmaType kType, int kColumns, Operand kB>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                         uint64_t b, bool accumulate) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::multiply_warpgroup<kType == MmaType::kBFloat16>(
      d, kColumns, 0, a, b, kB == Operand::kColumns, accumulate);
#else
  Wgmma<kColumns>::template run<kType, kB == Operand::kColumns>(d, a, b, accumulate);
#endif
}

// Keeps the compiler from moving what is done with d from one side of this to the other.
template <class T, int kCount>
__device__ __forceinline__ void pin_registers(T (&d)[kCount]) {
#ifndef PRUNEOPS_CUDA_ON_HOST
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == sizeof(float) && T(0.5f) != T(0)) {
      asm volatile("" : "+f"(d[i]) : : "memory");
    } else {
      asm volatile("" : "+r"(d[i]) : : "memory");
    }
  }
#else
  (void)d;
#endif
}

template <class... Fragments>
__device__ __forceinline__ void fence_products(Fragments&... d) {
  (pin_registers(d), ...);
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::fence_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}

__device__ __forceinline__ void commit_products() {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}

// `d`: the fragments that may be touched afterwards.
template <int kPending, class... Fragments>
__device__ __forceinline__ void wait_for_products(Fragments&... d) {
  static_assert(kPending >= 0 && kPending <= 7);
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::wait_for_products(kPending);
  (cuda_on_host::check_finished(d), ...);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
#endif
  (pin_registers(d), ...);
}

}  // namespace pruneops
