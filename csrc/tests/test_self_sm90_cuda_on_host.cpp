// The stand-in for Hopper's asynchronous operations computes what they do, and says so when a
// kernel breaks a rule. What the bits of descriptors and the swizzles mean is checked against CuTe,
// in csrc/tests/cute.

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "common/cuda_kernel.h"
#include "common/float_types.h"
#include "common/sm90_copies.cuh"
#include "common/sm90_mma.cuh"

namespace {

using cuda_on_host::all_schedules;
using cuda_on_host::Failure;
using cuda_on_host::launch;
using cuda_on_host::schedule;
using namespace pruneops;

constexpr int kKeys = 80;

// Tiles of one warpgroup, and two barriers behind them.
template <int kHeadDim>
struct Layout {
  using Queries = PanelTile<64, kHeadDim>;
  using Keys = PanelTile<kKeys, kHeadDim>;
  static constexpr int kQueries = 0;
  static constexpr int kFirstKeys = Queries::kBytes;
  // Tiles begin on 1024 bytes.
  static constexpr int kValues = kFirstKeys + (Keys::kBytes + 1023) / 1024 * 1024;
  static constexpr int kBarriers = kValues + (Keys::kBytes + 1023) / 1024 * 1024;
  static constexpr int kBytes = kBarriers + 64;
};

// out = (q k^T) v for the rows that `at` names; the scores are rounded to the type in between.
//   out  [64, kHeadDim]
template <MmaType kType, int kHeadDim>
__global__ void two_products(const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map, RowsAt q_at, RowsAt k_at,
                             float* out) {
  using L = Layout<kHeadDim>;
  PRUNEOPS_SWIZZLED_SHARED(memory);
  unsigned char* q = memory + L::kQueries;
  unsigned char* k = memory + L::kFirstKeys;
  unsigned char* v = memory + L::kValues;
  auto* loaded = reinterpret_cast<uint64_t*>(memory + L::kBarriers);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    make_barrier(&loaded[0], 1);
    make_barrier(&loaded[1], 1);
    publish_barriers();
  }
  __syncthreads();
  if (thread == 0) {
    arrive_expecting(&loaded[0], L::Queries::kBytes + L::Keys::kBytes);
    load_rows_async<typename L::Queries>(q, &q_map, &loaded[0], q_at);
    load_rows_async<typename L::Keys>(k, &k_map, &loaded[0], k_at);
    load_rows_async<typename L::Keys>(v, &k_map, &loaded[1], k_at);
    arrive_expecting(&loaded[1], L::Keys::kBytes);
  }
  wait_for_phase(&loaded[0], 0);
  float s[kKeys / 2];
  fence_products(s);
  for (int step = 0; step < kHeadDim / 16; ++step) {
    multiply<kType, kKeys, Operand::kRows>(s, rows_operand<typename L::Queries>(q, 0, step),
                                           rows_operand<typename L::Keys>(k, 0, step), step > 0);
  }
  commit_products();
  wait_for_products<0>(s);
  uint32_t p[kKeys / 16][4];
  for (int step = 0; step < kKeys / 16; ++step) {
    for (int i = 0; i < 4; ++i) {
      p[step][i] = pack_pair<kType>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
    }
  }
  wait_for_phase(&loaded[1], 0);
  float o[kHeadDim / 2];
  fence_products(o);
  for (int step = 0; step < kKeys / 16; ++step) {
    multiply<kType, kHeadDim, Operand::kColumns>(
        o, p[step], columns_operand<typename L::Keys>(v, step), step > 0);
  }
  commit_products();
  wait_for_products<0>(o);
  for (int i = 0; i < kHeadDim / 2; ++i) {
    out[fragment_row(thread, i) * kHeadDim + fragment_column(thread, i)] = o[i];
  }
}

template <MmaType kType, class Element, int kHeadDim>
void products_are_right() {
  using L = Layout<kHeadDim>;
  constexpr int kSlots = 2, kRows = 150, kHeads = 3;
  constexpr int kRowStride = kHeads * kHeadDim + 16, kSlotStride = kRows * kRowStride + 8;
  std::vector<uint16_t> x(kSlots * kSlotStride + 8);
  for (size_t i = 0; i < x.size(); ++i) {
    Element e;  // exact in every sum below
    from_float(static_cast<float>(static_cast<int>(i * 7 % 11 + i / 64 % 5) - 7) / 8, &e);
    x[i] = e.bits;
  }
  const int heads = 3, q_head = 2, k_head = 1, slot = 1;
  const RowsAt q_at{5, 64, q_head, slot}, k_at{100, 37, k_head, slot};
  const auto at = [&](const RowsAt& rows, int row, int column) -> float {
    if (row >= rows.valid) return 0;
    return to_float(Element{x[rows.slot * kSlotStride + (rows.row + row) * kRowStride +
                              rows.head * kHeadDim + column]});
  };
  // What a tile must not read is NaN.
  for (int row = k_at.row + k_at.valid; row < kRows; ++row) {
    for (int i = 0; i < kRowStride; ++i) x[slot * kSlotStride + row * kRowStride + i] = 0xffff;
  }
  const RowsTensor tensor{x.data(), kSlots, kRows, heads, kSlotStride, kRowStride, kHeadDim};
  TensorMap q_map, k_map;
  CHECK(make_tensor_map<typename L::Queries>(&q_map, tensor) == cudaSuccess);
  CHECK(make_tensor_map<typename L::Keys>(&k_map, tensor) == cudaSuccess);
  std::vector<float> out(64 * kHeadDim, -1.0f);
  launch(two_products<kType, kHeadDim>, dim3(1), dim3(128), L::kBytes, q_map, k_map, q_at, k_at,
         out.data());
  std::vector<float> scores(64 * kKeys);
  for (int row = 0; row < 64; ++row) {
    for (int key = 0; key < kKeys; ++key) {
      float sum = 0;
      for (int i = 0; i < kHeadDim; ++i) sum += at(q_at, row, i) * at(k_at, key, i);
      Element e;
      from_float(sum, &e);
      scores[row * kKeys + key] = to_float(e);
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int i = 0; i < kHeadDim; ++i) {
      double sum = 0;
      for (int key = 0; key < kKeys; ++key) {
        sum += double{scores[row * kKeys + key]} * at(k_at, key, i);
      }
      CHECK(out[row * kHeadDim + i] == static_cast<float>(sum));
    }
  }
}

// Rows [row, row + valid) and zeros behind them, whatever lies before and behind in memory.
using SmallTile = PanelTile<16, 96>;

__global__ void copy_tile(const __grid_constant__ TensorMap map, RowsAt at, uint16_t* out) {
  PRUNEOPS_SWIZZLED_SHARED(memory);
  auto* loaded = reinterpret_cast<uint64_t*>(memory + SmallTile::kBytes);
  if (threadIdx.x == 0) {
    make_barrier(loaded, 1);
    publish_barriers();
    arrive_expecting(loaded, SmallTile::kBytes);
    load_rows_async<SmallTile>(memory, &map, loaded, at);
  }
  __syncthreads();
  wait_for_phase(loaded, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 96; i += 32) {
    memcpy(&out[i], memory + SmallTile::offset(i / 96, i % 96), 2);
  }
}

void tiles_end_where_their_rows_end() {
  constexpr int kRows = 21, kHeads = 2, kStride = kHeads * 96;
  std::vector<uint16_t> x(kRows * kStride);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i + 1);
  TensorMap map;
  CHECK(make_tensor_map<SmallTile>(&map, {x.data(), 1, kRows, kHeads, 0, kStride, 96}) ==
        cudaSuccess);
  const RowsAt cases[] = {{0, 16, 0, 0}, {0, 1, 1, 0},  {20, 1, 1, 0}, {21, 0, 0, 0},
                          {3, 0, 0, 0},  {5, 16, 1, 0}, {13, 8, 0, 0}, {7, 11, 1, 0}};
  for (const RowsAt& at : cases) {
    std::vector<uint16_t> out(16 * 96, 0xffff);
    launch(copy_tile, dim3(1), dim3(32), SmallTile::kBytes + 8, map, at, out.data());
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < 96; ++i) {
        const int want = row < at.valid ? (at.row + row) * kStride + at.head * 96 + i + 1 : 0;
        CHECK(out[row * 96 + i] == want);
      }
    }
  }
}

void illegal_tensors_are_refused() {
  alignas(16) uint16_t x[64] = {};
  TensorMap map;
  CHECK(make_tensor_map<SmallTile>(&map, {x + 1, 1, 1, 1, 0, 96, 96}) != cudaSuccess);
  CHECK(make_tensor_map<SmallTile>(&map, {x, 1, 1, 1, 0, 100, 96}) != cudaSuccess);
  CHECK(make_tensor_map<SmallTile>(&map, {x, 1, 1, 2, 0, 192, 97}) != cudaSuccess);
  // A stride that is not used may be anything.
  CHECK(make_tensor_map<SmallTile>(&map, {x, 1, 1, 1, 3, 96, 1}) == cudaSuccess);
}

// A warp that produces numbers and a warpgroup that sums them, over a ring of two places.
__global__ void ring(int count, int* out) {
  PRUNEOPS_SWIZZLED_SHARED(memory);
  auto* full = reinterpret_cast<uint64_t*>(memory);
  uint64_t* empty = full + 2;
  int* places = reinterpret_cast<int*>(empty + 2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) make_barrier(&full[i], 1), make_barrier(&empty[i], 128);
    publish_barriers();
  }
  __syncthreads();
  RingPosition<2> at;
  if (threadIdx.x >= 128) {
    for (int i = 0; i < count; ++i, at.advance()) {
      wait_for_phase(&empty[at.stage], at.parity ^ 1);
      __syncwarp();
      if (threadIdx.x == 128) {
        places[at.stage] = i;
        arrive(&full[at.stage]);
      }
    }
    arrive_at_named_barrier(3, 160);
  } else {
    int sum = 0;
    for (int i = 0; i < count; ++i, at.advance()) {
      wait_for_phase(&full[at.stage], at.parity);
      sum += places[at.stage];
      arrive(&empty[at.stage]);
    }
    sync_named_barrier(3, 160);
    out[threadIdx.x] = sum;
  }
}

void a_ring_hands_over_everything() {
  std::vector<int> out(128, -1);
  launch(ring, dim3(1), dim3(160), 64, 11, out.data());
  for (int x : out) CHECK(x == 55);
}

// One warpgroup with a product of two tiles of ones, which `broken` spoils in one way.
enum class Broken {
  kNothing,
  kNoWaitForCopy,
  kWritesDuringCopy,
  kTooFewBytes,
  kNoFenceOfStores,
  kNoFenceOfProducts,
  kNoCommit,
  kWritesOperand,
  kWritesAccumulator,
  kReadsTooEarly,
  kOtherOperand,
  kWarpMissing,
  kTwiceMade,
  kNotPublished,
  kNeverArrives,
  kNamedBarrierAlone,
  kNamesPending,
};

__global__ void breaks_a_rule(const __grid_constant__ TensorMap map, Broken broken, float* out) {
  using Tile = PanelTile<64, 64>;
  constexpr MmaType kType = MmaType::kBFloat16;
  PRUNEOPS_SWIZZLED_SHARED(memory);
  auto* loaded = reinterpret_cast<uint64_t*>(memory + 2 * Tile::kBytes);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    make_barrier(loaded, 1);
    if (broken == Broken::kTwiceMade) make_barrier(loaded, 1);
    if (broken != Broken::kNotPublished) publish_barriers();
  }
  __syncthreads();
  if (thread == 0 && broken != Broken::kNeverArrives) {
    const int missing = broken == Broken::kTooFewBytes ? 16 : 0;
    load_rows_async<Tile>(memory, &map, loaded, {0, 64, 0, 0});
    arrive_expecting(loaded, Tile::kBytes - missing);
    if (broken == Broken::kWritesDuringCopy) memory[5] = 1;
  }
  // The other tile comes from the threads.
  for (int i = thread; i < 64 * 64; i += 128) {
    const uint16_t one = 0x3f80;
    memcpy(memory + Tile::kBytes + Tile::offset(i / 64, i % 64), &one, 2);
  }
  if (broken != Broken::kNoFenceOfStores) fence_async_proxy();
  __syncthreads();
  if (broken != Broken::kNoWaitForCopy) wait_for_phase(loaded, 0);
  if (broken == Broken::kNamedBarrierAlone) sync_named_barrier(1, thread < 32 ? 64 : 128);
  if (broken == Broken::kWarpMissing && thread >= 96) return;
  float d[32];
  if (broken != Broken::kNoFenceOfProducts) fence_products(d);
  const int tile = broken == Broken::kOtherOperand && thread >= 64 ? 0 : Tile::kBytes;
  multiply<kType, 64, Operand::kRows>(d, rows_operand<Tile>(memory, 0, 0),
                                      rows_operand<Tile>(memory + tile, 0, 0), false);
  if (broken == Broken::kWritesOperand) {
    __syncthreads();
    memory[Tile::kBytes + Tile::offset(thread % 64, 3)] = 7;
    fence_async_proxy();
  }
  if (broken == Broken::kWritesAccumulator && thread == 77) d[3] = 0;
  if (broken == Broken::kReadsTooEarly) out[thread] = d[0];
  if (broken == Broken::kNoCommit) return;
  commit_products();
  if (broken == Broken::kNamesPending) wait_for_products<1>(d);
  wait_for_products<0>(d);
  if (broken != Broken::kReadsTooEarly) out[thread] = d[0];
}

// What the launch reports, or nothing.
std::string report(Broken broken, std::vector<float>* out) {
  std::vector<uint16_t> ones(64 * 64, 0x3f80);
  TensorMap map;
  CHECK((make_tensor_map<PanelTile<64, 64>>(&map, {ones.data(), 1, 64, 1, 0, 64, 64})) ==
        cudaSuccess);
  out->assign(128, -1.0f);
  try {
    launch(breaks_a_rule, dim3(1), dim3(128), 2 * PanelTile<64, 64>::kBytes + 64, map, broken,
           out->data());
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

bool reports(Broken broken, const std::string& expected) {
  std::vector<float> out;
  const std::string text = report(broken, &out);
  if (text.find(expected) != std::string::npos) return true;
  std::fprintf(stderr, "expected '%s', got '%s'\n", expected.c_str(), text.c_str());
  return false;
}

template <int kOfFirst>
__global__ void share_out_registers() {
  if (threadIdx.x < 128) {
    give_registers<kOfFirst>();
  } else {
    take_registers<240>();
  }
}

void registers_are_counted() {
  static_assert(registers_to_share(3) == 3 * 168 && registers_to_share(4) == 4 * 128);
  launch(share_out_registers<24>, dim3(1), dim3(384), 0);
  bool failed = false;
  try {
    launch(share_out_registers<32>, dim3(1), dim3(384), 0);
  } catch (const Failure& failure) {
    failed = std::string(failure.what()).find("more registers") != std::string::npos;
  }
  CHECK(failed);
}

void broken_rules_are_reported() {
  std::vector<float> out;
  CHECK(report(Broken::kNothing, &out).empty());
  for (float x : out) CHECK(x == 16.0f);
  CHECK(report(Broken::kReadsTooEarly, &out).empty());
  for (float x : out) CHECK(x != x);
  CHECK(reports(Broken::kTooFewBytes, "deadlock"));
  CHECK(reports(Broken::kNoFenceOfStores, "without fence_async_proxy()"));
  CHECK(reports(Broken::kNoFenceOfProducts, "without fence_products()"));
  CHECK(reports(Broken::kNoCommit, "before its products were finished"));
  CHECK(reports(Broken::kWritesOperand, "shared memory changed while a product"));
  CHECK(reports(Broken::kWritesAccumulator, "an accumulator was written before"));
  CHECK(reports(Broken::kOtherOperand, "the warps of a warpgroup do different products"));
  CHECK(reports(Broken::kWarpMissing, "did not all do the same products"));
  CHECK(reports(Broken::kTwiceMade, "made twice"));
  CHECK(reports(Broken::kNotPublished, "before publish_barriers()"));
  CHECK(reports(Broken::kNeverArrives, "wait for an event (the barrier at byte 16384, parity 0)"));
  CHECK(reports(Broken::kNamedBarrierAlone, "different numbers of threads"));
  CHECK(reports(Broken::kNamesPending, "whose products are not finished"));
  if (schedule.threads == cuda_on_host::Order::kBackward) {  // copies arrive late
    CHECK(!report(Broken::kNoWaitForCopy, &out).empty() || out[0] != 16.0f);
    CHECK(reports(Broken::kWritesDuringCopy, "the destination of a copy was written"));
  }
}

}  // namespace

int main() {
  for (const auto& s : all_schedules()) {
    schedule = s;
    products_are_right<MmaType::kBFloat16, BFloat16, 64>();
    products_are_right<MmaType::kFloat16, Half, 80>();
    products_are_right<MmaType::kBFloat16, BFloat16, 96>();
    products_are_right<MmaType::kFloat16, Half, 128>();
    tiles_end_where_their_rows_end();
    a_ring_hands_over_everything();
    broken_rules_are_reported();
    registers_are_counted();
  }
  illegal_tensors_are_refused();
  return 0;
}
