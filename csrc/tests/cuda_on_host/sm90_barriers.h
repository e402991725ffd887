// Stands in for barriers in shared memory, named barriers and the sharing out of registers.

#pragma once

#include "sm90_block.h"

namespace cuda_on_host {

constexpr uint64_t kBarrierWord = 0x62617272696572ull;

// The state of a barrier that was made, and is still there.
inline PhaseBarrier& phase_barrier(uint64_t* barrier) {
  Block& block = Block::current();
  const auto found = sm90_block.barriers.find(barrier);
  if (found == sm90_block.barriers.end()) block.fail("a barrier that was never made");
  if (*barrier != kBarrierWord) block.fail("something wrote over a barrier");
  if (!found->second.published) block.fail("a barrier is used before publish_barriers()");
  return found->second;
}

inline void make_barrier(uint64_t* barrier, int arrivals) {
  Block& block = Block::current();
  if (!sm90_block.is_shared(barrier, 8) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    block.fail("a barrier is 8 aligned bytes of shared memory");
  }
  if (arrivals < 1 || arrivals >= 1 << 20) block.fail("a barrier counts 1 to 2^20 - 1 arrivals");
  const auto made = sm90_block.barriers.try_emplace(barrier);
  if (!made.second) block.fail("a barrier is made twice");
  PhaseBarrier& state = made.first->second;
  state.arrivals = state.missing = arrivals;
  for (int parity = 0; parity < 2; ++parity) {
    state.waits[parity] = "the barrier at byte " + std::to_string(sm90_block.offset(barrier)) +
                          ", parity " + std::to_string(parity);
  }
  *barrier = kBarrierWord;
}

inline void publish_barriers() {
  for (auto& entry : sm90_block.barriers) entry.second.published = true;
}

inline void arrive(uint64_t* barrier, int bytes) {
  Block& block = Block::current();
  block.maybe_yield();
  PhaseBarrier& state = phase_barrier(barrier);
  state.bytes += bytes;
  if (bytes < 0 || state.bytes >= 1 << 20) block.fail("a barrier counts less than 2^20 bytes");
  if (--state.missing < 0) block.fail("more threads arrive at a barrier than it counts");
  Sm90Block::end_phase_if_complete(state);
}

inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  Block& block = Block::current();
  block.maybe_yield();
  PhaseBarrier& state = phase_barrier(barrier);
  if (parity > 1) block.fail("a parity is 0 or 1");
  const auto over = [&state, parity] { return state.phases % 2 != parity; };
  const unsigned before = state.phases;
  block.wait_until(state.waits[parity].c_str(), over);
  // Real threads look again and again, and may find the next phase over as well.
  if (!over() || state.phases > before + 1) {
    block.fail("a thread fell two phases behind, waiting for " + state.waits[parity]);
  }
}

inline void named_barrier(int id, int threads, bool wait) {
  static const std::array<std::string, 16> kNames = [] {
    std::array<std::string, 16> names;
    for (int i = 0; i < 16; ++i) names[i] = "named barrier " + std::to_string(i);
    return names;
  }();
  Block& block = Block::current();
  if (id < 1 || id > 15) block.fail("named barriers have numbers from 1 to 15");
  const int all = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  if (threads < 32 || threads % 32 != 0 || threads > all) {
    block.fail("a named barrier is of whole warps of the block");
  }
  // Warps come as a whole.
  block.meet(kNames[id].c_str(), 0xffffffffu, 0);
  if (block.taking_part() != 0xffffffffu) block.fail(kNames[id] + " needs all lanes of the warp");
  NamedBarrier& barrier = sm90_block.named_barriers[id];
  if (barrier.came == 0) barrier.threads = threads;
  if (barrier.threads != threads)
    block.fail(kNames[id] + " is used with different numbers of threads");
  if (++barrier.came == threads) {
    barrier.came = 0;
    ++barrier.rounds;
  } else if (wait) {
    const unsigned round = barrier.rounds;
    block.wait_until(kNames[id].c_str(), [&barrier, round] { return barrier.rounds != round; });
  }
}

inline void change_registers(int registers) {
  Block& block = Block::current();
  int mine = registers;
  block.together<int>("setmaxnreg", mine, [](const std::array<int*, 32>& lanes) {
    sm90_block.step("setmaxnreg", static_cast<uint64_t>(*lanes[0]));
    const size_t group = static_cast<size_t>(Block::current().thread()) / 128;
    sm90_block.warpgroups[group].registers = *lanes[0];
    // Of a thread of each warpgroup. The block starts with the same for all, a multiple of 8, as
    // many as the register file allows; there are no others later.
    const size_t groups = sm90_block.warpgroups.size();
    size_t sum = 0;
    for (const Warpgroup& other : sm90_block.warpgroups) {
      sum += static_cast<size_t>(other.registers);
    }
    if (sum > 65536 / (128 * groups) / 8 * 8 * groups) {
      Block::current().fail("the warpgroups take more registers than the block has");
    }
  });
}

}  // namespace cuda_on_host
