// The CUDA selection kernels keep what the CPU kernels keep, row for row, in every order of threads
// and blocks.

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/segments.h"
#include "selection/cuda/select.cu"
#include "selection/selection.h"

namespace {

using pruneops::BFloat16;
using pruneops::CudaSelectParams;
using pruneops::FloatType;
using pruneops::Half;

struct Case {
  FloatType type = FloatType::kFloat32;
  std::vector<float> scores;
  std::vector<uint8_t> protect;  // empty: none
  std::vector<int32_t> cu_seqlens;
  std::vector<int32_t> keep_counts;  // empty: none
  bool use_threshold = false;
  float threshold = 0.0f;
  int64_t capacity = 0;
};

struct Selected {
  std::vector<int32_t> indices;
  std::vector<int32_t> cu_seqlens;
};

// The scores as an array of the case's type.
std::vector<char> encoded(const Case& c) {
  std::vector<char> bytes(c.scores.size() * pruneops::element_size(c.type));
  for (size_t i = 0; i < c.scores.size(); ++i) {
    if (c.type == FloatType::kFloat32) {
      reinterpret_cast<float*>(bytes.data())[i] = c.scores[i];
    } else if (c.type == FloatType::kBFloat16) {
      pruneops::from_float(c.scores[i], reinterpret_cast<BFloat16*>(bytes.data()) + i);
    } else {
      pruneops::from_float(c.scores[i], reinterpret_cast<Half*>(bytes.data()) + i);
    }
  }
  return bytes;
}

template <typename T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

Selected select_on_cpu(const Case& c) {
  const int64_t total = static_cast<int64_t>(c.scores.size());
  const int64_t num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  const std::vector<char> scores = encoded(c);
  std::vector<int32_t> bounds(num_segments + 1), keys(total);
  std::vector<pruneops::SegmentCut> cuts(num_segments);
  pruneops::sanitize_cu_seqlens(c.cu_seqlens.data(), num_segments + 1, total, bounds.data());
  pruneops::SelectParams p{};
  p.scores = scores.data();
  p.score_type = c.type;
  p.protect = data_or_null(c.protect);
  p.cu_seqlens = bounds.data();
  p.keep_counts = data_or_null(c.keep_counts);
  p.use_threshold = c.use_threshold;
  p.threshold = c.threshold;
  p.num_segments = num_segments;
  p.keys = keys.data();
  p.cuts = cuts.data();
  Selected out{std::vector<int32_t>(c.capacity), std::vector<int32_t>(num_segments + 1)};
  pruneops::select_cuts(p, pruneops::testing::serial());
  pruneops::select_offsets(p, c.capacity, out.cu_seqlens.data());
  pruneops::select_emit(p, out.cu_seqlens.data(), out.indices.data(), c.capacity,
                        pruneops::testing::serial());
  return out;
}

enum class KeysIn { kSharedMemory, kGlobalMemory };

Selected select_on_device(const Case& c, KeysIn keys_in) {
  const int64_t num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  const std::vector<char> scores = encoded(c);
  // Filled with values that nothing may rely on.
  std::vector<int32_t> bounds(num_segments + 1, -77);
  std::vector<unsigned long long> progress(num_segments + 1, ~0ull);
  Selected out{std::vector<int32_t>(c.capacity, -7), std::vector<int32_t>(num_segments + 1, -7)};
  CudaSelectParams p{};
  p.scores = scores.data();
  p.score_type = c.type;
  p.protect = data_or_null(c.protect);
  p.cu_seqlens = c.cu_seqlens.data();
  p.keep_counts = data_or_null(c.keep_counts);
  p.use_threshold = c.use_threshold;
  p.threshold = c.threshold;
  p.num_sms = 8;
  p.max_shared_bytes = 100 * 1024;
  p.total = static_cast<int64_t>(c.scores.size());
  p.num_segments = num_segments;
  p.capacity = c.capacity;
  if (num_segments > 1) {
    p.bounds = bounds.data();
    p.progress = progress.data();
  }
  p.indices = out.indices.data();
  p.cu_seqlens_out = out.cu_seqlens.data();
  if (keys_in == KeysIn::kSharedMemory) {
    CHECK(pruneops::launch_select(p, nullptr) == cudaSuccess);
  } else {
    CHECK(c.type == FloatType::kFloat32);
    if (num_segments > 1) {
      pruneops::launch_kernel(pruneops::prepare_select_kernel, dim3(1), dim3(64), 0, nullptr, p);
    }
    const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(1, num_segments));
    pruneops::launch_kernel(pruneops::select_kernel<float>, dim3(blocks), dim3(64), 0, nullptr, p,
                            int64_t{0});
  }
  return out;
}

void check_case(const Case& c, KeysIn keys_in = KeysIn::kSharedMemory) {
  const Selected expected = select_on_cpu(c);
  const Selected got = select_on_device(c, keys_in);
  CHECK(got.cu_seqlens == expected.cu_seqlens);
  CHECK(got.indices == expected.indices);
}

enum class Scores { kSmooth, kSpecial, kTied };

std::vector<float> make_scores(int64_t n, Scores kind, std::mt19937& random) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-42f, -1e-42f, 1.0f, -1.0f};
  std::vector<float> scores(n);
  for (float& s : scores) {
    const int r = static_cast<int>(random() % 100000);
    s = kind == Scores::kSmooth    ? 1e-3f * static_cast<float>(r - 50000)
        : kind == Scores::kSpecial ? special[r % 10]
                                   : static_cast<float>(r % 3);
  }
  return scores;
}

Case make_case(const std::vector<int32_t>& lengths, Scores kind, unsigned seed) {
  std::mt19937 random(seed);
  Case c;
  c.cu_seqlens = {0};
  for (int32_t n : lengths) {
    c.cu_seqlens.push_back(c.cu_seqlens.back() + n);
    c.keep_counts.push_back(static_cast<int32_t>(random() % (n + 4)) - 2);
  }
  const int64_t total = c.cu_seqlens.back() + 3;  // an unused tail
  c.scores = make_scores(total, kind, random);
  c.capacity = total;
  return c;
}

void protect_some(Case& c, unsigned seed) {
  std::mt19937 random(seed);
  c.protect.resize(c.scores.size());
  for (uint8_t& flag : c.protect) flag = random() % 4 == 0 ? 2 : 0;
}

void check_every_rule(const std::vector<int32_t>& lengths, KeysIn keys_in) {
  unsigned seed = 1;
  for (Scores kind : {Scores::kSmooth, Scores::kSpecial, Scores::kTied}) {
    for (bool with_protect : {false, true}) {
      Case c = make_case(lengths, kind, ++seed);
      if (with_protect) protect_some(c, seed);
      check_case(c, keys_in);
      c.capacity = static_cast<int64_t>(c.scores.size()) / 5;
      check_case(c, keys_in);
      c.use_threshold = true;
      for (float threshold : {0.0f, 1.5f, std::numeric_limits<float>::quiet_NaN()}) {
        c.threshold = threshold;
        check_case(c, keys_in);
      }
      c.keep_counts.clear();
      check_case(c, keys_in);
    }
  }
}

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

// A segment of LLaVA size; keys that need all shared memory of a multiprocessor; more than that.
void check_long_segments() {
  for (int32_t n : {2880, 11000, 25000}) {
    Case c = make_case({n}, n == 2880 ? Scores::kSmooth : Scores::kTied, 11);
    c.keep_counts = {n / 4};
    check_case(c);
  }
  // With more segments than multiprocessors a long one does not fit.
  std::vector<int32_t> lengths(10, 5);
  lengths[6] = 11000;
  Case c = make_case(lengths, Scores::kTied, 12);
  c.keep_counts[6] = 4000;
  check_case(c);
}

}  // namespace

int main() {
  const std::vector<cuda_on_host::Schedule> schedules = cuda_on_host::all_schedules();
  for (size_t i = 0; i < schedules.size(); ++i) {
    cuda_on_host::schedule = schedules[i];
    check_every_rule({17, 0, 40}, KeysIn::kSharedMemory);
    check_malformed_boundaries();
    // The rest is much work, or differs little from one order to the next.
    if (i % 2 == 0) {
      check_score_types();
      check_nothing_to_do();
      check_many_segments();
    } else {
      check_every_rule({3, 65, 0}, KeysIn::kGlobalMemory);
    }
  }
  check_every_rule({45}, KeysIn::kSharedMemory);
  check_every_rule({70}, KeysIn::kGlobalMemory);
  check_long_segments();
  return 0;
}
