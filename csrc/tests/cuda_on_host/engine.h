// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibers, blocks run one after
// another, each in a chosen order. What it finds: wrong results, accesses out of bounds (under the
// sanitizers), results that depend on the order of threads or blocks, barriers and warp operations
// that not everybody reaches. What it cannot find: races between threads that no order of whole
// steps shows; and blocks that wait for one another hang or fail here, because only one block lives
// at a time.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

// A kernel broke a rule of the execution model; thrown by launch().
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kBackward, kShuffled };

// In which order ready threads of a block, and blocks of a grid, get their turn. Shuffled threads
// also lose their turn at some atomic operations.
struct Schedule {
  Order threads = Order::kForward;
  Order blocks = Order::kForward;
  unsigned seed = 0;
};

// The schedule of the launches that follow.
inline Schedule schedule;

// What a test runs each of its cases with: results must not depend on it.
inline std::vector<Schedule> all_schedules() {
  return {{Order::kForward, Order::kForward, 0},  {Order::kBackward, Order::kBackward, 0},
          {Order::kForward, Order::kBackward, 0}, {Order::kShuffled, Order::kShuffled, 1},
          {Order::kShuffled, Order::kForward, 2}, {Order::kBackward, Order::kShuffled, 3}};
}

enum class State { kReady, kAtBarrier, kInWarp, kWaiting, kDone };

// Asynchronous copies of one thread; see async_copies.h.
struct AsyncCopies {
  struct Copy {
    void* shared;
    const void* global;  // null: zeros
    int group;
    unsigned char bytes[16];
  };
  std::vector<Copy> under_way;  // groups ascend
  int groups = 0;               // committed so far
};

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  const char* where;     // operation it waits in
  int line;              // of the barrier it waits at
  unsigned mask;         // lanes of the warp operation it waits in
  uint64_t value;        // what it brings to that operation
  int source;            // the lane whose value it is after, kAllLanes for all of them
  uint64_t seen[32];     // what these lanes brought, once complete
  unsigned taking_part;  // lanes that came
  bool (*condition)(const void*);
  const void* condition_argument;  // what it waits for is condition(condition_argument)
  AsyncCopies copies;
};

struct Warp {
  unsigned in_operation;  // lanes that wait in a warp operation
  unsigned returned;      // lanes that have returned, or never were
};

// What goes on in a block beside its threads; see sm90_block.h.
class Background {
 public:
  virtual ~Background() = default;
  virtual void begin() = 0;  // of a block
  // Finishes something, or not; something if there is anything and no thread can go on. True if so.
  virtual bool proceed(bool idle) = 0;
  virtual void end() = 0;  // all threads have returned
};

inline Background* background = nullptr;

class Block {
 public:
  static Block& current() { return *active_; }

  Block(int num_threads, size_t shared_bytes)
      : threads_(num_threads),
        warps_((num_threads + 31) / 32),
        shared_bytes_(shared_bytes),
        random_(schedule.seed) {
    reserve_stacks(num_threads);
    for (int t = 0; t < num_threads; ++t) {
      threads_[t].fiber.prepare(stacks_ + t * kStackBytes + kPage, kStackBytes - kPage,
                                &Block::run_threads);
    }
    // Exactly as long as asked for, so that the sanitizers see an access past the end.
    if (shared_bytes > 0 && posix_memalign(&shared_, 1024, shared_bytes) != 0) {
      throw Failure("no memory for shared memory");
    }
    active_ = this;
  }

  ~Block() {
    active_ = nullptr;
    std::free(shared_);
  }

  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs body() once for every thread.
  template <class Body>
  void run(const Body& body) {
    body_ = [](const void* f) { (*static_cast<const Body*>(f))(); };
    body_argument_ = &body;
    if (shared_ != nullptr) std::memset(shared_, 0xff, shared_bytes_);  // NaN, -1
    const int n = static_cast<int>(threads_.size());
    done_ = at_barrier_ = 0;
    for (Warp& warp : warps_) warp = {0, 0};
    if (n % 32 != 0) warps_.back().returned = ~0u << n % 32;
    for (int t = 0; t < n; ++t) start(t);
    if (background != nullptr) background->begin();
    while (done_ < n) {
      ready_.clear();
      for (int t = 0; t < n; ++t) {
        Thread& thread = threads_[t];
        if (thread.state == State::kWaiting && thread.condition(thread.condition_argument)) {
          thread.state = State::kReady;
        }
        if (thread.state == State::kReady) ready_.push_back(t);
      }
      if (background != nullptr && background->proceed(ready_.empty())) continue;
      if (ready_.empty()) throw Failure(describe_deadlock());
      arrange(ready_, schedule.threads);
      // Shuffled warps also drift apart: in each round some of them stay behind.
      if (schedule.threads == Order::kShuffled) {
        const uint32_t behind = random_() & random_();
        const auto stays = [&](int t) { return (behind >> t / 32 & 1) != 0; };
        ready_.erase(std::remove_if(ready_.begin(), ready_.end(), stays), ready_.end());
      }
      turn_ = 0;
      next(scheduler_);
      if (!failure_.empty()) throw Failure(position() + failure_);
    }
    if (background != nullptr) background->end();
  }

  template <class T>
  void arrange(std::vector<T>& items, Order order) {
    if (order == Order::kBackward) {
      for (size_t i = 0, j = items.size(); i + 1 < j; ++i) std::swap(items[i], items[--j]);
    } else if (order == Order::kShuffled) {
      for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_() % i]);
    }
  }

  void* shared() const { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }

  // The barrier of the block. Returns the sum over its threads of `contribution`.
  int barrier(const char* where, int line, int contribution) {
    Thread& me = threads_[me_];
    if (at_barrier_ == 0) {
      sum_ = 0;
    } else {
      for (const Thread& other : threads_) {
        if (other.state != State::kAtBarrier) continue;
        if (other.line != line || std::strcmp(other.where, where) != 0) {
          fail("threads wait at different barriers: " + std::string(other.where) + " in line " +
               std::to_string(other.line) + " and " + where + " in line " + std::to_string(line));
        }
        break;
      }
    }
    me.state = State::kAtBarrier;
    me.where = where;
    me.line = line;
    sum_ += contribution;
    if (++at_barrier_ == static_cast<int>(threads_.size())) {
      at_barrier_ = 0;
      result_ = sum_;
      for (Thread& t : threads_) t.state = State::kReady;
    } else {
      yield();
    }
    return result_;
  }

  // Waits until condition(), which any thread may be asked for, holds.
  template <class Condition>
  void wait_until(const char* where, const Condition& condition) {
    if (condition()) return;
    Thread& me = threads_[me_];
    me.state = State::kWaiting;
    me.where = where;
    me.condition = [](const void* f) { return (*static_cast<const Condition*>(f))(); };
    me.condition_argument = &condition;
    yield();
  }

  static constexpr int kAllLanes = -1;
  static constexpr int kNoLane = -2;

  // Meets the lanes of `mask` that have not returned; afterwards seen(source) is what that lane
  // brought. True for the lane that came last.
  bool meet(const char* where, unsigned mask, uint64_t value, int source = kAllLanes) {
    Thread& me = threads_[me_];
    if ((mask >> lane() & 1) == 0) fail(std::string(where) + ": the caller is not in its mask");
    me.state = State::kInWarp;
    me.where = where;
    me.mask = mask;
    me.value = value;
    me.source = source;
    warps_[me_ / 32].in_operation |= 1u << lane();
    if (complete(me)) return true;
    yield();
    return false;
  }

  uint64_t seen(int from) {
    const Thread& me = threads_[me_];
    if ((me.taking_part >> from & 1) == 0) {
      fail(std::string(me.where) + " reads lane " + std::to_string(from) + ", which takes no part");
    }
    return me.seen[from];
  }

  unsigned taking_part() const { return threads_[me_].taking_part; }

  // Meets the whole warp; the lane that comes last computes for all of them, from what each brings
  // and into it.
  template <class T>
  void together(const char* where, T& mine, void (*compute)(const std::array<T*, 32>&)) {
    const bool last = meet(where, 0xffffffffu, reinterpret_cast<uint64_t>(&mine), kNoLane);
    if (taking_part() != 0xffffffffu) fail(std::string(where) + " needs all lanes of the warp");
    if (!last) return;
    std::array<T*, 32> lanes;
    for (int i = 0; i < 32; ++i) lanes[i] = reinterpret_cast<T*>(threads_[me_ / 32 * 32 + i].value);
    compute(lanes);
  }

  AsyncCopies& copies() { return threads_[me_].copies; }

  // Whether `p` is on the stack of a thread.
  bool is_private(const void* p) const {
    const char* byte = static_cast<const char*>(p);
    return byte >= stacks_ && byte < stacks_ + kStackBytes * num_stacks_;
  }

  int thread() const { return me_; }

  int lane() const { return me_ % 32; }

  // A chance for the others, where real threads would interleave.
  void maybe_yield() {
    if (schedule.threads == Order::kShuffled && random_() % 4 == 0) yield();
  }

  // Ends the launch. The stacks of its threads are abandoned, so nothing on them may own memory.
  [[noreturn]] void fail(std::string&& message) {
    failure_ = std::move(message);
    while (true) yield();  // never resumed: run() throws
  }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kStackBytes = (size_t{256} << 10) + kPage;

  // Stacks are kept for later launches. The lowest page of each is off limits.
  static void reserve_stacks(int count) {
    if (count <= num_stacks_) return;
    if (stacks_ != nullptr) munmap(stacks_, kStackBytes * num_stacks_);
    void* memory = mmap(nullptr, kStackBytes * count, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Failure("no memory for the stacks of a block");
    stacks_ = static_cast<char*>(memory);
    num_stacks_ = count;
    for (int t = 0; t < count; ++t) mprotect(stacks_ + t * kStackBytes, kPage, PROT_NONE);
  }

  void start(int t) {
    Thread& thread = threads_[t];
    const unsigned x = blockDim.x, y = blockDim.y, u = static_cast<unsigned>(t);
    thread.index = {u % x, u / x % y, u / (x * y)};
    thread.state = State::kReady;
    thread.where = "";
    thread.copies.under_way.clear();
    thread.copies.groups = 0;
  }

  // What each fiber does: its thread of one block after another.
  static void run_threads() {
    while (true) {
      Block& block = current();
      block.body_(block.body_argument_);
      Thread& me = block.threads_[block.me_];
      if (!me.copies.under_way.empty())
        block.fail("returns before its asynchronous copies arrived");
      me.state = State::kDone;
      ++block.done_;
      block.warps_[block.me_ / 32].returned |= 1u << block.lane();
      block.release_warp_of_returned();
      block.yield();
    }
  }

  // Leaves `mine` for the thread whose turn it is in this round, or for the scheduler behind the
  // last one or after a failure.
  void next(Fiber& mine) {
    if (turn_ == ready_.size() || !failure_.empty()) {
      if (&mine != &scheduler_) mine.go_to(scheduler_);
      return;
    }
    me_ = ready_[turn_++];
    threadIdx = threads_[me_].index;
    mine.go_to(threads_[me_].fiber);
  }

  void yield() { next(threads_[me_].fiber); }

  // Lets the lanes of the operation that `waiting` waits in go on, if all of them are there.
  bool complete(const Thread& waiting) {
    const int first = me_ / 32 * 32;
    Warp& warp = warps_[me_ / 32];
    const unsigned mask = waiting.mask, present = mask & ~warp.returned;
    if ((present & ~warp.in_operation) != 0) return false;
    unsigned same = 0;
    for (int i = 0; i < 32; ++i) {
      if ((present >> i & 1) == 0) continue;
      const Thread& other = threads_[first + i];
      if (other.mask != mask) continue;
      if (other.where == waiting.where || std::strcmp(other.where, waiting.where) == 0) {
        same |= 1u << i;
      }
    }
    if (same != present) {
      for (int i = 0; i < 32; ++i) {
        if (((present & ~same) >> i & 1) == 0) continue;
        // Part of a warp may be busy among itself; but two lanes may not wait for each other.
        const Thread& other = threads_[first + i];
        if ((other.mask & same) == 0) continue;
        fail("lanes of a warp meet in different operations or masks: " + std::string(other.where) +
             " and " + waiting.where);
      }
      return false;
    }
    uint64_t values[32] = {};
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) values[i] = threads_[first + i].value;
    }
    for (int i = 0; i < 32; ++i) {
      if ((present >> i & 1) == 0) continue;
      Thread& other = threads_[first + i];
      if (other.source == kAllLanes) {
        std::memcpy(other.seen, values, sizeof(values));
      } else if (other.source != kNoLane) {
        other.seen[other.source] = values[other.source];
      }
      other.taking_part = present;
      other.state = State::kReady;
    }
    warp.in_operation &= ~present;
    return true;
  }

  // The rest of the warp no longer waits for a lane that returned.
  void release_warp_of_returned() {
    const int first = me_ / 32 * 32;
    for (int t = first; t < first + 32 && t < static_cast<int>(threads_.size()); ++t) {
      if (threads_[t].state == State::kInWarp) complete(threads_[t]);
    }
  }

  std::string position() const {
    return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
           std::to_string(blockIdx.z) + "), thread " + std::to_string(me_) + ": ";
  }

  std::string describe_deadlock() const {
    int returned = 0, at_barrier = 0, in_warp = 0, waiting = 0;
    std::string barrier, warp, event;
    for (const Thread& t : threads_) {
      returned += t.state == State::kDone;
      at_barrier += t.state == State::kAtBarrier;
      in_warp += t.state == State::kInWarp;
      if (t.state == State::kAtBarrier)
        barrier = std::string(t.where) + " in line " + std::to_string(t.line);
      if (t.state == State::kInWarp) warp = t.where;
      waiting += t.state == State::kWaiting;
      if (t.state == State::kWaiting) event = t.where;
    }
    return position() + "deadlock: of " + std::to_string(threads_.size()) + " threads " +
           std::to_string(returned) + " have returned, " + std::to_string(at_barrier) +
           " wait at a barrier (" + barrier + "), " + std::to_string(in_warp) +
           " wait in a warp operation (" + warp + "), " + std::to_string(waiting) +
           " wait for an event (" + event + ")";
  }

  inline static Block* active_ = nullptr;
  inline static char* stacks_ = nullptr;
  inline static int num_stacks_ = 0;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  size_t shared_bytes_;
  void* shared_ = nullptr;
  std::mt19937 random_;
  Fiber scheduler_;
  std::vector<int> ready_;  // threads that have their turn in this round
  size_t turn_ = 0;         // of them next
  void (*body_)(const void*) = nullptr;
  const void* body_argument_ = nullptr;
  int me_ = 0;
  int done_ = 0;
  int at_barrier_ = 0;
  int sum_ = 0;
  int result_ = 0;
  std::string failure_;
};

// kernel<<<grid, block, shared_bytes>>>(args...), finished when it returns.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments... args) {
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  if (num_threads < 1 || num_threads > 1024 || block.z > 64)
    throw Failure("a block has 1 to 1024 threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) throw Failure("an empty grid is a launch error");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Failure("the grid is too large");
  if (shared_bytes > (size_t{227} << 10))
    throw Failure("a block has at most 227 KiB of shared memory");
  blockDim = block;
  gridDim = grid;
  Block runner(static_cast<int>(num_threads), shared_bytes);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  runner.arrange(blocks, schedule.blocks);
  for (uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    runner.run([&] { kernel(static_cast<Parameters>(args)...); });
  }
}

}  // namespace cuda_on_host
