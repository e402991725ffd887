// Copies from global to shared memory that run while their thread goes on (sm_80). What a thread
// has copied is there for itself after wait_for_copies(), and for the others after a barrier behind
// that. On the host async_copies.h stands in, and leaves poison where a wait is missing.

#pragma once

#include "common/cuda_kernel.h"

#ifdef PRUNEOPS_CUDA_ON_HOST
#include "async_copies.h"
#endif

namespace pruneops {

// Begins to copy 16 bytes, both addresses on 16 bytes; zeros, and `global` is not read, if not
// valid. Past the L1 cache: what is copied is read from shared memory from then on.
__device__ __forceinline__ void copy_16_bytes_async(void* shared, const void* global, bool valid) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::copy_16_bytes_async(shared, global, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Makes one group of the copies that this thread began since the last one; it may be empty.
__device__ __forceinline__ void commit_copies() {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits for all groups of this thread but the kStillPending latest. A thread that returns must have
// waited for all it began.
template <int kStillPending>
__device__ __forceinline__ void wait_for_copies() {
  static_assert(kStillPending >= 0);
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::wait_for_copies(kStillPending);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(kStillPending) : "memory");
#endif
}

}  // namespace pruneops
