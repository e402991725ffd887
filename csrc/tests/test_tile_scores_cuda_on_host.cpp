// The score kernels on tensor cores: every head dim, dtype, size of a group and pair of reductions,
// masks of every kind, segments off every tile.

#include "score_case.h"

namespace {

using pruneops::FloatType;
using pruneops::Reduce;
using pruneops::testing::Case;

constexpr int64_t kHeadDims[] = {64, 80, 96, 128};
constexpr Reduce kReductions[] = {Reduce::kMean, Reduce::kSum, Reduce::kMax};

void check_case(const Case& c, size_t num_schedules = 1) {
  static unsigned seed = 1000;
  const int before = pruneops::testing::runs_on_tensor_cores_seen;
  pruneops::testing::check_case(c, seed++, num_schedules);
  CHECK(pruneops::testing::runs_on_tensor_cores_seen > before);
}

// Lengths off every tile, an empty segment, one without queries and one without keys, rows of no
// segment before and behind.
Case ragged(int64_t head_dim, FloatType type, int64_t group, int64_t heads_k) {
  Case c{"ragged, head_dim " + std::to_string(head_dim) + ", group " + std::to_string(group),
         {2, 70, 70, 70, 76, 141, 142},
         {3, 67, 67, 150, 150, 281, 282},
         143,
         290,
         group * heads_k,
         heads_k,
         head_dim};
  c.type = type;
  return c;
}

void every_head_dim_and_group() {
  int n = 0;
  for (int64_t head_dim : kHeadDims) {
    for (FloatType type : {FloatType::kBFloat16, FloatType::kFloat16}) {
      for (int64_t group : {1, 4, 7, 8}) {
        Case c = ragged(head_dim, type, group, group == 1 ? 3 : 1);
        c.causal = n % 3 == 0;
        c.with_limit = n % 3 == 1;
        c.given_lse = n % 5 == 0;
        c.padding = n % 2 * 8;
        c.head_reduce = kReductions[n % 3];
        c.query_reduce = kReductions[(n / 2 + 1) % 3];
        check_case(c);
        ++n;
      }
    }
  }
}

void every_pair_of_reductions() {
  for (Reduce head_reduce : kReductions) {
    for (Reduce query_reduce : kReductions) {
      Case c = ragged(64, FloatType::kBFloat16, 3, 2);
      c.head_reduce = head_reduce;
      c.query_reduce = query_reduce;
      c.causal = true;
      check_case(c);
      c.causal = false;
      c.with_limit = true;
      check_case(c);
    }
  }
}

void every_order() {
  for (Reduce head_reduce : {Reduce::kMean, Reduce::kMax}) {
    Case c = ragged(80, FloatType::kFloat16, 2, 2);
    c.head_reduce = head_reduce;
    c.with_limit = true;
    check_case(c, 6);
  }
}

// More queries than a round of all splits, more keys than a tile; every part of the sum in another
// block.
void long_segments() {
  Case c{"long", {0, 900}, {0, 400}, 900, 400, 2, 1, 64, FloatType::kBFloat16};
  check_case(c);
  c.causal = true;
  check_case(c);
  c.cu_k[1] = 330;  // keys that no segment has
  c.head_reduce = Reduce::kMax;
  check_case(c);
  Case many_queries{"many queries", {0, 2500}, {0, 20}, 2500, 20, 2, 2, 64, FloatType::kFloat16};
  check_case(many_queries);
  many_queries.query_reduce = Reduce::kMax;
  check_case(many_queries);
  // Packed rows whose tiles begin at every head of the group in turn.
  Case odd_group{"odd group", {0, 700}, {0, 40}, 700, 40, 7, 1, 64, FloatType::kBFloat16};
  odd_group.with_limit = true;
  check_case(odd_group);
  Case many_keys{"many keys", {0, 9}, {0, 2500}, 9, 2500, 2, 2, 64, FloatType::kFloat16};
  check_case(many_keys);
}

void many_segments() {
  Case c{"many segments", {0}, {0}, 0, 0, 2, 1, 64, FloatType::kBFloat16};
  std::mt19937 random(7);
  for (int b = 0; b < 140; ++b) {
    c.total_q += random() % 20;
    c.total_k += random() % 5;
    c.cu_q.push_back(static_cast<int32_t>(c.total_q));
    c.cu_k.push_back(static_cast<int32_t>(c.total_k));
  }
  check_case(c);
  c.causal = true;
  c.query_reduce = Reduce::kMax;
  check_case(c);
}

void any_scale() {
  Case c = ragged(96, FloatType::kFloat16, 2, 1);
  for (float scale : {0.0f, -0.5f, 2.0f}) {
    c.scale = scale;
    check_case(c);
  }
}

void boundaries_that_lie_are_clamped() {
  const std::vector<int32_t> bad_q{5, -3, 90, 1000000, 4, 12, 12},
      bad_k{-7, 40, 20, 2147483647, -2147483647, 90, 5};
  const FloatType type = FloatType::kBFloat16;
  check_case({"lies", bad_q, bad_k, 100, 100, 2, 2, 64, type}, 6);
  check_case({"lies, reversed", {100, 0, 0}, {100, 50, 0}, 100, 100, 2, 2, 64, type});
  check_case({"lies, negative", {-1, -1}, {-5, -9}, 30, 100, 2, 2, 64, type});
  check_case({"no segments", {0}, {0}, 3, 100, 2, 2, 64, type});
  check_case({"no keys", {0, 30}, {0, 0}, 30, 0, 2, 2, 64, type});
  check_case({"no queries", {0, 0}, {0, 80}, 0, 80, 2, 2, 64, type});
}

}  // namespace

int main() {
  every_head_dim_and_group();
  every_pair_of_reductions();
  every_order();
  long_segments();
  many_segments();
  any_scale();
  boundaries_that_lie_are_clamped();
  CHECK(cuda_on_host::bank_conflicts == 0);
  return 0;
}
