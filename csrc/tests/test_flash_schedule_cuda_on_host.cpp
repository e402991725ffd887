// The logic around the flash kernels, run on the CPU: schedules cover every row of every head once
// whatever the boundaries say, tiles in shared memory are free of bank conflicts, packed rows and
// visible keys are found.

#include <algorithm>
#include <set>

#include "attention/cuda/flash_masks.cuh"
#include "attention/cuda/flash_schedule.cu"
#include "flash_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FlashOrder;
using pruneops::FlashSchedule;
using pruneops::FlashSegments;
using pruneops::FlashTile;
using pruneops::Heads;
using pruneops::Segment;

// tiles[item], one warp an item; size 0 past the last.
void __global__ tiles_kernel(FlashOrder order, FlashSegments segments, Heads heads,
                             FlashTile* tiles) {
  FlashTile tile;
  if (!pruneops::find_tile(order, segments, heads, blockIdx.x, tile)) tile.size = 0;
  if (threadIdx.x == 31) tiles[blockIdx.x] = tile;
}

// How often each row of each head is worked on, in schedules of all kinds.
void check_schedule(const FlashSegments& s, const std::vector<Segment>& expected,
                    const Heads& heads, bool keys, int32_t tile) {
  const int64_t num_ints = pruneops::flash_schedule_ints(s.num_segments);
  constexpr int32_t kGuard = 0x5a5a5a5a;
  std::vector<int32_t> scratch(2 * num_ints + 4, kGuard);
  const int32_t group = keys ? 1 : static_cast<int32_t>(heads.group);
  const FlashOrder orders[2] = {{keys, tile, group, scratch.data()},
                                {keys, 3 * tile, group, scratch.data() + num_ints}};
  CHECK(pruneops::launch_flash_schedule(s, orders, 2, nullptr) == cudaSuccess);
  CHECK(std::count(scratch.end() - 4, scratch.end(), kGuard) == 4);

  const int64_t total = keys ? s.total_k : s.total_q;
  for (const FlashOrder& order : orders) {
    const FlashSchedule schedule(order.scratch, s.num_segments);
    const int64_t most = pruneops::flash_most_tiles(total, s.num_segments, order);
    CHECK(*schedule.num_tiles <= most && *schedule.next_item == 0);
    for (int32_t i = 0; i + 1 < schedule.num_records; ++i) {
      const bool slots = s.seqused_k != nullptr;
      CHECK(pruneops::work_class(pruneops::segment_of(schedule.records[i], slots), order) <=
            pruneops::work_class(pruneops::segment_of(schedule.records[i + 1], slots), order));
    }
    const int64_t num_items = most * heads.num_heads_k;
    if (num_items == 0) continue;
    std::vector<FlashTile> tiles(num_items);
    CHECK(pruneops::launch_kernel(tiles_kernel, dim3(static_cast<unsigned>(num_items)), dim3(32), 0,
                                  nullptr, order, s, heads, tiles.data()) == cudaSuccess);
    std::vector<int> seen(total * order.group * heads.num_heads_k, 0);
    for (int64_t item = 0; item < num_items; ++item) {
      const FlashTile& t = tiles[item];
      CHECK((t.size > 0) == (item < *schedule.num_tiles * heads.num_heads_k));
      if (t.size == 0) continue;
      CHECK(t.size <= order.tile && t.begin % order.tile == 0);
      CHECK(t.head_k >= 0 && t.head_k < heads.num_heads_k);
      const int64_t first = keys ? t.segment.k_begin : t.segment.q_begin * order.group;
      CHECK(t.begin + t.size <= (keys ? t.segment.k_len : t.segment.q_len * order.group));
      for (int64_t r = first + t.begin; r < first + t.begin + t.size; ++r) {
        CHECK(r >= 0 && r < total * order.group);
        ++seen[r * heads.num_heads_k + t.head_k];
      }
      // A segment of the batch, or rows that see nothing.
      const auto same = [&](const Segment& e) {
        return e.q_begin == t.segment.q_begin && e.q_len == t.segment.q_len &&
               e.k_begin == t.segment.k_begin && e.k_len == t.segment.k_len &&
               e.slot == t.segment.slot;
      };
      CHECK((keys ? t.segment.q_len : t.segment.k_len) == 0 ||
            std::any_of(expected.begin(), expected.end(), same));
    }
    for (int count : seen) CHECK(count == 1);
  }
}

void test_schedules() {
  std::vector<FlashCase> cases = flash_cases();
  for (const FlashCase& c : flash_slot_cases()) cases.push_back(c);
  cases.push_back(many_segments(700, 40, 5));
  cases.push_back({"large and small", boundaries({3, 5000, 3, 700, 90}),
                   boundaries({9000, 4000, 20, 11, 0}), 6000, 14000, 6, 2});
  for (const FlashCase& c : cases) {
    FlashInputs in(c, 16, pruneops::FloatType::kBFloat16, 1);
    for (const cuda_on_host::Schedule& schedule : cuda_on_host::all_schedules()) {
      cuda_on_host::schedule = schedule;
      check_schedule(in.flash_segments(), in.segments, in.heads, false, 64);
      if (c.seqused_k.empty()) {
        check_schedule(in.flash_segments(), in.segments, in.heads, true, 64);
      }
      if (c.total_q > 1000) break;
    }
  }
  cuda_on_host::schedule = {};
}

// Heads of a section in turns, the largest tiles first, every pair once.
void test_places() {
  for (int32_t heads = 1; heads <= 9; ++heads) {
    for (int32_t together = 1; together <= heads; ++together) {
      for (bool keys : {false, true}) {
        constexpr int32_t kTiles = 5;
        std::set<std::pair<int, int>> seen;
        for (int32_t item = 0; item < kTiles * heads; ++item) {
          const auto place = pruneops::place_in_segment(item, kTiles, heads, together, keys);
          CHECK(place.tile >= 0 && place.tile < kTiles);
          CHECK(place.head_k >= 0 && place.head_k < heads);
          CHECK(place.head_k / together == item / (kTiles * together));
          if (item % (kTiles * together) == 0) CHECK(place.tile == (keys ? 0 : kTiles - 1));
          seen.insert({place.tile, place.head_k});
        }
        CHECK(static_cast<int32_t>(seen.size()) == kTiles * heads);
      }
    }
  }
  const FlashOrder rows = {false, 64, 1, nullptr};
  int last = pruneops::kWorkClasses;
  for (int64_t k_len : {0, 1, 15, 16, 17, 18, 100, 1000, 1200, 100000, 0x7fffffff}) {
    const int c = pruneops::work_class({0, 1, 0, k_len, 0}, rows);
    CHECK(c >= 0 && c <= last && (c < last || k_len == 17));
    last = c;
  }
  for (int64_t k_len : {0, 1, 30000, 1 << 20, 0x7fffffff}) {
    const int32_t n = pruneops::heads_together({0, 1, 0, k_len, 0}, rows, {32, 32, 128, 1});
    CHECK(n >= 1 && n <= 32);
    CHECK(n == 1 || n * k_len * 4 * 128 <= pruneops::kSectionBytes);
  }
}

template <int kHeadDim>
void test_layout() {
  using Layout = pruneops::TileLayout<kHeadDim>;
  constexpr int kRows = 32;
  std::set<int> offsets;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      const int offset = Layout::offset(row, chunk);
      CHECK(offset >= row * Layout::kRowBytes && offset < (row + 1) * Layout::kRowBytes);
      offsets.insert(offset);
      // One matrix of an ldmatrix: 8 rows, 8 different groups of 4 banks.
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(Layout::offset(row / 8 * 8 + i, chunk) / 16 % 8);
      CHECK(banks.size() == 8);
      const pruneops::LaneOffset<kHeadDim> lane(row % 16, chunk % 2);
      CHECK(lane(row / 16 * 16, chunk / 2 * 2) == offset);
    }
  }
  CHECK(static_cast<int>(offsets.size()) == kRows * Layout::kChunks);
}

void test_packed_rows() {
  for (int64_t group : {1, 2, 3, 4, 7, 8, 12, 71, 128, 129, 1000}) {
    for (int64_t first : {int64_t{0}, int64_t{1}, int64_t{6}, int64_t{128}, int64_t{0x7fffff00}}) {
      const pruneops::PackedRows rows(first, group);
      for (int r = 0; r < 256; ++r) {
        int query, head;
        rows.locate(r, query, head);
        CHECK((rows.first_query + query) * group + head == first + r);
        CHECK(head >= 0 && head < group);
      }
    }
  }
}

void __global__ above_kernel(const int32_t* ends, int32_t count, const int32_t* xs, int32_t* out) {
  const int32_t i = pruneops::warp_first_above(ends, count, xs[blockIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = i;
}

void test_search() {
  std::mt19937 random(3);
  for (int32_t count : {0, 1, 2, 31, 32, 33, 64, 1000, 1025, 5000}) {
    std::vector<int32_t> ends(count);
    for (int32_t& x : ends) x = static_cast<int32_t>(random() % (count + 3));
    std::sort(ends.begin(), ends.end());
    std::vector<int32_t> xs(64), got(64, -1);
    for (int32_t& x : xs) x = static_cast<int32_t>(random() % (count + 6)) - 1;
    CHECK(pruneops::launch_kernel(above_kernel, dim3(64), dim3(32), 0, nullptr, ends.data(), count,
                                  xs.data(), got.data()) == cudaSuccess);
    for (size_t i = 0; i < xs.size(); ++i) {
      CHECK(got[i] == std::upper_bound(ends.begin(), ends.end(), xs[i]) - ends.begin());
    }
  }
}

void __global__ limits_kernel(pruneops::Visibility visibility, Segment segment, int64_t begin,
                              int64_t end, pruneops::Limits* out) {
  const pruneops::Limits limits = pruneops::limits_of(visibility, segment, begin, end);
  if (threadIdx.x == 17) *out = limits;
}

void test_limits() {
  for (const FlashCase& c : flash_cases()) {
    FlashInputs in(c, 16, pruneops::FloatType::kBFloat16, 2);
    for (const Segment& s : in.segments) {
      for (int64_t begin = 0; begin < s.q_len; begin += 9) {
        const int64_t end = std::min(s.q_len, begin + 1 + begin % 50);
        pruneops::Limits got{-1, -1};
        CHECK(pruneops::launch_kernel(limits_kernel, dim3(1), dim3(32), 0, nullptr, in.visibility(),
                                      s, begin, end, &got) == cudaSuccess);
        int64_t least = s.k_len, most = 0;
        for (int64_t i = begin; i < end; ++i) {
          least = std::min(least, in.visible(s, i));
          most = std::max(most, in.visible(s, i));
        }
        CHECK(got.least == least && got.most == most);
        const pruneops::KeyTiles tiles = pruneops::key_tiles(got, 64);
        CHECK(tiles.unmasked * 64 <= least && (tiles.unmasked + 1) * 64 > least);
        CHECK(tiles.all * 64 >= most && (tiles.all - 1) * 64 < most);
      }
    }
  }
}

}  // namespace

int main() {
  test_layout<64>();
  test_layout<80>();
  test_layout<96>();
  test_layout<128>();
  test_packed_rows();
  test_places();
  test_search();
  test_limits();
  test_schedules();
  return 0;
}
