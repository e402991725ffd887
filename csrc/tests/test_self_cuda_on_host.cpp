// The stand-in for the CUDA execution model keeps its promises, and says so when a kernel breaks a
// rule.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "common/cuda_async.cuh"
#include "common/cuda_kernel.h"
#include "common/cuda_mma.cuh"
#include "common/float_types.h"

namespace {

using cuda_on_host::all_schedules;
using cuda_on_host::Failure;
using cuda_on_host::launch;
using cuda_on_host::schedule;

constexpr unsigned kFull = 0xffffffffu;

// Exclusive sums over a block, with shuffles inside warps and shared memory between them.
__global__ void block_scan(const int* in, int* out, int n) {
  PRUNEOPS_DYNAMIC_SHARED(int, warp_sums);
  const int t = static_cast<int>(threadIdx.x), lane = t % warpSize, warp = t / warpSize;
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + t;
  const int value = i < n ? in[i] : 0;
  int sum = value;
  for (int delta = 1; delta < warpSize; delta *= 2) {
    const int below = __shfl_up_sync(kFull, sum, static_cast<unsigned>(delta));
    if (lane >= delta) sum += below;
  }
  if (lane == warpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  if (i < n) out[i] = sum - value;
}

void scan_is_right_in_every_order() {
  const int n = 1000, block = 128;
  std::vector<int> in(n), out;
  for (int i = 0; i < n; ++i) in[i] = i * 7 % 13;
  out.assign(n, -1);
  launch(block_scan, dim3((n + block - 1) / block), dim3(block), block / 32 * sizeof(int),
         in.data(), out.data(), n);
  for (int i = 0, sum = 0; i < n; ++i) {
    if (i % block == 0) sum = 0;
    CHECK(out[i] == sum);
    sum += in[i];
  }
}

__global__ void warp_operations(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned* mine = out + lane * 12;
  mine[0] = __ballot_sync(kFull, lane % 3 == 0);
  mine[1] = __any_sync(kFull, lane == 31);
  mine[2] = __all_sync(kFull, lane < 31);
  mine[3] = __shfl_sync(kFull, lane * lane, 5);
  mine[4] = __shfl_xor_sync(kFull, lane, 1);
  mine[5] = __shfl_down_sync(kFull, lane, 4, 8);
  mine[6] = __reduce_add_sync(kFull, static_cast<unsigned>(lane));
  mine[7] = __reduce_max_sync(kFull, lane - 100) == -69;
  // Halves of a warp that take different ways meet among themselves.
  if (lane < 16) {
    mine[8] = __shfl_sync(0x0000ffffu, lane, 3);
  } else {
    __syncwarp(0xffff0000u);
    mine[8] = __shfl_sync(0xffff0000u, lane, 20);
  }
  mine[9] = __shfl_sync(kFull, 1.5, 0) == 1.5;
  mine[10] = __syncthreads_count(lane < 7);
  mine[11] = __syncthreads_or(lane == 2) + 2 * __syncthreads_and(lane == 2);
}

void warp_operations_are_right() {
  std::vector<unsigned> out(32 * 12, 77);
  launch(warp_operations, dim3(1), dim3(32), 0, out.data());
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned* mine = out.data() + lane * 12;
    CHECK(mine[0] == 0x49249249u && mine[1] == 1 && mine[2] == 0 && mine[3] == 25 &&
          mine[4] == (lane ^ 1));
    CHECK(mine[5] == (lane % 8 < 4 ? lane + 4 : lane));
    CHECK(mine[6] == 496 && mine[7] == 1 && mine[8] == (lane < 16 ? 3 : 20) && mine[9] == 1);
    CHECK(mine[10] == 7 && mine[11] == 1);
  }
}

// The block that finishes last adds up what all of them left.
__global__ void last_block_sums(unsigned* partial, unsigned* finished, unsigned long long* total) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) partial[blockIdx.x] = 0;
  __syncthreads();
  atomicAdd(&partial[blockIdx.x], threadIdx.x + blockIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) atomicAdd(total, partial[i]);
}

void the_last_block_sees_all_others() {
  const unsigned blocks = 37, threads = 48;
  std::vector<unsigned> partial(blocks, 99);
  unsigned finished = 0;
  unsigned long long total = 0;
  launch(last_block_sums, dim3(blocks), dim3(threads), 0, partial.data(), &finished, &total);
  CHECK(finished == blocks);
  CHECK(total == blocks * (threads * (threads - 1) / 2) + threads * (blocks * (blocks - 1) / 2));
}

__global__ void atomics(int* sums, unsigned* bits, float* sum, unsigned* claimed) {
  atomicAdd(&sums[0], static_cast<int>(threadIdx.x));
  atomicMax(&sums[1], static_cast<int>(threadIdx.x));
  atomicMin(&sums[2], -static_cast<int>(threadIdx.x));
  atomicOr(bits, 1u << threadIdx.x % 32);
  atomicAdd(sum, 0.5f);
  if (atomicCAS(claimed, 0u, threadIdx.x + 1) == 0u) atomicAdd(&sums[3], 1);
}

void atomics_are_right() {
  int sums[4] = {};
  unsigned bits = 0, claimed = 0;
  float sum = 0;
  launch(atomics, dim3(1), dim3(64), 0, sums, &bits, &sum, &claimed);
  CHECK(sums[0] == 2016 && sums[1] == 63 && sums[2] == -63 && sums[3] == 1);
  CHECK(bits == kFull && sum == 32.0f && claimed >= 1 && claimed <= 64);
}

__global__ void indices(int* out) {
  const dim3& b = blockDim;
  const unsigned thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * (b.x * b.y * b.z) + thread] += 1;
}

void every_thread_of_every_block_runs_once() {
  std::vector<int> out(2 * 3 * 4 * 5 * 2 * 2, 0);
  launch(indices, dim3(2, 3, 4), dim3(5, 2, 2), 0, out.data());
  for (int x : out) CHECK(x == 1);
}

// d = a b + c for matrices of one warp each, times two by a second product on top.
//   a [16, 16], b [16, 8], c and d [16, 8], row by row
template <pruneops::MmaType kType>
__global__ void multiply_twice(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  a += warp * 256, b += warp * 128, c += warp * 128, d += warp * 128;
  const auto word = [](uint16_t low, uint16_t high) {
    return low | static_cast<uint32_t>(high) << 16;
  };
  uint32_t of_a[4], of_b[2];
  float of_d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    of_a[i] = word(a[row * 16 + column], a[row * 16 + column + 1]);
    of_d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i * 8;
    of_b[i] = word(b[row * 8 + g], b[(row + 1) * 8 + g]);
  }
  pruneops::mma_16x8x16<kType>(of_d, of_a, of_b);
  pruneops::mma_16x8x16<kType>(of_d, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = of_d[i];
}

template <pruneops::MmaType kType, class Element>
void tensor_cores_multiply() {
  const int warps = 3;
  std::vector<uint16_t> a(warps * 256), b(warps * 128);
  std::vector<float> c(warps * 128), d(warps * 128, -1.0f);
  // Small whole numbers: exact in every type and sum.
  const auto fill = [](std::vector<uint16_t>& x, int factor) {
    for (size_t i = 0; i < x.size(); ++i) {
      Element e;
      pruneops::from_float(static_cast<float>(static_cast<int>(i * factor % 17) - 8), &e);
      x[i] = e.bits;
    }
  };
  fill(a, 5);
  fill(b, 7);
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i % 11);
  launch(multiply_twice<kType>, dim3(1), dim3(warps * 32), 0, a.data(), b.data(), c.data(),
         d.data());
  for (int w = 0; w < warps; ++w) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float want = c[w * 128 + row * 8 + column];
        for (int k = 0; k < 16; ++k) {
          want += 2 * pruneops::to_float(Element{a[w * 256 + row * 16 + k]}) *
                  pruneops::to_float(Element{b[w * 128 + k * 8 + column]});
        }
        CHECK(d[w * 128 + row * 8 + column] == want);
      }
    }
  }
}

void tensor_cores_cut_sums_off_towards_zero() {
  CHECK(cuda_on_host::cut_off(1.0 + 0x1p-24 + 0x1p-25) == 1.0f);
  CHECK(cuda_on_host::cut_off(-1.0 - 0x1p-24 - 0x1p-25) == -1.0f);
  CHECK(cuda_on_host::cut_off(1.0 - 0x1p-30) == 1.0f - 0x1p-24f);
  CHECK(cuda_on_host::cut_off(0.0) == 0.0f && cuda_on_host::cut_off(3.5) == 3.5f);
  CHECK(cuda_on_host::cut_off(1e300) == 0x1.fffffep127f);
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(cuda_on_host::cut_off(infinity) > 0x1.fffffep127f);
  CHECK(std::isnan(cuda_on_host::cut_off(infinity - infinity)));
}

// Four matrices, one below the other in shared memory, element (row, column) of matrix i being
// 64 i + 8 row + column; out [32, 12], what load_matrices of four, of two, and transposed of four
// give.
__global__ void load_four_matrices(uint32_t* out) {
  PRUNEOPS_DYNAMIC_SHARED(uint16_t, x);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) x[i] = static_cast<uint16_t>(i);
  __syncthreads();
  uint32_t four[4], two[2], transposed[4], two_transposed[2];
  pruneops::load_matrices(four, x + lane * 8);
  // Lanes past 15 name no row.
  pruneops::load_matrices(two, lane < 16 ? x + lane * 8 : nullptr);
  pruneops::load_matrices_transposed(transposed, x + lane * 8);
  pruneops::load_matrices_transposed(two_transposed, lane < 16 ? x + lane * 8 : nullptr);
  for (int i = 0; i < 4; ++i) out[lane * 12 + i] = four[i];
  for (int i = 0; i < 2; ++i) out[lane * 12 + 4 + i] = two[i];
  for (int i = 0; i < 4; ++i) out[lane * 12 + 6 + i] = transposed[i];
  for (int i = 0; i < 2; ++i) out[lane * 12 + 10 + i] = two_transposed[i];
}

void matrices_are_loaded() {
  std::vector<uint32_t> out(32 * 12, 77);
  launch(load_four_matrices, dim3(1), dim3(32), 4 * 128, out.data());
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t first = 64 * i + 8 * g + 2 * t, across = 64 * i + 16 * t + g;
      const uint32_t row_by_row = first | (first + 1) << 16;
      const uint32_t transposed = across | (across + 8) << 16;
      CHECK(out[lane * 12 + i] == row_by_row && out[lane * 12 + 6 + i] == transposed);
      if (i < 2) CHECK(out[lane * 12 + 4 + i] == row_by_row);
      if (i < 2) CHECK(out[lane * 12 + 10 + i] == transposed);
    }
  }
}

// Rows `pitch` bytes apart.
__global__ void load_with_pitch(int pitch) {
  PRUNEOPS_DYNAMIC_SHARED(unsigned char, x);
  uint32_t r[4];
  pruneops::load_matrices(r, x + static_cast<int>(threadIdx.x) % 8 * pitch);
}

void bank_conflicts_are_counted() {
  const auto conflicts = [](int pitch) {
    const int64_t before = cuda_on_host::bank_conflicts;
    launch(load_with_pitch, dim3(1), dim3(32), 2048, pitch);
    return cuda_on_host::bank_conflicts - before;
  };
  CHECK(conflicts(16) == 0 && conflicts(128 + 16) == 0 && conflicts(0) == 0);
  CHECK(conflicts(32) == 4 && conflicts(64) == 12 && conflicts(128) == 28);
}

void pairs_are_packed() {
  using pruneops::MmaType;
  CHECK(pruneops::pack_pair<MmaType::kBFloat16>(1.0f, -2.0f) == 0xc0003f80u);
  CHECK(pruneops::pack_pair<MmaType::kFloat16>(1.0f, -2.0f) == 0xc0003c00u);
  // Halfway: to the even one.
  CHECK(pruneops::pack_pair<MmaType::kBFloat16>(1.0f + 0x1p-8f, 1.0f + 0x3p-8f) == 0x3f823f80u);
  CHECK(pruneops::pack_pair<MmaType::kFloat16>(1.0f + 0x1p-11f, 1.0f + 0x3p-11f) == 0x3c023c00u);
}

// out[i] = in[i], 0 from `count` on, 4 a thread, through a ring of two stages in shared memory; a
// thread reads what its neighbour copied.
__global__ void copy_in_stages(const float* in, int steps, int count, float* out) {
  PRUNEOPS_DYNAMIC_SHARED(float, ring);
  const int t = static_cast<int>(threadIdx.x), width = 4 * static_cast<int>(blockDim.x);
  const auto begin = [&](int step) {
    const int i = step * width + 4 * t;
    if (step < steps) {
      pruneops::copy_16_bytes_async(ring + step % 2 * width + 4 * t, in + i, i < count);
    }
    pruneops::commit_copies();
  };
  begin(0);
  for (int step = 0; step < steps; ++step) {
    begin(step + 1);
    pruneops::wait_for_copies<1>();
    __syncthreads();
    const int neighbour = 4 * ((t + 1) % static_cast<int>(blockDim.x));
    for (int i = 0; i < 4; ++i)
      out[step * width + neighbour + i] = ring[step % 2 * width + neighbour + i];
    __syncthreads();
  }
}

void asynchronous_copies_arrive() {
  const int threads = 64, steps = 5, count = 4 * threads * 4 + 20;
  std::vector<float> in(count), out(4 * threads * steps, -1.0f);  // no more of `in` is read
  for (int i = 0; i < count; ++i) in[i] = static_cast<float>(i + 1);
  launch(copy_in_stages, dim3(1), dim3(threads), 2 * 4 * threads * sizeof(float), in.data(), steps,
         count, out.data());
  for (int i = 0; i < static_cast<int>(out.size()); ++i) CHECK(out[i] == (i < count ? in[i] : 0));
}

// Each of these breaks a rule.
alignas(16) int source_of_copies[8] = {1, 2, 3, 4, 5, 6, 7, 8};

__global__ void copy_not_waited_for(int* x) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  if (threadIdx.x == 0) pruneops::copy_16_bytes_async(shared, source_of_copies, true);
  pruneops::commit_copies();
  *x = 1;
}

__global__ void copy_not_committed(int* x) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  if (threadIdx.x == 0) pruneops::copy_16_bytes_async(shared, source_of_copies, true);
  pruneops::wait_for_copies<0>();
  *x = 1;
}

__global__ void copy_to_misaligned(int*) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  pruneops::copy_16_bytes_async(shared + 2, source_of_copies, true);
}

__global__ void copy_from_misaligned(int*) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  pruneops::copy_16_bytes_async(shared, source_of_copies + 1, true);
}

__global__ void copy_to_own_stack(int*) {
  alignas(16) int own[4];
  pruneops::copy_16_bytes_async(own, source_of_copies, true);
}

__global__ void copy_written_over(int*) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  pruneops::copy_16_bytes_async(shared, source_of_copies, false);
  pruneops::commit_copies();
  shared[3] = 5;
  pruneops::wait_for_copies<0>();
}

__global__ void copy_of_changing_source(int* x) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  if (threadIdx.x != 0) return;
  pruneops::copy_16_bytes_async(shared, source_of_copies, true);
  pruneops::commit_copies();
  ++source_of_copies[0];
  pruneops::wait_for_copies<0>();
  *x = 1;
}

__global__ void matrices_from_misaligned(int*) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  uint32_t r[2];
  pruneops::load_matrices(r, shared + (threadIdx.x == 7 ? 1 : 0));
}

__global__ void matrices_from_own_stack(int*) {
  alignas(16) int own[4] = {};
  uint32_t r[4];
  pruneops::load_matrices(r, own);
}

__global__ void lane_missing_from_load(int* x) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  uint32_t r[4] = {};
  if (threadIdx.x != 30) pruneops::load_matrices_transposed(r, shared);
  *x = static_cast<int>(r[0]);
}

__global__ void different_types_of_product(int* x) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) {
    pruneops::mma_16x8x16<pruneops::MmaType::kBFloat16>(d, a, b);
  } else {
    pruneops::mma_16x8x16<pruneops::MmaType::kFloat16>(d, a, b);
  }
  *x = static_cast<int>(d[0]);
}

__global__ void waits_for_what_never_comes(int* x) {
  cuda_on_host::Block::current().wait_until("an event", [=] { return *x == 1; });
}

__global__ void lane_missing_from_product(int* x) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x != 4) pruneops::mma_16x8x16<pruneops::MmaType::kBFloat16>(d, a, b);
  *x = static_cast<int>(d[0]);
}

__global__ void some_return_before_the_barrier(int* x) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  *x = 1;
}

__global__ void different_barriers(int* x) {
  if (threadIdx.x < 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  *x = 1;
}

__global__ void lane_missing_from_shuffle(int* x) {
  if (threadIdx.x == 9) {
    __syncthreads();
  } else {
    *x = __shfl_sync(kFull, 1, 0);
  }
}

__global__ void reads_lane_that_returned(int* x) {
  if (threadIdx.x == 0) return;
  *x = __shfl_sync(kFull, 1, 0);
}

__global__ void different_masks(int* x) { *x = __shfl_sync(threadIdx.x == 1 ? 0x3u : kFull, 1, 0); }

__global__ void caller_not_in_mask(int* x) { *x = __shfl_sync(1u, 1, 0); }

bool fails_with(void (*kernel)(int*), const std::string& expected) {
  int x = 0;
  try {
    launch(kernel, dim3(2), dim3(32), 64, &x);
  } catch (const Failure& failure) {
    return std::string(failure.what()).find(expected) != std::string::npos;
  }
  return false;
}

void broken_rules_are_reported() {
  CHECK(fails_with(some_return_before_the_barrier,
                   "deadlock: of 32 threads 1 have returned, 31 wait at a barrier"));
  CHECK(fails_with(different_barriers, "different barriers"));
  CHECK(fails_with(lane_missing_from_shuffle,
                   "deadlock: of 32 threads 0 have returned, 1 wait at a barrier"));
  CHECK(fails_with(reads_lane_that_returned, "reads lane 0, which takes no part"));
  CHECK(fails_with(different_masks, "different operations or masks"));
  CHECK(fails_with(caller_not_in_mask, "the caller is not in its mask"));
  CHECK(fails_with(different_types_of_product, "different operations or masks"));
  CHECK(fails_with(lane_missing_from_load, "ldmatrix x4 trans needs all lanes of the warp"));
  CHECK(fails_with(matrices_from_misaligned, "reads a row that is not on 16 bytes"));
  CHECK(fails_with(matrices_from_own_stack, "reads memory that is not shared"));
  CHECK(fails_with(copy_not_waited_for, "returns before its asynchronous copies arrived"));
  CHECK(fails_with(copy_not_committed, "returns before its asynchronous copies arrived"));
  CHECK(fails_with(copy_to_misaligned, "copy to an address that is not on 16 bytes"));
  CHECK(fails_with(copy_from_misaligned, "copy from an address that is not on 16 bytes"));
  CHECK(fails_with(copy_to_own_stack, "copy to memory that is not shared"));
  CHECK(fails_with(copy_written_over, "was written before it had arrived"));
  CHECK(fails_with(copy_of_changing_source, "source of an asynchronous copy changed"));
  CHECK(fails_with(waits_for_what_never_comes, "32 wait for an event (an event)"));
  CHECK(fails_with(lane_missing_from_product, "mma of bfloat16 needs all lanes of the warp"));
}

// A missing barrier: which value thread 0 finds depends on the order of threads.
__global__ void missing_barrier(int* out) {
  PRUNEOPS_DYNAMIC_SHARED(int, x);
  if (threadIdx.x == 1) *x = 5;
  if (threadIdx.x == 0) *out = *x;
}

void a_missing_barrier_shows() {
  bool found_written = false, found_poison = false;
  for (const auto& s : all_schedules()) {
    schedule = s;
    int out = 0;
    launch(missing_barrier, dim3(1), dim3(32), sizeof(int), &out);
    found_written |= out == 5;
    found_poison |= out == -1;
  }
  CHECK(found_written && found_poison);
}

// The same between warps that have more and less to do before they come to it.
__global__ void missing_barrier_between_warps(int* out) {
  PRUNEOPS_DYNAMIC_SHARED(int, x);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < 2 + 2 * warp; ++i) __syncwarp();
  if (threadIdx.x == 0) *x = 5;
  if (threadIdx.x == 32) *out = *x;
}

void shuffled_warps_drift_apart() {
  bool found_written = false, found_poison = false;
  for (unsigned seed = 0; seed < 100; ++seed) {
    schedule = {cuda_on_host::Order::kShuffled, cuda_on_host::Order::kForward, seed};
    int out = 0;
    launch(missing_barrier_between_warps, dim3(1), dim3(64), sizeof(int), &out);
    found_written |= out == 5;
    found_poison |= out == -1;
  }
  CHECK(found_written && found_poison);
}

// What a thread finds of its own copy before and behind the wait, and of its neighbour's copy with
// and without a barrier.
//   out  [32, 4]
__global__ void read_copies(const int* in, int* out) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  const int t = static_cast<int>(threadIdx.x), neighbour = (t + 1) % 32;
  pruneops::copy_16_bytes_async(shared + 4 * t, in + 4 * t, true);
  pruneops::commit_copies();
  out[4 * t] = shared[4 * t];
  pruneops::wait_for_copies<0>();
  out[4 * t + 1] = shared[4 * t];
  out[4 * t + 2] = shared[4 * neighbour];
  __syncthreads();
  out[4 * t + 3] = shared[4 * neighbour];
}

void missing_waits_show() {
  struct alignas(16) Four {
    int x[4];
  };
  std::vector<Four> in(32);
  for (int t = 0; t < 32; ++t) in[t].x[0] = 10 + t;
  for (const auto& s : all_schedules()) {
    schedule = s;
    std::vector<int> out(128, 0);
    launch(read_copies, dim3(1), dim3(32), 512, in[0].x, out.data());
    bool poison = false;
    for (int t = 0; t < 32; ++t) {
      CHECK(out[4 * t] == -1 && out[4 * t + 1] == 10 + t && out[4 * t + 3] == 10 + (t + 1) % 32);
      poison |= out[4 * t + 2] == -1;
    }
    CHECK(poison);
  }
}

// A buffer that is filled again while others may still read it.
__global__ void missing_barrier_before_copy(const int* in, int* out) {
  PRUNEOPS_DYNAMIC_SHARED(int, shared);
  for (int step = 0; step < 2; ++step) {
    if (threadIdx.x == 20) {
      pruneops::copy_16_bytes_async(shared, in, true);
      pruneops::commit_copies();
      pruneops::wait_for_copies<0>();
    }
    __syncthreads();
    if (threadIdx.x == 40) out[step] = *shared;
    if (threadIdx.x == 20 && step == 1) pruneops::copy_16_bytes_async(shared, in, true);
    pruneops::commit_copies();
    __syncthreads();
  }
  pruneops::wait_for_copies<0>();
}

void filling_a_buffer_too_early_shows() {
  bool found_data = false, found_poison = false;
  alignas(16) const int in[4] = {3, 3, 3, 3};
  for (const auto& s : all_schedules()) {
    schedule = s;
    int out[2] = {};
    launch(missing_barrier_before_copy, dim3(1), dim3(64), 64, in, out);
    CHECK(out[0] == 3);
    found_data |= out[1] == 3;
    found_poison |= out[1] == -1;
  }
  CHECK(found_data && found_poison);
}

}  // namespace

int main() {
  for (const auto& s : all_schedules()) {
    schedule = s;
    scan_is_right_in_every_order();
    warp_operations_are_right();
    the_last_block_sees_all_others();
    atomics_are_right();
    every_thread_of_every_block_runs_once();
    tensor_cores_multiply<pruneops::MmaType::kBFloat16, pruneops::BFloat16>();
    tensor_cores_multiply<pruneops::MmaType::kFloat16, pruneops::Half>();
    matrices_are_loaded();
    asynchronous_copies_arrive();
    broken_rules_are_reported();
  }
  tensor_cores_cut_sums_off_towards_zero();
  bank_conflicts_are_counted();
  pairs_are_packed();
  a_missing_barrier_shows();
  missing_waits_show();
  filling_a_buffer_too_early_shows();
  shuffled_warps_drift_apart();
  return 0;
}
