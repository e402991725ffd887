// Large outputs are written once, front to back, into memory fresh from the kernel. With 4 KiB
// pages most of that time is page faults; asking for huge pages makes the write about three times
// faster.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pruneops {

// Advises huge pages for the part of [data, data + bytes) that can have them. A hint: no effect on
// contents, and failure does not matter.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallestWorthwhile = int64_t{4} << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kSmallestWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace pruneops
