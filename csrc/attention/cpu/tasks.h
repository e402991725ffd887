// Running independent tasks on the pool, and cutting a thread's workspace into arrays.

#pragma once

#include "common/parallel.h"
#include "common/vec.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

// Calls f(task, workspace of the thread) for every task in [0, count). Threads draw tasks in order
// from one counter, so a list sorted longest first balances itself. Tasks own their outputs: the
// schedule cannot change a result.
template <class F>
void run_tasks(const ParallelFor& parallel, int64_t count, char* workspace,
               int64_t bytes_per_thread, const F& f) {
  int64_t next = 0;
  const int64_t workers = min_of<int64_t>(max_of(parallel.num_threads, 1), count);
  parallel_for(parallel, 0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (;;) {
        const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= count) break;
        f(task, workspace + worker * bytes_per_thread);
      }
    }
  });
}

// Hands out 64-aligned arrays from a workspace. Started at null it only adds up the size.
class Arena {
 public:
  explicit Arena(char* base) : base_(base), used_(0) {}

  template <class T>
  PRUNEOPS_INLINE T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }

  PRUNEOPS_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_;
};

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
