// Work that is handed out piece by piece.

#pragma once

#include <algorithm>
#include <atomic>

#include "common/parallel.h"

namespace pruneops {

// Calls f(task, worker) for every task in [0, count). Workers draw tasks from one counter; tasks
// own their outputs, so the schedule cannot change a result.
template <class F>
void run_tasks(const ParallelFor& parallel, int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(std::max(parallel.num_threads, 1), count);
  parallel_for(parallel, 0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t task = next++; task < count; task = next++) f(task, worker);
    }
  });
}

}  // namespace pruneops
