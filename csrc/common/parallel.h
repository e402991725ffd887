// Data parallelism without a thread pool of our own. Kernels take a ParallelFor; torch's wrappers
// pass one that runs on torch's pool (parallel_torch.h), the C++ tests pass a serial or std::thread
// one.

#pragma once

#include <cstdint>

namespace pruneops {

// A callable that runs body(arg, b, e) over disjoint ranges [b, e) that cover [begin, end), each of
// at least `grain` items unless fewer are left. Ranges may run at the same time on up to
// num_threads threads, so bodies must not depend on each other. Bodies must not throw.
struct ParallelFor {
  void (*run)(void* ctx, int64_t begin, int64_t end, int64_t grain,
              void (*body)(void* arg, int64_t b, int64_t e), void* arg);
  void* ctx;
  int num_threads;
};

// Calls f(b, e) through `parallel`. Always inlined: the instantiation for a lambda of a per-ISA
// file must stay in that file (see csrc/README.md).
template <typename F>
__attribute__((always_inline)) inline void parallel_for(const ParallelFor& parallel, int64_t begin,
                                                        int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (parallel.num_threads <= 1 || end - begin <= grain) {
    f(begin, end);
    return;
  }
  parallel.run(
      parallel.ctx, begin, end, grain,
      [](void* arg, int64_t b, int64_t e) { (*static_cast<const F*>(arg))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace pruneops
