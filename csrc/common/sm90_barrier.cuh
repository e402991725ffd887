// What warps of a Hopper block wait for one another with: barriers in shared memory that also count
// the bytes of asynchronous copies, and numbered barriers of a part of the block. Also how
// warpgroups share out registers.

#pragma once

#include "common/cuda_kernel.h"

#ifdef PRUNEOPS_CUDA_ON_HOST
#include "sm90.h"
#endif

namespace pruneops {

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  return cuda_on_host::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// A barrier is a uint64_t in shared memory. Its phases follow one another: a phase is over when
// `arrivals` threads have arrived in it and all bytes it was told to expect have come. Barriers are
// made by one thread, which then calls publish_barriers(), and used by others after a
// __syncthreads() that follows.
__device__ __forceinline__ void make_barrier(uint64_t* barrier, int arrivals) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::make_barrier(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#endif
}

__device__ __forceinline__ void publish_barriers() {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::publish_barriers();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
#endif
}

// The same, and this phase is not over before `bytes` more bytes have come.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase with this parity is over: 0 for the first phase, 1 for the second, 0 for
// the third and so on. A barrier just made counts as if a phase of parity 1 had gone before: who
// first fills a buffer need not tell that from the later times. Nobody may fall two phases behind.
// What others did before they arrived, and what the counted copies wrote, is visible afterwards.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, uint32_t parity) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::wait_for_phase(barrier, parity);
#else
  const uint32_t address = shared_address(barrier);
  uint32_t over = 0;
  while (over == 0) {  // each try sleeps for a while in hardware
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
  }
#endif
}

// Which buffer of a ring of kStages is next, and the parity of its present use. Starts at the first
// use of the first buffer. A consumer waits for `full[stage]` with `parity`, the producer for
// `empty[stage]` with `parity ^ 1`.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Barrier number `id`, 1 to 15 (0 is __syncthreads()), of `threads` threads, a multiple of 32:
// whole warps, those that only arrive included. All warps pass the same number of threads.
__device__ __forceinline__ void sync_named_barrier(int id, int threads) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::named_barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void arrive_at_named_barrier(int id, int threads) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::named_barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
#endif
}

// Registers of a thread of each of so many warpgroups, summed: what a block that has a
// multiprocessor to itself can share out. It starts with as many for every thread, a multiple of 8,
// and not with the whole register file.
constexpr int registers_to_share(int warpgroups) {
  return (64 << 10) / (128 * warpgroups) / 8 * 8 * warpgroups;
}

// All threads of a warpgroup: have kRegisters each from now on, fewer or more than before; a
// multiple of 8 from 24 to 240. take_registers() waits until others have given enough: for ever if
// they add up to more than registers_to_share().
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::change_registers(kRegisters);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::change_registers(kRegisters);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

}  // namespace pruneops
