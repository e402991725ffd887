// The CUDA score kernels, run on the CPU, against plain loops in double precision: any lengths,
// head counts and dtypes, boundaries that lie. Those on tensor cores have a test of their own.

#include <iterator>

#include "attention/cuda/kv_limit.cu"
#include "score_case.h"

namespace {

using pruneops::FloatType;
using pruneops::Reduce;
using pruneops::testing::Case;
using pruneops::testing::check_case;

void scores_equal_double_precision() {
  unsigned seed = 1;
  // Lengths off every tile, an empty segment, one without queries and one without keys, rows of no
  // segment.
  const std::vector<int32_t> cu_q{0, 70, 70, 70, 75, 140}, cu_k{0, 67, 67, 150, 150, 281};
  const int64_t total_q = 143, total_k = 290;
  for (bool causal : {false, true}) {
    for (bool given : {false, true}) {
      check_case({"lengths", cu_q, cu_k, total_q, total_k, 4, 2, 40, FloatType::kFloat32, causal,
                  false, given},
                 seed++, 2);
    }
  }
  Case limited{"limits", cu_q, cu_k, total_q, total_k, 4, 2, 40};
  limited.with_limit = true;
  check_case(limited, seed++, 6);

  const std::vector<int32_t> few_q{0, 1, 1, 4, 5}, few_k{0, 130, 150, 151, 200};
  for (Reduce head_reduce : {Reduce::kMean, Reduce::kSum, Reduce::kMax}) {
    for (Reduce query_reduce : {Reduce::kMean, Reduce::kSum, Reduce::kMax}) {
      Case c{"reductions", few_q, few_k, 5, 200, 8, 2, 16};
      c.head_reduce = head_reduce;
      c.query_reduce = query_reduce;
      c.with_limit = head_reduce == Reduce::kSum;
      check_case(c, seed++, 2);
    }
  }
  // Each head_dim with two of the three types: rows that may be read 16 bytes at a time where
  // head_dim allows, and rows that may not.
  const FloatType types[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};
  const int64_t head_dims[] = {1, 3, 8, 63, 64, 65, 72, 80, 128, 129, 256};
  for (size_t i = 0; i < std::size(head_dims); ++i) {
    Case c{"head_dim " + std::to_string(head_dims[i]),
           few_q,
           {0, 71, 72, 72, 140},
           5,
           140,
           2,
           1,
           head_dims[i],
           types[i % 3]};
    check_case(c, seed++, 1);
    c.type = types[(i + 1) % 3];
    c.causal = i % 4 == 0;
    c.padding = 5;
    check_case(c, seed++, 1);
  }
  for (int64_t group : {1, 4, 8, 40}) {
    check_case(
        {"group " + std::to_string(group), {0, 1, 1, 3}, {0, 30, 40, 67}, 3, 67, group * 2, 2, 24},
        seed++, 1);
  }
  check_case({"many heads", {0, 1}, {0, 33}, 1, 33, 70, 70, 8}, seed++, 1);
  Case one{"one segment", {0, 2}, {0, 700}, 2, 700, 3, 3, 32};
  check_case(one, seed++, 3);
  for (float scale : {0.0f, -0.5f, 30.0f}) {
    one.scale = scale;
    check_case(one, seed++, 1);
  }
}

void many_segments_are_handled() {
  Case c{"many segments", {0}, {0}, 0, 0, 2, 1, 8};
  std::mt19937 random(7);
  for (int b = 0; b < 140; ++b) {
    c.total_q += random() % 3;
    c.total_k += random() % 5;
    c.cu_q.push_back(static_cast<int32_t>(c.total_q));
    c.cu_k.push_back(static_cast<int32_t>(c.total_k));
  }
  check_case(c, 100, 1);
  c.causal = true;
  check_case(c, 101, 1);
}

void boundaries_that_lie_are_clamped() {
  std::mt19937 random(11);
  for (int num_entries : {1, 2, 255, 256, 257, 700}) {
    std::vector<int32_t> q(num_entries), k(num_entries), want(2 * num_entries);
    for (int i = 0; i < num_entries; ++i) {
      q[i] = 3 * i + static_cast<int32_t>(random() % 400) - 200;
      k[i] = i / 2;
    }
    pruneops::sanitize_cu_seqlens(q.data(), num_entries, 1500, want.data());
    pruneops::sanitize_cu_seqlens(k.data(), num_entries, 300, want.data() + num_entries);
    for (const auto& s : cuda_on_host::all_schedules()) {
      cuda_on_host::schedule = s;
      std::vector<int32_t> bounds(2 * num_entries, -1);
      pruneops::launch_kernel(pruneops::bounds_kernel, dim3(2), dim3(pruneops::kBoundsThreads), 0,
                              nullptr, q.data(), k.data(), num_entries, 1500, 300, bounds.data());
      CHECK(bounds == want);
    }
  }
  const std::vector<int32_t> bad_q{5, -3, 9, 1000000, 4, 12, 12},
      bad_k{-7, 40, 20, 2147483647, -2147483647, 90, 5};
  check_case({"lies", bad_q, bad_k, 14, 100, 2, 2, 16}, 200, 6);
  check_case({"lies, reversed", {14, 0, 0}, {100, 50, 0}, 14, 100, 2, 2, 16}, 201, 2);
  check_case({"lies, negative", {-1, -1}, {-5, -9}, 3, 100, 2, 2, 16}, 202, 1);
  check_case({"no segments", {0}, {0}, 3, 100, 2, 2, 16}, 203, 1);
  check_case({"no keys", {0, 3}, {0, 0}, 3, 0, 2, 2, 16}, 204, 1);
  check_case({"no queries", {0, 0}, {0, 80}, 0, 80, 2, 2, 16}, 205, 1);
}

template <class Q, class K>
void check_limits() {
  const std::vector<int32_t> cu_q{0, 3, 3, 200, 5}, cu_k{0, 0, 6, 140, 150};
  const int64_t total_q = 230, total_k = 160;
  std::mt19937 random(3);
  std::vector<Q> positions_q(total_q);
  std::vector<K> positions_k(total_k);
  for (Q& x : positions_q) x = static_cast<Q>(random() % 300);
  for (K& x : positions_k) x = static_cast<K>(random() % 300);
  std::sort(positions_k.begin() + 6, positions_k.begin() + 140);
  for (const auto& s : cuda_on_host::all_schedules()) {
    cuda_on_host::schedule = s;
    std::vector<int32_t> bounds(2 * cu_q.size(), -1), limit(total_q, -1);
    pruneops::CudaKvLimitParams p{};
    p.positions_q = {positions_q.data(), sizeof(Q) == 8};
    p.positions_k = {positions_k.data(), sizeof(K) == 8};
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_k = cu_k.data();
    p.num_segments = 4;
    p.total_q = total_q;
    p.total_k = total_k;
    p.bounds = bounds.data();
    p.kv_limit = limit.data();
    CHECK(pruneops::launch_kv_limit(p, nullptr) == cudaSuccess);
    for (int64_t i = 0; i < total_q; ++i) {
      int32_t want = 0;  // rows 0..2 have no keys, rows past 200 no segment
      for (int j = 6; j < 140 && i >= 3 && i < 200; ++j)
        want += positions_k[j] <= static_cast<int64_t>(positions_q[i]);
      CHECK(limit[i] == want);
    }
  }
}

}  // namespace

int main() {
  scores_equal_double_precision();
  many_segments_are_handled();
  boundaries_that_lie_are_clamped();
  check_limits<int32_t, int32_t>();
  check_limits<int32_t, int64_t>();
  check_limits<int64_t, int32_t>();
  check_limits<int64_t, int64_t>();
  return 0;
}
