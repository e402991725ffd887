// Cuts the positions of all segments into tasks.

#include <algorithm>
#include <memory>

#include "clustering/clustering.h"
#include "clustering/cpu/tasks.h"

namespace pruneops {
namespace {

// What a task reads: enough for neighbouring positions to follow each other.
constexpr int64_t kTaskBytes = 1 << 20;

}  // namespace

void position_means(const PositionParams& p, const PositionRun* runs, int64_t num_runs,
                    const ClusterKernels& kernels, const ParallelFor& parallel) {
  const int64_t threads = std::max(parallel.num_threads, 1);
  const int64_t row_bytes = std::max<int64_t>(p.channels * element_size(p.type), 1);
  int64_t total = 0;
  for (int64_t r = 0; r < num_runs; ++r) {
    total += runs[r].positions * std::max<int64_t>(runs[r].frames, 1);
  }
  const int64_t task_rows = std::min(kTaskBytes / row_bytes, total / (4 * threads));
  const auto positions_of_task = [&](const PositionRun& run) {
    return std::max<int64_t>(task_rows / std::max<int64_t>(run.frames, 1), 1);
  };
  // Tasks before each run.
  const std::unique_ptr<int64_t[]> first_task(new int64_t[num_runs + 1]);
  first_task[0] = 0;
  for (int64_t r = 0; r < num_runs; ++r) {
    const int64_t size = positions_of_task(runs[r]);
    first_task[r + 1] = first_task[r] + (runs[r].positions + size - 1) / size;
  }
  const std::unique_ptr<float[]> scratch(new float[threads * 2 * p.channels]);
  run_tasks(parallel, first_task[num_runs], [&](int64_t task, int64_t worker) {
    const int64_t* first = first_task.get();
    const int64_t r = std::upper_bound(first, first + num_runs + 1, task) - first - 1;
    PositionRun run = runs[r];
    const int64_t size = positions_of_task(run);
    const int64_t skipped = (task - first_task[r]) * size;
    run.first_row += skipped;
    run.first_out += skipped;
    run.positions = std::min(size, run.positions - skipped);
    kernels.position_means(p, run, scratch.get() + worker * 2 * p.channels);
  });
}

}  // namespace pruneops
