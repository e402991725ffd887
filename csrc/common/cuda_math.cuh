// Arithmetic that CUDA C++ has no name for.

#pragma once

#include "common/cuda_kernel.h"

namespace pruneops {

// 2^x in one instruction, to two units in the last place; results below the smallest normal number
// are 0. exp2f() takes care of those with three instructions more.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pruneops
