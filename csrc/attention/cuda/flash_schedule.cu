// The launch that every pass over ragged segments begins with: boundaries that may be relied on,
// segments in order of work, tiles counted.

#include "attention/cuda/flash_schedule.cuh"

namespace pruneops {
namespace {

constexpr int kScheduleThreads = 512;
static_assert(kWorkClasses <= kScheduleThreads, "one thread a class");

// Segment i of the num_segments of the batch, then the rows (or keys) before all of them and those
// after, which meet no keys (or queries).
__device__ __forceinline__ SegmentRecord record_of(const FlashSegments& s, const FlashOrder& order,
                                                   const int32_t* bounds, int64_t i) {
  const int64_t b = s.num_segments;
  const int32_t *q = bounds, *k = bounds + b + 1;
  if (i < b) {
    const int32_t rows = q[i + 1] - q[i];
    if (s.seqused_k == nullptr) return {q[i], rows, k[i], k[i + 1] - k[i]};
    const int64_t used = at_most(at_least<int64_t>(s.seqused_k[i], 0), s.capacity);
    return {q[i], rows, static_cast<int32_t>(i), static_cast<int32_t>(used)};
  }
  const int32_t* of = order.keys ? k : q;
  const int32_t total = static_cast<int32_t>(order.keys ? s.total_k : s.total_q);
  const int32_t begin = i == b ? 0 : of[b], end = i == b ? of[0] : total;
  if (order.keys) return {0, 0, begin, end - begin};
  return {begin, end - begin, 0, 0};
}

// One block for each order.
__global__ void __launch_bounds__(kScheduleThreads)
    flash_schedule_kernel(FlashSegments segments, FlashOrder first, FlashOrder second) {
  __shared__ int32_t in_class[kScheduleThreads];  // segments; then where the class's next one goes
  __shared__ uint32_t warp_sums[kMaxWarps];
  const FlashOrder order = blockIdx.x == 0 ? first : second;
  const FlashSchedule schedule(order.scratch, segments.num_segments);
  const bool slots = segments.seqused_k != nullptr;
  const int64_t num_bounds = segments.num_segments + 1;
  const int t = static_cast<int>(threadIdx.x);

  in_class[t] = 0;
  clamp_boundaries<kScheduleThreads>(segments.cu_seqlens_q, num_bounds, segments.total_q,
                                     schedule.bounds);
  if (!slots) {
    clamp_boundaries<kScheduleThreads>(segments.cu_seqlens_k, num_bounds, segments.total_k,
                                       schedule.bounds + num_bounds);
  }
  __syncthreads();

  for (int64_t i = t; i < schedule.num_records; i += kScheduleThreads) {
    const SegmentRecord record = record_of(segments, order, schedule.bounds, i);
    atomicAdd(&in_class[work_class(segment_of(record, slots), order)], 1);
  }
  __syncthreads();
  const uint32_t before = block_exclusive_sum(in_class[t], warp_sums);
  __syncthreads();
  in_class[t] = static_cast<int32_t>(before);
  __syncthreads();
  for (int64_t i = t; i < schedule.num_records; i += kScheduleThreads) {
    const SegmentRecord record = record_of(segments, order, schedule.bounds, i);
    const int place = atomicAdd(&in_class[work_class(segment_of(record, slots), order)], 1);
    schedule.records[place] = record;
  }
  __syncthreads();

  int32_t tiles_before = 0;
  for (int64_t begin = 0; begin < schedule.num_records; begin += kScheduleThreads) {
    const int64_t i = begin + t;
    const bool exists = i < schedule.num_records;
    const int32_t tiles =
        static_cast<int32_t>(exists ? tiles_of(segment_of(schedule.records[i], slots), order) : 0);
    const int32_t first_tile =
        tiles_before + static_cast<int32_t>(block_exclusive_sum(tiles, warp_sums));
    if (exists) schedule.first_tile[i] = first_tile;
    if (t == kScheduleThreads - 1) in_class[0] = first_tile + tiles;
    __syncthreads();
    tiles_before = in_class[0];
  }
  if (t == 0) {
    schedule.first_tile[schedule.num_records] = tiles_before;
    *schedule.num_tiles = tiles_before;
    *schedule.next_item = 0;
  }
}

}  // namespace

cudaError_t launch_flash_schedule(const FlashSegments& segments, const FlashOrder* orders,
                                  int num_orders, cudaStream_t stream) {
  return launch_kernel(flash_schedule_kernel, dim3(static_cast<unsigned>(num_orders)),
                       dim3(kScheduleThreads), 0, stream, segments, orders[0],
                       orders[num_orders - 1]);
}

}  // namespace pruneops
