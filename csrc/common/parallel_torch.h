// The ParallelFor of the torch wrappers: torch's own intra-op thread pool.

#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace pruneops {

inline ParallelFor torch_parallel() {
  auto run = [](void*, int64_t begin, int64_t end, int64_t grain,
                void (*body)(void*, int64_t, int64_t), void* arg) {
    torch::stable::parallel_for(begin, end, grain,
                                [body, arg](int64_t b, int64_t e) { body(arg, b, e); });
  };
  return ParallelFor{run, nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace pruneops
