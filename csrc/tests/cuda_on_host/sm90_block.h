// What the stand-ins for Hopper's asynchronous operations keep of the block that runs.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace cuda_on_host {

// A barrier in shared memory.
struct PhaseBarrier {
  int arrivals = 0;     // that end a phase
  int missing = 0;      // of them in the present phase
  int64_t bytes = 0;    // still expected in the present phase; negative if they came first
  unsigned phases = 0;  // that are over
  bool published = false;
  std::string waits[2];  // what a deadlock is described with, by parity
};

struct NamedBarrier {
  int threads = 0;  // of the round under way
  int came = 0;
  unsigned rounds = 0;
};

// A copy of a box that is under way.
struct BoxCopy {
  unsigned char* to;
  std::vector<unsigned char> bytes;  // as they will lie in shared memory
  uint64_t* barrier;
};

// An accumulator that products of one thread still write to.
struct PendingFragment {
  float* d;
  int count;
  int batch;  // the latest one that writes to it
  std::array<float, 128> values;
};

// An operand in shared memory that products may still read.
struct PendingOperand {
  uint64_t descriptor;
  int rows;
  int first_row;
  bool transposed;
  int batch;
  uint64_t checksum;
};

struct WarpProducts {
  bool fenced = false;
  int products = 0;  // since the last commit
  int batches = 0;   // committed so far
  size_t steps = 0;  // operations of the warpgroup so far
  std::vector<PendingOperand> operands;
  std::array<std::vector<PendingFragment>, 32> fragments;  // by lane
};

struct Warpgroup {
  std::vector<uint64_t> steps;  // what its warps did, each the same in the same order
  int registers = 0;
};

class Sm90Block : public Background {
 public:
  std::unordered_map<const void*, PhaseBarrier> barriers;
  std::array<NamedBarrier, 16> named_barriers;
  std::vector<WarpProducts> warps;
  std::vector<Warpgroup> warpgroups;

  void begin() override {
    const Block& block = Block::current();
    const size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
    barriers.clear();
    named_barriers = {};
    warps.assign((threads + 31) / 32, {});
    warpgroups.assign((threads + 127) / 128, {});
    copies_.clear();
    unfenced_ = false;
    seen_.assign(block.shared_bytes(), 0xff);
    random_.seed(schedule.seed);
  }

  // A copy arrives: at once, in a random order at random times, or as late as possible, the latest
  // first.
  bool proceed(bool idle) override {
    if (copies_.empty()) return false;
    const Order order = schedule.threads;
    if (!idle && (order == Order::kBackward || (order == Order::kShuffled && random_() % 2 == 0))) {
      return false;
    }
    const size_t last = copies_.size() - 1;
    const size_t which = order == Order::kForward    ? 0
                         : order == Order::kBackward ? last
                                                     : random_() % copies_.size();
    BoxCopy copy = std::move(copies_[which]);
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(which));
    finish(copy);
    return true;
  }

  void end() override {
    if (!copies_.empty()) throw Failure("the block ended before its copies had arrived");
    for (const NamedBarrier& barrier : named_barriers) {
      if (barrier.came != 0) throw Failure("the block ended with arrivals at a named barrier");
    }
    for (const auto& entry : barriers) {
      if (entry.second.bytes != 0)
        throw Failure("the block ended with bytes expected that never came");
    }
    for (size_t w = 0; w < warps.size(); ++w) {
      const WarpProducts& warp = warps[w];
      if (warp.products > 0 || !warp.operands.empty() || !warp.fragments[0].empty()) {
        throw Failure("a warp returned before its products were finished");
      }
      if (warp.steps != warpgroups[w / 4].steps.size()) {
        throw Failure("the warps of a warpgroup did not all do the same products");
      }
    }
  }

  // All warps of a warpgroup do the same steps in the same order. Called once for each warp.
  void step(const char* what, uint64_t details) {
    const size_t w = static_cast<size_t>(Block::current().thread()) / 32;
    if (w / 4 * 4 + 4 > warps.size()) {
      Block::current().fail(std::string(what) + " needs a whole warpgroup");
    }
    uint64_t key = details * 0x9e3779b97f4a7c15u;
    for (const char* c = what; *c != 0; ++c)
      key = (key ^ static_cast<uint64_t>(*c)) * 0x100000001b3u;
    std::vector<uint64_t>& steps = warpgroups[w / 4].steps;
    if (warps[w].steps == steps.size()) steps.push_back(key);
    if (steps[warps[w].steps++] != key) {
      Block::current().fail("the warps of a warpgroup do different products: " + std::string(what));
    }
  }

  WarpProducts& warp() { return warps[static_cast<size_t>(Block::current().thread()) / 32]; }

  void begin_copy(BoxCopy&& copy) {
    std::memset(copy.to, 0xff, copy.bytes.size());
    std::memset(seen_.data() + offset(copy.to), 0xff, copy.bytes.size());
    copies_.push_back(std::move(copy));
  }

  void fence_async_proxy() { unfenced_ = true; }

  size_t offset(const void* p) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(p) -
                               static_cast<const unsigned char*>(Block::current().shared()));
  }

  // Whether [p, p + bytes) lies in shared memory.
  bool is_shared(const void* p, size_t bytes) const {
    return Block::current().shared() != nullptr && p >= Block::current().shared() &&
           offset(p) + bytes <= Block::current().shared_bytes();
  }

  // 16 bits of shared memory as the tensor cores see them, which is without what threads wrote
  // since their last fence_async_proxy().
  uint16_t read(size_t at) {
    if (unfenced_) {
      std::memcpy(seen_.data(), Block::current().shared(), seen_.size());
      unfenced_ = false;
    }
    if (at + 2 > seen_.size())
      Block::current().fail("a product reads past the end of shared memory");
    uint16_t seen, written;
    std::memcpy(&seen, seen_.data() + at, 2);
    std::memcpy(&written, static_cast<const unsigned char*>(Block::current().shared()) + at, 2);
    if (seen != written) {
      Block::current().fail("a product reads what threads wrote without fence_async_proxy()");
    }
    return seen;
  }

  static void end_phase_if_complete(PhaseBarrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.arrivals;
    ++barrier.phases;
  }

 private:
  void finish(const BoxCopy& copy) {
    for (size_t i = 0; i < copy.bytes.size(); ++i) {
      if (copy.to[i] != 0xff) throw Failure("the destination of a copy was written while it ran");
    }
    std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    std::memcpy(seen_.data() + offset(copy.to), copy.bytes.data(), copy.bytes.size());
    PhaseBarrier& barrier = barriers.at(copy.barrier);
    barrier.bytes -= static_cast<int64_t>(copy.bytes.size());
    end_phase_if_complete(barrier);
  }

  std::vector<BoxCopy> copies_;
  std::vector<unsigned char> seen_;  // shared memory as asynchronous operations see it
  bool unfenced_ = false;            // threads have written more that they may see
  std::mt19937 random_;
};

inline Sm90Block sm90_block;
inline const bool kSm90InBackground = (background = &sm90_block, true);

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(sm90_block.offset(p));
}

inline void fence_async_proxy() {
  Block::current().maybe_yield();
  sm90_block.fence_async_proxy();
}

}  // namespace cuda_on_host
