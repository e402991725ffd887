// Stands in for asynchronous copies to shared memory. From its beginning to the wait that covers it
// the destination of a copy holds poison (NaN, -1), so that reading too early, from whatever
// thread, and writing into a buffer that others still read, show in the results.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "engine.h"

namespace cuda_on_host {

constexpr size_t kCopyBytes = 16;

inline void copy_16_bytes_async(void* shared, const void* global, bool valid) {
  Block& block = Block::current();
  if (reinterpret_cast<uintptr_t>(shared) % kCopyBytes != 0) {
    block.fail("an asynchronous copy to an address that is not on 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) {
    block.fail("an asynchronous copy from an address that is not on 16 bytes");
  }
  if (block.is_private(shared)) block.fail("an asynchronous copy to memory that is not shared");
  AsyncCopies& copies = block.copies();
  AsyncCopies::Copy copy{shared, valid ? global : nullptr, copies.groups, {}};
  if (valid) std::memcpy(copy.bytes, global, kCopyBytes);
  std::memset(shared, 0xff, kCopyBytes);
  copies.under_way.push_back(copy);
}

inline void commit_copies() { ++Block::current().copies().groups; }

inline void wait_for_copies(int still_pending) {
  Block& block = Block::current();
  AsyncCopies& copies = block.copies();
  unsigned char poison[kCopyBytes];
  std::memset(poison, 0xff, kCopyBytes);
  size_t done = 0;
  for (; done < copies.under_way.size(); ++done) {
    const AsyncCopies::Copy& copy = copies.under_way[done];
    if (copy.group + still_pending >= copies.groups) break;
    if (std::memcmp(copy.shared, poison, kCopyBytes) != 0) {
      block.fail("the destination of an asynchronous copy was written before it had arrived");
    }
    if (copy.global != nullptr && std::memcmp(copy.global, copy.bytes, kCopyBytes) != 0) {
      block.fail("the source of an asynchronous copy changed before it had arrived");
    }
    std::memcpy(copy.shared, copy.bytes, kCopyBytes);
  }
  copies.under_way.erase(copies.under_way.begin(), copies.under_way.begin() + done);
  block.maybe_yield();
}

}  // namespace cuda_on_host
