// Plan, workspace and launch of the selection kernels.

#include "selection/cuda/select.cuh"

namespace pruneops {
namespace {

// Shared memory of a block that does not ask for more, and the part of it that is not for keys: the
// static variables with room for alignment.
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kStaticBytes = 9 * 1024;
static_assert(sizeof(SelectShared) + 128 <= kStaticBytes, "the keys do not fit");

// From here on several blocks are faster than one, however much of a segment one could hold.
constexpr int64_t kMostRowsOfBlock = 16384;
constexpr int64_t kStretchRows = 4096;

constexpr int kPrepareThreads = 256;
// 16 bytes each, that a block clears, and the most blocks that do.
constexpr int64_t kClearedByBlock = 4 * kPrepareThreads;
constexpr int64_t kMostClearingBlocks = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }

int64_t keys_in(int64_t shared_bytes) {
  return (shared_bytes - kStaticBytes) / static_cast<int64_t>(sizeof(uint32_t)) - kKeyPadding;
}

// Keys that each block holds. Where every block has a multiprocessor to itself it may take more
// shared memory than all blocks may have anyway. The host does not know the lengths, only that few
// segments are more than four times as long as the average.
int64_t key_capacity(const CudaSelectParams& p) {
  const int64_t fit = keys_in(p.num_segments <= p.num_sms ? p.max_shared_bytes : kSharedBytes);
  const int64_t likely = p.num_segments > 4 ? p.total / p.num_segments * 4 : p.total;
  const int64_t wanted = at_least(at_most(likely, kMostRowsOfBlock), keys_in(kSharedBytes));
  return at_most(at_most(wanted, fit), p.total);
}

// More threads pay off as long as each has a few rows; many short segments share a multiprocessor.
int32_t num_threads(const CudaSelectParams& p) {
  const int64_t rows = p.total / at_least(p.num_segments, 1);
  if (rows <= 256) return 128;
  if (rows <= 1024) return 256;
  return rows <= 8192 ? 512 : 1024;
}

// Gives out the workspace from front to back; without one it only counts.
struct Allocator {
  char* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* place = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return place;
  }
};

struct Layout {
  SelectWork work;
  int64_t cleared_bytes;
  int64_t bytes;
};

Layout lay_out(const CudaSelectParams& p, const CudaSelectPlan& plan, void* workspace) {
  Layout layout{};
  SelectWork& w = layout.work;
  w.key_capacity = plan.key_capacity;
  w.stretch_rows = plan.stretch_rows;
  w.max_long = plan.max_long;
  Allocator all{static_cast<char*>(workspace), 0};
  w.ticket = all.take<unsigned long long>(1);
  w.segment_progress = all.take<unsigned long long>(p.num_segments);
  w.stretch_progress = all.take<unsigned long long>(plan.max_stretches);
  w.states = all.take<LongState>(plan.max_long);
  w.bins = all.take<uint32_t>(plan.max_long * kNumBins);
  layout.cleared_bytes = all.used;
  w.long_segments = all.take<LongSegment>(plan.max_long);
  w.totals = all.take<LongTotals>(1);
  w.bounds = all.take<int32_t>(p.num_segments + 1);
  layout.bytes = all.used;
  return layout;
}

// The plan for these sizes of blocks and stretches.
CudaSelectPlan plan_with(const CudaSelectParams& p, int32_t num_threads, int64_t key_capacity,
                         int64_t stretch_rows) {
  CudaSelectPlan plan{};
  plan.num_threads = num_threads;
  plan.key_capacity = key_capacity;
  plan.stretch_rows = at_most(stretch_rows, key_capacity);
  if (p.num_segments > 0) plan.max_long = p.total / (key_capacity + 1);
  // The last stretch of each long segment need not be full.
  if (plan.max_long > 0) plan.max_stretches = p.total / plan.stretch_rows + plan.max_long;
  if (p.num_segments > 1 || plan.max_long > 0) {
    plan.workspace_bytes = lay_out(p, plan, nullptr).bytes;
  }
  return plan;
}

template <typename Score>
cudaError_t launch(const CudaSelectParams& p, const CudaSelectPlan& plan, const SelectWork& work,
                   cudaStream_t stream) {
  const int64_t blocks = at_least(p.num_segments, 1) + (kNumDigits + 1) * plan.max_stretches;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(select_kernel<Score>, dim3(static_cast<unsigned>(blocks)),
                       dim3(plan.num_threads), (plan.key_capacity + kKeyPadding) * sizeof(uint32_t),
                       stream, p, work);
}

}  // namespace

CudaSelectPlan plan_select(const CudaSelectParams& p) {
  return plan_with(p, num_threads(p), key_capacity(p), kStretchRows);
}

cudaError_t launch_select(const CudaSelectParams& p, const CudaSelectPlan& plan, void* workspace,
                          cudaStream_t stream) {
  SelectWork work{};
  work.key_capacity = plan.key_capacity;
  if (plan.workspace_bytes > 0) {
    const Layout layout = lay_out(p, plan, workspace);
    work = layout.work;
    const int64_t num_clear = layout.cleared_bytes / static_cast<int64_t>(sizeof(uint4));
    const int64_t clearing = at_most(ceil_div(num_clear, kClearedByBlock), kMostClearingBlocks);
    const cudaError_t error = launch_kernel(
        prepare_select_kernel, dim3(static_cast<unsigned>(1 + clearing)), dim3(kPrepareThreads), 0,
        stream, p, work, reinterpret_cast<uint4*>(work.ticket), num_clear);
    if (error != cudaSuccess) return error;
  }
  switch (p.score_type) {
    case FloatType::kBFloat16:
      return launch<BFloat16>(p, plan, work, stream);
    case FloatType::kFloat16:
      return launch<Half>(p, plan, work, stream);
    default:
      return launch<float>(p, plan, work, stream);
  }
}

}  // namespace pruneops
