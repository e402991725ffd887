// The CUDA decode kernels, run on the CPU, against plain loops in double precision: any lengths,
// head counts, head dims and dtypes, lengths that lie, NaN in every slot that is not in use, in
// outputs and in scratch, in several orders of threads and blocks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention/cuda/decode.cu"
#include "check.h"
#include "decode_case.h"

namespace {

using pruneops::CudaDecodeParams;
using pruneops::DecodePlan;
using pruneops::FloatType;
using pruneops::testing::Case;
using pruneops::testing::Inputs;
using pruneops::testing::kNan;
using pruneops::testing::Results;
using pruneops::testing::Slots;

struct Got {
  std::vector<float> out, lse, scores;
};

Got run(const Case& c, Inputs& in) {
  Slots out(1, c.batch(), c.heads_q, c.head_dim, 0, 0, c.type);
  Got got{{},
          std::vector<float>(c.heads_q * c.batch(), kNan),
          std::vector<float>(c.with_scores ? c.batch() * c.capacity : 0, kNan)};
  CudaDecodeParams p{};
  p.q = in.q.view();
  p.k = in.k.view();
  p.v = in.v.view();
  p.out = out.view();
  p.heads = {c.heads_q, c.heads_k, c.head_dim, c.heads_q / c.heads_k};
  p.lengths = c.lengths.data();
  p.batch = c.batch();
  p.capacity = c.capacity;
  p.softmax_scale = c.scale;
  p.softmax_lse = got.lse.data();
  got.scores.reserve(1);  // an address for the scores of an empty cache
  p.scores = c.with_scores ? got.scores.data() : nullptr;
  const DecodePlan plan = pruneops::plan_decode(p, c.num_splits);
  CHECK(plan.num_splits >= 1);
  std::vector<float> workspace(plan.workspace_floats, kNan);
  p.workspace = workspace.data();
  CHECK(pruneops::launch_decode(p, plan, nullptr) == cudaSuccess);
  for (size_t i = 0; i < out.floats.size(); ++i) got.out.push_back(out.get(i));
  return got;
}

template <class A, class B>
double largest_error(const std::vector<A>& a, const std::vector<B>& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    most = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(most, error);
  }
  return most;
}

void check_at_most(const Case& c, const char* what, double error, double bound) {
  if (error <= bound) return;
  std::fprintf(stderr, "%s: %s is off by %.3g, more than %.3g\n", c.name.c_str(), what, error,
               bound);
  std::exit(1);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

Got check_case(const Case& c, size_t num_schedules = 1, unsigned seed = 1) {
  Inputs in(c, seed);
  const Results<double> expected(c, in);
  const Results<float> plain(c, in);
  double most = 0, most_lse = 1;
  for (double x : expected.out) most = std::max(most, std::abs(x));
  for (double x : expected.lse) {
    if (std::isfinite(x)) most_lse = std::max(most_lse, std::abs(x));
  }
  Got first;
  for (size_t s = 0; s < num_schedules; ++s) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const Got got = run(c, in);
    if (s == 0) {
      first = got;
      check_at_most(
          c, "out", largest_error(got.out, expected.out),
          2 * largest_error(plain.out, expected.out) + pruneops::testing::epsilon(c.type) * most);
      for (size_t i = 0; i < got.lse.size(); ++i) {
        if (std::isinf(expected.lse[i])) {
          CHECK(got.lse[i] == expected.lse[i]);
        } else {
          check_at_most(c, "lse", std::abs(got.lse[i] - expected.lse[i]), 2e-6 * most_lse);
        }
      }
      for (size_t i = 0; i < got.scores.size(); ++i) {
        const double want = expected.scores[i];
        check_at_most(c, "a score", std::abs(got.scores[i] - want), 1e-5 * most_lse * want + 1e-30);
      }
    }
    CHECK(same_bits(got.out, first.out) && same_bits(got.lse, first.lse) &&
          same_bits(got.scores, first.scores));
  }
  return first;
}

constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

void lengths_of_every_kind() {
  for (FloatType type : kTypes) {
    // Off every tile, none, one, full, and numbers that no cache can hold.
    check_case(
        {"lengths", {0, 1, 15, 16, 17, 63, 64, 65, 130, 197, -5, 1 << 30}, 197, 4, 2, 16, type}, 6);
    Case c{"splits", {0, 1, 200, 129, 300}, 300, 4, 2, 64, type};
    for (int64_t splits : {1, 2, 3, 4, 1000}) {
      c.num_splits = splits;
      check_case(c, splits == 3 ? 6 : 1);
      c.with_scores = !c.with_scores;
    }
    check_case({"no rows", {}, 7, 2, 1, 64, type});
    check_case({"no slots", {0, 3, -1}, 0, 2, 1, 64, type});
    check_case({"nothing stored", {0, 0}, 300, 3, 3, 64, type});
  }
  std::vector<int32_t> many;
  for (int i = 0; i < 140; ++i) many.push_back(i * 7 % 5);
  check_case({"many rows", many, 8, 2, 1, 16, FloatType::kBFloat16}, 2);
  check_case({"long", {1500, 3}, 1503, 1, 1, 32, FloatType::kFloat16}, 2);
}

void groups_of_every_size() {
  for (FloatType type : kTypes) {
    for (int64_t group : {1, 2, 4, 7, 8, 9, 20}) {
      const std::string name = "group " + std::to_string(group);
      check_case({name, {70, 0, 5}, 71, group * 2, 2, 24, type, group % 2 == 0 ? 2 : 1});
    }
  }
}

void head_dims_of_every_size() {
  for (FloatType type : kTypes) {
    for (int64_t dim : {1, 3, 8, 31, 40, 64, 65, 72, 80, 88, 96, 100, 128, 129, 136, 200, 256}) {
      Case c{"head_dim " + std::to_string(dim), {5, 33}, 34, 3, 1, dim, type};
      check_case(c);
    }
  }
}

// Rows that lie on 16 bytes give the same bits, however far apart they are; others are right.
void any_strides() {
  for (FloatType type : kTypes) {
    for (int64_t dim : {80, 128}) {
      const std::string name = "strides, head_dim " + std::to_string(dim);
      const Case packed{name, {75, 0, 20}, 77, 4, 2, dim, type, 2};
      const Got want = check_case(packed);
      for (int64_t gap : {8, 3}) {
        Case c = packed;
        c.gap = gap;
        const Got got = check_case(c);
        if (gap == 3 && type != FloatType::kFloat32) continue;
        CHECK(same_bits(got.out, want.out) && same_bits(got.scores, want.scores));
      }
      Case c = packed;
      c.shift = 1;
      check_case(c);
    }
  }
}

void extreme_logits() {
  for (FloatType type : kTypes) {
    Case c{"scale", {150}, 150, 2, 1, 64, type, 2};
    for (float scale : {0.0f, -0.5f, 1.0f}) {
      c.scale = scale;
      check_case(c);
    }
    c.spread = 30.0f;  // one key takes it all
    check_case(c);
  }
}

// An infinite value must come out, and a NaN stay in its own row and head.
void bad_values_stay_where_they_are() {
  for (FloatType type : kTypes) {
    const Case c{"bad values", {130, 130}, 140, 4, 2, 32, type, 2};
    Inputs in(c, 3);
    const Got want = run(c, in);
    in.v.set(in.v.place(0, 100, 1, 5), INFINITY);
    in.k.set(in.k.place(1, 7, 0, 2), kNan);
    const Got got = run(c, in);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < 4; ++h) {
        for (int64_t d = 0; d < 32; ++d) {
          const int64_t i = (b * 4 + h) * 32 + d;
          if (b == 0 && h >= 2 && d == 5) {
            CHECK(std::isinf(got.out[i]));
          } else if (b == 1 && h < 2) {
            CHECK(std::isnan(got.out[i]));
          } else {
            CHECK(got.out[i] == want.out[i]);
          }
        }
      }
    }
  }
}

// As on the CPU: nothing can be weighed, so nothing comes out.
void logits_that_are_all_minus_infinity() {
  for (FloatType type : kTypes) {
    for (int64_t splits : {1, 3}) {
      const Case c{"minus infinity", {130}, 130, 2, 1, 32, type, splits, false};
      Inputs in(c, 4);
      in.q.set(in.q.place(0, 0, 1, 9), -INFINITY);
      for (int64_t j = 0; j < 130; ++j) in.k.set(in.k.place(0, j, 0, 9), 1.0f);
      const Got got = run(c, in);
      CHECK(std::isfinite(got.lse[0]) && got.lse[1] == -INFINITY);
      for (int64_t d = 0; d < 32; ++d) CHECK(std::isfinite(got.out[d]) && got.out[32 + d] == 0.0f);
    }
  }
}

void plans_follow_sizes() {
  CudaDecodeParams p{};
  p.heads = {28, 4, 128, 7};
  p.batch = 1;
  p.capacity = 6400;
  CHECK(pruneops::plan_decode(p, 0).num_splits == 50);  // short ones of one long row
  p.batch = 64;
  CHECK(pruneops::plan_decode(p, 0).num_splits == 7);  // none too long
  CHECK(pruneops::plan_decode(p, 1).partial_out_floats == 0);
  CHECK(pruneops::plan_decode(p, 3).num_splits == 3);
  CHECK(pruneops::plan_decode(p, 1 << 30).num_splits == 100);  // 64 keys at least
  p.capacity = 1 << 30;
  CHECK(pruneops::plan_decode(p, 1 << 30).num_splits == 256);
  p.heads = {128, 2, 128, 64};
  p.capacity = 4096;
  p.batch = 2;
  CHECK(pruneops::plan_decode(p, 0).num_splits == 25);  // 8 tiles of heads a key head
}

}  // namespace

int main() {
  plans_follow_sizes();
  lengths_of_every_kind();
  groups_of_every_size();
  head_dims_of_every_size();
  any_strides();
  extreme_logits();
  bad_values_stay_where_they_are();
  logits_that_are_all_minus_infinity();
  return 0;
}
