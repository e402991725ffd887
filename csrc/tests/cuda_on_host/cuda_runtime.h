// Stands in for CUDA's cuda_runtime.h when kernels are compiled as host C++ for the tests: the part
// of the language and of the runtime that the kernels use.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "engine.h"

#define PRUNEOPS_CUDA_ON_HOST 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
// One block lives at a time, so its shared variables may be static. They keep what the block before
// left there: a kernel that reads before it writes gives other results in another order of blocks.
#define __shared__ static

constexpr int warpSize = 32;

// Vector types.
#define CUDA_ON_HOST_VECTOR_TYPES(name, scalar)                                                \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                 \
  struct alignas(sizeof(scalar) < 4 ? 4 * sizeof(scalar) : 16) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                         \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_ON_HOST_VECTOR_TYPES(float, float)
CUDA_ON_HOST_VECTOR_TYPES(int, int)
CUDA_ON_HOST_VECTOR_TYPES(uint, unsigned)
CUDA_ON_HOST_VECTOR_TYPES(ushort, unsigned short)
CUDA_ON_HOST_VECTOR_TYPES(uchar, unsigned char)
CUDA_ON_HOST_VECTOR_TYPES(longlong, long long)
#undef CUDA_ON_HOST_VECTOR_TYPES

struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// Barriers and fences.
#define __syncthreads() ((void)cuda_on_host::Block::current().barrier(__FILE__, __LINE__, 0))
#define __syncthreads_count(p) \
  (cuda_on_host::Block::current().barrier(__FILE__, __LINE__, (p) ? 1 : 0))
#define __syncthreads_or(p) (__syncthreads_count(p) != 0 ? 1 : 0)
#define __syncthreads_and(p) (__syncthreads_count((p) ? 0 : 1) == 0 ? 1 : 0)

inline void __threadfence() { cuda_on_host::Block::current().maybe_yield(); }
inline void __threadfence_block() { cuda_on_host::Block::current().maybe_yield(); }
inline void __trap() { cuda_on_host::Block::current().fail("__trap()"); }

// Warp operations.
namespace cuda_on_host {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* where, unsigned mask, T value, int source) {
  Block& block = Block::current();
  block.meet(where, mask, to_bits(value), source);
  return from_bits<T>(block.seen(source));
}

// Folds what the lanes brought, lowest lane first.
template <class T, class Fold>
T reduce(const char* where, unsigned mask, T value, const Fold& fold) {
  Block& block = Block::current();
  block.meet(where, mask, to_bits(value));
  bool any = false;
  T result{};
  for (int i = 0; i < 32; ++i) {
    if ((block.taking_part() >> i & 1) == 0) continue;
    const T x = from_bits<T>(block.seen(i));
    result = any ? fold(result, x) : x;
    any = true;
  }
  return result;
}

inline unsigned vote(const char* where, unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << Block::current().lane() : 0u;
  return reduce(where, mask, bit, [](unsigned a, unsigned b) { return a | b; });
}

inline int width_base(int width) { return Block::current().lane() & ~(width - 1); }

}  // namespace cuda_on_host

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::Block::current().meet("__syncwarp", mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_on_host::shuffle("__shfl_sync", mask, value,
                               cuda_on_host::width_base(width) | (source & (width - 1)));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_host::Block::current().lane(), source = lane - static_cast<int>(delta);
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value,
                               source < cuda_on_host::width_base(width) ? lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_host::Block::current().lane(), source = lane + static_cast<int>(delta);
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value,
                               source >= cuda_on_host::width_base(width) + width ? lane : source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = cuda_on_host::Block::current().lane(), source = lane ^ flip;
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value,
                               source >= cuda_on_host::width_base(width) + width ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::vote("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_host::vote("__any_sync", mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_on_host::vote("__all_sync", mask, predicate == 0) == 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  const auto add = [](unsigned a, unsigned b) { return a + b; };
  return static_cast<T>(
      cuda_on_host::reduce("__reduce_add_sync", mask, static_cast<unsigned>(value), add));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_on_host::reduce("__reduce_min_sync", mask, value,
                              [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_on_host::reduce("__reduce_max_sync", mask, value,
                              [](T a, T b) { return a < b ? b : a; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_on_host::reduce("__reduce_or_sync", mask, value,
                              [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return cuda_on_host::reduce("__reduce_and_sync", mask, value,
                              [](unsigned a, unsigned b) { return a & b; });
}

// Atomic operations: nothing comes between their read and their write here, but much may around
// them.
namespace cuda_on_host {

template <class T, class Update>
T atomic(T* address, const Update& update) {
  Block::current().maybe_yield();
  const T old = *address;
  *address = update(old);
  return old;
}

template <class T>
struct Same {  // keeps an argument out of template deduction, as CUDA's overloads do
  using type = T;
};
template <class T>
using SameT = typename Same<T>::type;

}  // namespace cuda_on_host

template <class T>
T atomicAdd(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) {
    if constexpr (sizeof(T) == 4 && T(-1) < T(0) && T(0.5) == T(0)) {
      return static_cast<T>(static_cast<unsigned>(old) + static_cast<unsigned>(v));
    } else {
      return static_cast<T>(old + v);
    }
  });
}
template <class T>
T atomicSub(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return static_cast<T>(old - v); });
}
template <class T>
T atomicMax(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicOr(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return static_cast<T>(old | v); });
}
template <class T>
T atomicAnd(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return static_cast<T>(old & v); });
}
template <class T>
T atomicExch(T* p, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, cuda_on_host::SameT<T> expected, cuda_on_host::SameT<T> v) {
  return cuda_on_host::atomic(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return cuda_on_host::atomic(p, [=](unsigned old) { return old >= last ? 0u : old + 1u; });
}

// Loads and stores with cache hints.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, cuda_on_host::SameT<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, cuda_on_host::SameT<T> v) {
  *p = v;
}

// Bits and numbers.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __float_as_uint(float x) {
  return cuda_on_host::from_bits<unsigned>(cuda_on_host::to_bits(x));
}
inline int __float_as_int(float x) {
  return cuda_on_host::from_bits<int>(cuda_on_host::to_bits(x));
}
inline float __uint_as_float(unsigned x) {
  return cuda_on_host::from_bits<float>(cuda_on_host::to_bits(x));
}
inline float __int_as_float(int x) {
  return cuda_on_host::from_bits<float>(cuda_on_host::to_bits(x));
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

#define CUDA_ON_HOST_MIN_MAX(T)                    \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_HOST_MIN_MAX(int)
CUDA_ON_HOST_MIN_MAX(unsigned)
CUDA_ON_HOST_MIN_MAX(long)
CUDA_ON_HOST_MIN_MAX(unsigned long)
CUDA_ON_HOST_MIN_MAX(long long)
CUDA_ON_HOST_MIN_MAX(unsigned long long)
#undef CUDA_ON_HOST_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Runtime calls of the launchers.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "error";
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) memset(p, value, bytes);
  return cudaSuccess;
}
