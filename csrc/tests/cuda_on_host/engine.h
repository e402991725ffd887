// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibers, blocks run one after
// another, each in a chosen order. What it finds: wrong results, accesses out of bounds (under the
// sanitizers), results that depend on the order of threads or blocks, barriers and warp operations
// that not everybody reaches. What it cannot find: races between threads that no order of whole
// steps shows; and blocks that wait for one another hang or fail here, because only one block lives
// at a time.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

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

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

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

enum class State { kReady, kAtBarrier, kInWarp, kDone };

using Words = std::array<uint32_t, 6>;

struct Thread {
  ucontext_t context;
  uint3 index;
  State state;
  const char* where;     // operation it waits in
  int line;              // of the barrier it waits at
  unsigned mask;         // lanes of the warp operation it waits in
  uint64_t value;        // what it brings to that operation
  int source;            // the lane whose value it is after, kAllLanes for all of them
  uint64_t seen[32];     // what these lanes brought, once complete
  unsigned taking_part;  // lanes with an entry in `seen`
  Words words[2];        // what it brought to this exchange and to the one before
  int exchanges;         // that it took part in
};

class Block {
 public:
  static Block& current() { return *active_; }

  Block(int num_threads, size_t shared_bytes)
      : threads_(num_threads), shared_bytes_(shared_bytes), random_(schedule.seed) {
    reserve_stacks(num_threads);
    // Exactly as long as asked for, so that the sanitizers see an access past the end.
    if (shared_bytes > 0 && posix_memalign(&shared_, 128, shared_bytes) != 0) {
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
    for (int t = 0; t < n; ++t) start(t);
    std::vector<int> ready;
    while (done_ < n) {
      ready.clear();
      for (int t = 0; t < n; ++t) {
        if (threads_[t].state == State::kReady) ready.push_back(t);
      }
      if (ready.empty()) throw Failure(describe_deadlock());
      arrange(ready, schedule.threads);
      // Shuffled warps also drift apart: in each round some of them stay behind.
      const bool drift = schedule.threads == Order::kShuffled;
      const uint32_t behind = drift ? random_() & random_() : 0;
      for (int t : ready) {
        if ((behind >> t / 32 & 1) == 0) resume(t);
      }
    }
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

  static constexpr int kAllLanes = -1;

  // Meets the lanes of `mask` that have not returned; afterwards seen(source) is what that lane
  // brought.
  void meet(const char* where, unsigned mask, uint64_t value, int source = kAllLanes) {
    Thread& me = threads_[me_];
    if ((mask >> lane() & 1) == 0) fail(std::string(where) + ": the caller is not in its mask");
    me.state = State::kInWarp;
    me.where = where;
    me.mask = mask;
    me.value = value;
    me.source = source;
    complete(me);
    if (me.state != State::kReady) yield();
  }

  uint64_t seen(int from) {
    const Thread& me = threads_[me_];
    if ((me.taking_part >> from & 1) == 0) {
      fail(std::string(me.where) + " reads lane " + std::to_string(from) + ", which takes no part");
    }
    return me.seen[from];
  }

  unsigned taking_part() const { return threads_[me_].taking_part; }

  // Meets the whole warp; afterwards, and until the next exchange, exchanged(lane, i) is word i of
  // what that lane brought. Two sets suffice: nobody brings a third before all have met again.
  void exchange(const char* where, const Words& words) {
    Thread& me = threads_[me_];
    me.words[++me.exchanges % 2] = words;
    meet(where, 0xffffffffu, 0);
    if (me.taking_part != 0xffffffffu) fail(std::string(where) + " needs all lanes of the warp");
  }

  uint32_t exchanged(int from, int i) const {
    return threads_[me_ / 32 * 32 + from].words[threads_[me_].exchanges % 2][i];
  }

  int lane() const { return me_ % 32; }

  // A chance for the others, where real threads would interleave.
  void maybe_yield() {
    if (schedule.threads == Order::kShuffled && random_() % 4 == 0) yield();
  }

  // Ends the launch. The stacks of its threads are abandoned, so nothing on them may own memory.
  [[noreturn]] void fail(std::string&& message) {
    failure_ = std::move(message);
    while (true) yield();  // never resumed: resume() throws
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
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(t);
    thread.context.uc_stack.ss_size = kStackBytes - kPage;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
  }

  char* stack_of(int t) const { return stacks_ + t * kStackBytes + kPage; }

  static void enter() {
    Block& block = current();
    block.arrived(nullptr);
    block.body_(block.body_argument_);
    Thread& me = block.threads_[block.me_];
    me.state = State::kDone;
    ++block.done_;
    block.release_warp_of_returned();
    block.leave(true);
  }

  void resume(int t) {
    me_ = t;
    threadIdx = threads_[t].index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_, stack_of(t), kStackBytes - kPage);
#endif
    swapcontext(&scheduler_, &threads_[t].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
    if (!failure_.empty()) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stacks_, kStackBytes * threads_.size());
#endif
      throw Failure(position() + failure_);
    }
  }

  void arrived([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  // Back to the scheduler; a thread that is done does not return from here.
  void leave([[maybe_unused]] bool done) {
    [[maybe_unused]] void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(done ? nullptr : &fake, scheduler_bottom_, scheduler_size_);
#endif
    swapcontext(&threads_[me_].context, &scheduler_);
    arrived(fake);
  }

  void yield() { leave(false); }

  // Lets the lanes of the operation that `waiting` waits in go on, if all of them are there.
  void complete(const Thread& waiting) {
    const int first = me_ / 32 * 32;
    const unsigned mask = waiting.mask;
    unsigned present = 0;
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0 || first + i >= static_cast<int>(threads_.size())) continue;
      const Thread& other = threads_[first + i];
      if (other.state == State::kDone) continue;
      if (other.state != State::kInWarp) return;
      if (other.mask != mask || std::strcmp(other.where, waiting.where) != 0) {
        // Part of a warp may be busy among itself; but two lanes may not wait for each other.
        const auto lane = (&waiting - threads_.data()) % 32;
        if ((other.mask >> lane & 1) == 0) return;
        fail("lanes of a warp meet in different operations or masks: " + std::string(other.where) +
             " and " + waiting.where);
      }
      present |= 1u << i;
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
      } else {
        other.seen[other.source] = values[other.source];
      }
      other.taking_part = present;
      other.state = State::kReady;
    }
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
    int returned = 0, at_barrier = 0, in_warp = 0;
    std::string barrier, warp;
    for (const Thread& t : threads_) {
      returned += t.state == State::kDone;
      at_barrier += t.state == State::kAtBarrier;
      in_warp += t.state == State::kInWarp;
      if (t.state == State::kAtBarrier)
        barrier = std::string(t.where) + " in line " + std::to_string(t.line);
      if (t.state == State::kInWarp) warp = t.where;
    }
    return position() + "deadlock: of " + std::to_string(threads_.size()) + " threads " +
           std::to_string(returned) + " have returned, " + std::to_string(at_barrier) +
           " wait at a barrier (" + barrier + "), " + std::to_string(in_warp) +
           " wait in a warp operation (" + warp + ")";
  }

  inline static Block* active_ = nullptr;
  inline static char* stacks_ = nullptr;
  inline static int num_stacks_ = 0;

  std::vector<Thread> threads_;
  size_t shared_bytes_;
  void* shared_ = nullptr;
  std::mt19937 random_;
  ucontext_t scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* body_argument_ = nullptr;
  int me_ = 0;
  int done_ = 0;
  int at_barrier_ = 0;
  int sum_ = 0;
  int result_ = 0;
  std::string failure_;
  [[maybe_unused]] void* scheduler_fake_ = nullptr;
  [[maybe_unused]] const void* scheduler_bottom_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;
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
