// What the C++ tests share: CHECK, and ParallelFor objects that need no torch.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "common/parallel.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace pruneops::testing {

// Two std::threads, each with half of the range.
inline ParallelFor two_threads() {
  auto run = [](void*, int64_t begin, int64_t end, int64_t, void (*body)(void*, int64_t, int64_t),
                void* arg) {
    const int64_t middle = begin + (end - begin) / 2;
    std::thread other([=] { body(arg, begin, middle); });
    body(arg, middle, end);
    other.join();
  };
  return ParallelFor{run, nullptr, 2};
}

inline ParallelFor serial() { return ParallelFor{nullptr, nullptr, 1}; }

}  // namespace pruneops::testing
