// Segments that several blocks share are selected from as if one block held them, in every order of
// threads and blocks, beside short and empty ones.

#include "selection_cuda_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

// Two warps a block; segments of more than 20 rows are long, and cut every 16 rows.
constexpr BlockSizes kSmall{64, 20, 16};
// The same with one warp.
constexpr BlockSizes kOneWarp{32, 20, 16};
// The stretches are as long as what one block holds.
constexpr BlockSizes kTiny{32, 7, 7};

void check_where_the_paths_part() {
  CHECK(check_every_rule({19}, kSmall) == 0);
  CHECK(check_every_rule({20}, kSmall) == 0);
  CHECK(check_every_rule({21}, kSmall) == 2);
  CHECK(check_every_rule({32}, kSmall) == 2);
  CHECK(check_every_rule({33}, kSmall) == 3);
  CHECK(check_every_rule({20, 21, 20}, kSmall) == 2);
  CHECK(check_every_rule({7, 8, 14, 15}, kTiny) == 7);
}

void check_mixes() {
  CHECK(check_every_rule({45, 0, 20, 21, 3}, kOneWarp) == 3 + 2);
  // The first segment has nothing before it, the last does not lie behind a long one.
  CHECK(check_every_rule({0, 40, 0, 12}, kSmall) == 3);
}

// Every count and every threshold cuts the ties in another place.
void check_counts_and_ties() {
  for (Scores kind : {Scores::kEqual, Scores::kTied, Scores::kSpecial}) {
    Case c = make_case({50, 4, 33}, kind, 21);
    for (int32_t k : {-1, 0, 1, 2, 15, 16, 17, 18, 31, 32, 33, 43, 44, 48, 49, 50, 51}) {
      c.keep_counts = {k, k, k - 10};
      check_case(c, kOneWarp);
    }
    c.keep_counts = {std::numeric_limits<int32_t>::max(), 0, std::numeric_limits<int32_t>::min()};
    check_case(c, kOneWarp);
    protect_some(c, 22);
    for (int32_t k : {0, 1, 16, 17, 30, 50}) {
      c.keep_counts = {k, 0, k};
      check_case(c, kOneWarp);
    }
  }
}

void check_all_alike() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (float score : {nan, inf, -inf, -0.0f}) {
    Case c = make_case({50, 21}, Scores::kEqual, 31);
    std::fill(c.scores.begin(), c.scores.end(), score);
    for (int32_t k : {0, 1, 18, 49, 50}) {
      c.keep_counts = {k, k};
      c.use_threshold = false;
      check_case(c, kOneWarp);
      c.use_threshold = true;
      for (float threshold : {-inf, 0.0f, inf}) {
        c.threshold = threshold;
        check_case(c, kOneWarp);
      }
    }
    c.protect.assign(c.scores.size(), 1);
    check_case(c, kOneWarp);
  }
}

void check_any_room() {
  Case c = make_case({40, 5, 37}, Scores::kTied, 41);
  c.keep_counts = {25, 3, 20};
  for (int64_t capacity = 0; capacity <= 60; capacity += 3) {
    c.capacity = capacity;
    check_case(c, kOneWarp);
  }
  // More places behind the last row than there are rows.
  c.capacity = 500;
  check_case(c, kOneWarp);
}

void check_score_types() {
  for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
    for (int64_t shift = 0; shift < 8; ++shift) {
      Case c = make_case({1, 43, 6, 38}, Scores::kSmooth, 51);
      c.type = type;
      c.shift = shift;
      check_case(c, kOneWarp);
      check_case(c, kTiny);
      protect_some(c, 52);
      check_case(c, kOneWarp);
    }
  }
}

void check_malformed_boundaries() {
  const int32_t low = std::numeric_limits<int32_t>::min();
  const int32_t high = std::numeric_limits<int32_t>::max();
  Case c = make_case({25, 25, 25, 25}, Scores::kSmooth, 61);
  for (const std::vector<int32_t>& bounds : std::vector<std::vector<int32_t>>{
           {-5, 42, 7, 99999, 3}, {90, 70, 50, 30, 0}, {low, high, low, high, 0}}) {
    c.cu_seqlens = bounds;
    check_case(c, kSmall);
  }
  c = make_case({60}, Scores::kSmooth, 62);
  for (const std::vector<int32_t>& bounds :
       std::vector<std::vector<int32_t>>{{15, 3}, {20, 40}, {low, high}}) {
    c.cu_seqlens = bounds;
    check_case(c, kSmall);
  }
}

// More long segments than a warp has lanes, more segments than a tile of the boundaries, and more
// stretches than a window of the look back.
void check_many() {
  std::vector<int32_t> lengths(600);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = i % 8 == 7 ? 9 + i % 5 : i % 3;
  Case c = make_case(lengths, Scores::kTied, 71);
  protect_some(c, 72);
  CHECK(check_case(c, kTiny) >= 150);
  c = make_case({3, 700, 2}, Scores::kTied, 73);
  c.keep_counts = {1, 350, 1};
  CHECK(check_case(c, kTiny) == 100);
}

__global__ void look_back_kernel(unsigned long long* words, int64_t first, int64_t index,
                                 unsigned long long own, unsigned long long* sum) {
  const unsigned long long before = pruneops::look_back(words, first, index, own);
  if (threadIdx.x == 0) *sum = before;
}

// Where blocks run at once, one may meet others that know only their own values.
void check_look_back() {
  for (int64_t first : {0, 3, 40}) {
    for (int64_t index : {40, 41, 72, 73, 130}) {
      // Nearest item that knows the sum; none of them may.
      for (int64_t known : {int64_t{-1}, first, index - 1, index - 32, index - 33}) {
        std::vector<unsigned long long> words(index + 1);
        unsigned long long expected = 0;
        for (int64_t i = 0; i < index; ++i) {
          const unsigned long long own = pruneops::pair_of(static_cast<uint32_t>(i + 1) << 16, 7);
          expected = i < first ? 0 : expected + own;
          words[i] = i < first ? pruneops::kOwn | 99 : pruneops::kOwn | own;
          if (i >= first && i == known) words[i] = pruneops::kSoFar | expected;
        }
        const unsigned long long own = pruneops::pair_of(5, 6);
        unsigned long long sum = ~0ull;
        cuda_on_host::launch(look_back_kernel, dim3(1), dim3(32), 0, words.data(), first, index,
                             own, &sum);
        CHECK(sum == expected);
        CHECK(words[index] == (pruneops::kSoFar | (expected + own)));
        CHECK(pruneops::low_of(sum) == 7 * (index - first));
      }
    }
  }
}

// What the launcher itself chooses.
void check_real_sizes() {
  const struct {
    std::vector<int32_t> lengths;
    int64_t num_stretches;
  } cases[] = {{{16384}, 0}, {{16385}, 5}, {{20480}, 5}, {{20481, 7}, 6}};
  for (const auto& [lengths, num_stretches] : cases) {
    for (Scores kind : {Scores::kSmooth, Scores::kEqual}) {
      Case c = make_case(lengths, kind, 81);
      c.keep_counts[0] = lengths[0] / 2 + 1;
      CHECK(check_case(c) == num_stretches);
    }
  }
  // Where blocks share a multiprocessor, a segment that is much longer than the others.
  std::vector<int32_t> lengths(10, 5);
  for (const auto& [longest, num_stretches] :
       {std::pair<int32_t, int64_t>{9976, 0}, {9977, 3}, {12289, 4}}) {
    lengths[6] = longest;
    Case c = make_case(lengths, Scores::kTied, 82);
    c.keep_counts[6] = 4000;
    CHECK(check_case(c) == num_stretches);
  }
}

}  // namespace

int main() {
  const std::vector<cuda_on_host::Schedule> schedules = cuda_on_host::all_schedules();
  for (const cuda_on_host::Schedule& schedule : schedules) {
    cuda_on_host::schedule = schedule;
    check_mixes();
    check_many();
  }
  // The rest is much work, or differs little from one order to the next.
  cuda_on_host::schedule = schedules[3];
  check_where_the_paths_part();
  check_counts_and_ties();
  check_all_alike();
  check_any_room();
  check_score_types();
  check_malformed_boundaries();
  check_look_back();
  check_real_sizes();
  return 0;
}
