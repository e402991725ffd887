// The CUDA selection kernels keep what the CPU kernels keep, row for row, in every order of threads
// and blocks: segments that one block holds.

#include "selection_cuda_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

void check_score_types() {
  for (FloatType type : {FloatType::kBFloat16, FloatType::kFloat16}) {
    for (Scores kind : {Scores::kSmooth, Scores::kSpecial}) {
      Case c = make_case({70, 33}, kind, 5);
      c.type = type;
      protect_some(c, 6);
      check_case(c);
    }
  }
}

void check_malformed_boundaries() {
  Case c = make_case({10, 10, 10, 10}, Scores::kSmooth, 9);
  c.cu_seqlens = {-5, 12, 7, 99999, 3};
  check_case(c);
  c.cu_seqlens = {40, 30, 20, 10, 0};
  check_case(c);
  c = make_case({20}, Scores::kSmooth, 9);
  c.cu_seqlens = {15, 3};
  check_case(c);
  c.cu_seqlens = {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
  check_case(c);
}

void check_nothing_to_do() {
  Case c;
  c.cu_seqlens = {0};
  c.capacity = 5;
  check_case(c);
  c = make_case({0, 0, 0}, Scores::kSmooth, 1);
  check_case(c);
  c.scores.clear();
  c.capacity = 0;
  check_case(c);
}

// More segments than one window of the look back, and than one tile of the boundaries.
void check_many_segments() {
  std::vector<int32_t> lengths(300);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int32_t>(i * 7 % 5);
  Case c = make_case(lengths, Scores::kTied, 3);
  protect_some(c, 4);
  check_case(c);
  // The highest boundary so far counts on, across warps and tiles.
  for (size_t i : {40, 41, 97, 200, 255, 256, 290}) c.cu_seqlens[i] += i % 2 == 0 ? 60 : -300;
  check_case(c);
}

// Vectors of scores begin anywhere in a segment, and some segments hold none.
void check_alignments() {
  for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
    for (int64_t shift = 0; shift < 8; ++shift) {
      Case c = make_case({5, 37, 1, 8, 90}, Scores::kSmooth, 7);
      c.type = type;
      c.shift = shift;
      check_case(c);
      protect_some(c, 8);
      check_case(c);
    }
  }
}

// A segment of LLaVA size, and ones that need more shared memory than every block may have.
void check_as_much_as_one_block_holds() {
  for (int32_t n : {2880, 11000, 16000}) {
    Case c = make_case({n}, n == 2880 ? Scores::kSmooth : Scores::kTied, 11);
    c.keep_counts = {n / 4};
    CHECK(check_case(c) == 0);
  }
}

}  // namespace

int main() {
  const std::vector<cuda_on_host::Schedule> schedules = cuda_on_host::all_schedules();
  for (size_t i = 0; i < schedules.size(); ++i) {
    cuda_on_host::schedule = schedules[i];
    check_every_rule({17, 0, 40});
    check_malformed_boundaries();
    // The rest is much work, or differs little from one order to the next.
    if (i % 2 == 0) {
      check_score_types();
      check_nothing_to_do();
      check_many_segments();
    }
  }
  check_every_rule({45});
  check_alignments();
  check_as_much_as_one_block_holds();
  return 0;
}
