// What every CUDA kernel file includes: the part of CUDA that kernels use, under nvcc or, in the
// tests, as host C++ (csrc/tests/cuda_on_host stands in for cuda_runtime.h and defines
// PRUNEOPS_CUDA_ON_HOST). No torch here.

#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

// PRUNEOPS_DYNAMIC_SHARED(float, tile): the block's dynamic shared memory as `float* tile`, 16-byte
// aligned.
#ifdef PRUNEOPS_CUDA_ON_HOST
#define PRUNEOPS_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(cuda_on_host::Block::current().shared())
#else
#define PRUNEOPS_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

namespace pruneops {

// kernel<<<grid, block, shared_bytes, stream>>>(args...); the error of this launch, not of the
// kernel's run. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
inline cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                 size_t shared_bytes, cudaStream_t stream, Arguments... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef PRUNEOPS_CUDA_ON_HOST
  (void)stream;
  cuda_on_host::launch(kernel, grid, block, shared_bytes, static_cast<Parameters>(args)...);
#else
  // A block has 48 KiB without asking, static shared memory included, of which no kernel has more
  // than 9 KiB beside dynamic memory.
  constexpr size_t kWithoutAsking = size_t{39} << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return error;
    }
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(args)...);
  // clang-format on
#endif
  return cudaGetLastError();
}

}  // namespace pruneops
