// The CUDA clustering kernels, run on the CPU. Distances are held against double precision, and so
// is every decision that follows from them, given the numbers that the step before it left: any
// lengths, dtypes and strides, boundaries and counts that lie, outputs and scratch full of poison,
// in several orders of threads and blocks, with all distances kept and with a panel of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "clustering/cuda/dpc_knn.cu"
#include "clustering/cuda/merge_mean.cu"
#include "common/segments.h"

namespace {

using pruneops::CudaRows;
using pruneops::FloatType;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

#define CHECK_FOR(name, condition)                                        \
  do {                                                                    \
    if (!(condition)) std::fprintf(stderr, "case: %s\n", (name).c_str()); \
    CHECK(condition);                                                     \
  } while (false)

// Rows with `padding` elements of NaN behind each, exactly as long as their last element.
struct Matrix {
  FloatType type;
  int64_t total, channels, stride;
  std::vector<float> values;  // as rounded to the type
  std::vector<uint16_t> halves;

  Matrix(FloatType type, int64_t total, int64_t channels, int64_t padding,
         const std::function<float(int64_t, int64_t)>& value)
      : type(type), total(total), channels(channels), stride(channels + padding) {
    values.assign(total > 0 ? total * stride - padding : 0, kNan);
    halves.resize(type == FloatType::kFloat32 ? 0 : values.size());
    for (int64_t r = 0; r < total; ++r) {
      for (int64_t c = 0; c < channels; ++c) {
        float& x = values[r * stride + c];
        x = value(r, c);
        if (type == FloatType::kBFloat16) {
          pruneops::BFloat16 rounded;
          pruneops::from_float(x, &rounded);
          halves[r * stride + c] = rounded.bits;
          x = pruneops::to_float(rounded);
        } else if (type == FloatType::kFloat16) {
          pruneops::Half rounded;
          pruneops::from_float(x, &rounded);
          halves[r * stride + c] = rounded.bits;
          x = pruneops::to_float(rounded);
        }
      }
    }
  }

  float at(int64_t row, int64_t channel) const { return values[row * stride + channel]; }

  CudaRows view() const {
    const void* data = type == FloatType::kFloat32 ? static_cast<const void*>(values.data())
                                                   : static_cast<const void*>(halves.data());
    return {data, type, stride, total, channels};
  }

  double distance(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t c = 0; c < channels && i != j; ++c) {
      const double d = double{at(i, c)} - at(j, c);
      sum += d * d;
    }
    const double distance = std::sqrt(sum / std::max<int64_t>(channels, 1));
    return distance == distance ? distance : kInf;
  }
};

struct Case {
  std::string name;
  std::vector<int32_t> cu_seqlens, num_clusters;
  int64_t k = 3;
  int64_t capacity = 1000;
  int64_t max_seqlen = 4096;
  bool with_noise = false;
};

struct Result {
  std::vector<int32_t> ids, centers, cu_clusters;
  std::vector<float> density, delta, score, distances;
  std::vector<int32_t> votes;
  int64_t pitch;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

//   panel_rows  0 to keep all distances
Result run(const Case& c, const Matrix& x, const std::vector<float>& noise, int64_t panel_rows) {
  const int64_t total = x.total, num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  Result r{std::vector<int32_t>(total, 77),
           std::vector<int32_t>(c.capacity, 77),
           std::vector<int32_t>(num_segments + 1, 77),
           std::vector<float>(total, kNan),
           std::vector<float>(total, kNan),
           std::vector<float>(total, kNan),
           {},
           std::vector<int32_t>(num_segments, -1),
           0};
  pruneops::CudaDpcKnnParams p{};
  p.x = x.view();
  p.cu_seqlens = c.cu_seqlens.data();
  p.num_clusters = c.num_clusters.data();
  p.noise = c.with_noise ? noise.data() : nullptr;
  p.num_segments = num_segments;
  p.k = c.k;
  p.max_seqlen = std::min(c.max_seqlen, total);
  p.capacity = c.capacity;
  p.cluster_ids = r.ids.data();
  p.center_indices = r.centers.data();
  p.cu_clusters = r.cu_clusters.data();
  p.density = r.density.data();
  p.delta = r.delta.data();
  p.score = r.score.data();
  pruneops::DpcKnnPlan plan = pruneops::plan_dpc_knn(total, p.max_seqlen);
  CHECK(plan.whole && plan.pitch >= p.max_seqlen && plan.panel_rows == total);
  if (panel_rows > 0) plan.whole = false, plan.panel_rows = panel_rows;
  r.pitch = plan.pitch;
  r.distances.assign(plan.distance_floats(), kNan);
  std::vector<int64_t> items(num_segments + 1, -1);
  std::vector<float> norms(2 * total, kNan);
  std::vector<int32_t> ranks(total, -1), bounds(num_segments + 1, -1);
  std::vector<uint32_t> max_distance(num_segments, 0xffffffffu);
  p.items = items.data();
  p.distances = r.distances.data();
  p.norms = norms.data();
  p.ranks = ranks.data();
  p.bounds = bounds.data();
  p.votes = r.votes.data();
  p.max_distance = max_distance.data();
  CHECK(pruneops::launch_dpc_knn(p, plan, nullptr) == cudaSuccess);
  return r;
}

// -1, 0 or 1 as a ranks behind, like or before b.
int compare_scores(float a, float b) {
  if (a != a || b != b) return (a == a) - (b == b);
  return (a > b) - (a < b);
}

// One segment of `n` rows from packed row `begin` on, `kept` of whose centres fit.
void check_segment(const Case& c, const Matrix& x, const std::vector<float>& noise, const Result& r,
                   int64_t begin, int64_t n, int64_t first_center, int64_t kept) {
  std::vector<double> exact(n * n);
  double scale = 0, farthest = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      exact[i * n + j] = x.distance(begin + i, begin + j);
      farthest = std::max(farthest, exact[i * n + j]);
      if (exact[i * n + j] < kInf) scale = std::max(scale, exact[i * n + j]);
    }
  }
  const double margin = 1e-6 * scale;
  const auto near = [&](double ours, double want) {
    return ours == want || std::abs(ours - want) <= margin;
  };
  const float* distances = r.distances.data() + begin * r.pitch;
  for (int64_t i = 0; i < n; ++i) {
    CHECK_FOR(c.name, distances[i * r.pitch + i] == 0.0f);
    for (int64_t j = 0; j < n; ++j) {
      const float ours = distances[i * r.pitch + j];
      if (!near(ours, exact[i * n + j])) {
        std::fprintf(stderr, "%s: distance %d %d is %.9g, expected %.9g, scale %g\n",
                     c.name.c_str(), static_cast<int>(i), static_cast<int>(j), ours,
                     exact[i * n + j], scale);
        std::exit(1);
      }
      CHECK_FOR(c.name, ours == distances[j * r.pitch + i]);
    }
  }
  const int64_t k = std::min(c.k, n);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> row(exact.begin() + i * n, exact.begin() + (i + 1) * n);
    std::sort(row.begin(), row.end());
    double sum = 0;
    for (int64_t m = 0; m < k; ++m) sum += row[m] * row[m];
    double want = std::exp(-sum / k);
    const double of_distances = row[k - 1] < kInf ? 2 * row[k - 1] * margin : 0;
    const double tolerance = want * (of_distances + 2e-6) + 1e-30;
    if (c.with_noise) want += noise[begin + i] * 1e-6;
    const float own = r.density[begin + i];
    CHECK_FOR(c.name, std::abs(own - want) <= tolerance + 1e-7 * want);

    double nearest = kInf;
    bool found = false;
    for (int64_t j = 0; j < n; ++j) {
      const float other = r.density[begin + j];
      if (other > own || (!c.with_noise && other == own && j < i)) {
        nearest = std::min(nearest, exact[i * n + j]);
        found = true;
      }
    }
    CHECK_FOR(c.name, near(r.delta[begin + i], found ? nearest : farthest));
    const float score = r.delta[begin + i] * own;
    CHECK_FOR(c.name, std::memcmp(&score, &r.score[begin + i], 4) == 0 || score != score);
    CHECK_FOR(c.name, (score != score) == (r.score[begin + i] != r.score[begin + i]));
  }

  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return compare_scores(r.score[begin + a], r.score[begin + b]) > 0;
  });
  for (int64_t m = 0; m < kept; ++m) {
    CHECK_FOR(c.name, r.centers[first_center + m] == begin + order[m]);
    CHECK_FOR(c.name, r.ids[begin + order[m]] == m);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t id = r.ids[begin + i];
    if (kept == 0) CHECK_FOR(c.name, id == -1);
    if (kept == 0 || std::find(order.begin(), order.begin() + kept, i) != order.begin() + kept) {
      continue;
    }
    CHECK_FOR(c.name, id >= 0 && id < kept);
    const double chosen = exact[i * n + order[id]];
    for (int64_t m = 0; m < kept; ++m) {
      const double other = exact[i * n + order[m]];
      CHECK_FOR(c.name, chosen <= other + margin);
      // What is equal in double precision was so to begin with: of duplicates the better one.
      if (m < id && other == kInf) CHECK_FOR(c.name, chosen < other);
    }
  }
}

void check_all(const Case& c, const Matrix& x, const std::vector<float>& noise, const Result& r) {
  const int64_t num = static_cast<int64_t>(c.cu_seqlens.size());
  std::vector<int32_t> bounds(num);
  pruneops::sanitize_cu_seqlens(c.cu_seqlens.data(), num, x.total, bounds.data());
  std::vector<bool> inside(x.total, false);
  int64_t clusters = 0;
  CHECK_FOR(c.name, r.cu_clusters[0] == 0);
  for (int64_t b = 0; b + 1 < num; ++b) {
    const int64_t n = std::min<int64_t>(bounds[b + 1] - bounds[b], c.max_seqlen);
    const int64_t wanted = std::min<int64_t>(std::max(c.num_clusters[b], 1), n);
    const int64_t kept = std::min(clusters + wanted, c.capacity) - clusters;
    for (int64_t i = 0; i < n; ++i) inside[bounds[b] + i] = true;
    check_segment(c, x, noise, r, bounds[b], n, clusters, kept);
    clusters += kept;
    CHECK_FOR(c.name, r.cu_clusters[b + 1] == clusters);
  }
  for (int64_t i = clusters; i < c.capacity; ++i) CHECK_FOR(c.name, r.centers[i] == -1);
  for (int64_t i = 0; i < x.total; ++i) {
    if (inside[i]) continue;
    CHECK_FOR(c.name, r.ids[i] == -1 && r.density[i] == 0.0f && r.delta[i] == 0.0f);
    CHECK_FOR(c.name, r.score[i] == 0.0f);
  }
}

bool equal(const Result& a, const Result& b) {
  return a.ids == b.ids && a.centers == b.centers && a.cu_clusters == b.cu_clusters &&
         same_bits(a.density, b.density) && same_bits(a.delta, b.delta) &&
         same_bits(a.score, b.score);
}

// Right, the same in every order, and the same with a panel of distances in the buffer.
Result check_case(const Case& c, const Matrix& x, size_t num_schedules = 1,
                  int64_t panel_rows = 0) {
  std::vector<float> noise(x.total);
  std::mt19937 random(5);
  for (float& v : noise) v = static_cast<float>(random() % 1000) * 1e-3f;
  Result first;
  for (size_t s = 0; s < num_schedules; ++s) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const Result r = run(c, x, noise, 0);
    if (s == 0) check_all(c, x, noise, first = r);
    CHECK_FOR(c.name, equal(r, first));
  }
  // In the last of the orders.
  if (panel_rows > 0) CHECK_FOR(c.name, equal(run(c, x, noise, panel_rows), first));
  cuda_on_host::schedule = {};
  return first;
}

std::function<float(int64_t, int64_t)> normal(unsigned seed, float mean = 0, float deviation = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(mean, deviation);
  return [=](int64_t, int64_t) mutable { return distribution(random); };
}

void lengths_dtypes_and_strides() {
  const std::vector<int32_t> cu_seqlens{0, 1, 1, 66, 70, 200}, num_clusters{1, 3, 7, 2, 64};
  unsigned seed = 1;
  for (FloatType type : kTypes) {
    check_case({"lengths", cu_seqlens, num_clusters}, Matrix(type, 203, 40, 0, normal(seed++)),
               type == FloatType::kBFloat16 ? 6 : 1, 96);
    check_case({"strides", cu_seqlens, num_clusters}, Matrix(type, 203, 37, 3, normal(seed++)));
    for (int64_t channels : {1, 2, 31, 33, 64}) {
      check_case({"channels " + std::to_string(channels), {0, 70}, {4}},
                 Matrix(type, 70, channels, channels % 3, normal(seed++)));
    }
  }
  check_case({"no channels", {0, 5}, {2}}, Matrix(FloatType::kFloat32, 5, 0, 0, normal(1)));
  check_case({"no rows", {0, 0, 0}, {2, 2}}, Matrix(FloatType::kFloat32, 0, 8, 0, normal(1)));
  check_case({"no segments", {0}, {}}, Matrix(FloatType::kFloat32, 5, 8, 0, normal(1)));
  for (int32_t n : {2, 63, 64, 65, 127, 128, 129}) {
    check_case({"length " + std::to_string(n), {0, n}, {n / 2}},
               Matrix(FloatType::kFloat32, n, 8, 0, normal(n)));
  }
}

void numbers_that_cancel() {
  for (FloatType type : kTypes) {
    // Far from the origin, and near to one another.
    const Result far =
        check_case({"offset", {0, 80}, {5}}, Matrix(type, 80, 48, 0, normal(1, 100.0f)), 1, 64);
    // Rows of half precision are shifted if they ask for it; near the origin they do not.
    CHECK(far.votes[0] == (type == FloatType::kFloat32 ? 0 : 80));
    CHECK(check_case({"no offset", {0, 80}, {5}}, Matrix(type, 80, 48, 0, normal(1))).votes[0] ==
          0);
    std::mt19937 random(9);
    std::normal_distribution<float> distribution;
    std::vector<float> centers(6 * 48);
    for (float& x : centers) x = distribution(random);
    check_case({"near duplicates", {0, 90}, {6}},
               Matrix(type, 90, 48, 0, [&](int64_t r, int64_t c) {
                 return 3.0f + centers[r % 6 * 48 + c] + 1e-3f * distribution(random);
               }));
    check_case({"groups apart", {0, 70}, {2}}, Matrix(type, 70, 48, 0, [&](int64_t r, int64_t) {
                 return (r % 2 == 0 ? 40.0f : -40.0f) + distribution(random);
               }));
    check_case({"many channels", {0, 66}, {3}}, Matrix(type, 66, 1500, 0, normal(4, 0.3f)));
    // Equal rows: all distances 0, the first one densest, every score 0.
    const Result r =
        check_case({"equal rows", {0, 70}, {3}},
                   Matrix(type, 70, 20, 0, [](int64_t, int64_t c) { return c * 0.1f; }));
    CHECK((r.centers[0] == 0 && r.centers[1] == 1 && r.centers[2] == 2));
    CHECK(std::count(r.ids.begin(), r.ids.end(), 0) == 68);
    CHECK(std::count(r.distances.begin(), r.distances.end(), 0.0f) == 70 * 70);
  }
  check_case({"large", {0, 40}, {3}}, Matrix(FloatType::kFloat32, 40, 8, 0, normal(1, 0, 1e15f)));
  check_case({"small", {0, 40}, {3}}, Matrix(FloatType::kFloat32, 40, 8, 0, normal(1, 0, 1e-12f)));
}

void rounding_does_not_grow_with_the_number_of_channels() {
  const int64_t channels = 6000;
  std::mt19937 random(1);
  std::normal_distribution<float> distribution;
  std::vector<float> base(channels);
  for (float& x : base) x = distribution(random);
  // Inner products that build up in every channel, of rows just far enough apart not to cancel.
  const Matrix x(FloatType::kFloat32, 64, channels, 0, [&](int64_t r, int64_t c) {
    return (r % 4 == 0 ? -base[c] : base[c]) + 0.36f * distribution(random);
  });
  const Result r = check_case({"rounding", {0, 64}, {3}}, x);
  for (int64_t i = 0; i < 64; ++i) {
    for (int64_t j = 0; j < 64; ++j) {
      const double want = x.distance(i, j);
      CHECK(std::abs(r.distances[i * r.pitch + j] - want) <= 3e-7 * want);
    }
  }
}

void equal_rows_are_equally_far_from_others_in_every_tile() {
  for (FloatType type : kTypes) {
    for (float mean : {0.0f, 3.0f, 60.0f}) {
      std::mt19937 random(2);
      std::normal_distribution<float> distribution(mean);
      std::vector<float> rows(50 * 70);
      for (float& x : rows) x = distribution(random);
      std::vector<int64_t> kind(150);
      for (int64_t& k : kind) k = random() % 50;
      const Matrix x(type, 150, 70, 0,
                     [&](int64_t r, int64_t c) { return rows[kind[r] * 70 + c]; });
      const Result r = check_case({"equal rows", {0, 150}, {60}, 7}, x);
      for (int64_t i = 0; i < 150; ++i) {
        const int64_t j = std::find(kind.begin(), kind.end(), kind[i]) - kind.begin();
        CHECK(r.density[i] == r.density[j] && (i == j || r.delta[i] == 0.0f));
        for (int64_t other = 0; other < 150; ++other) {
          CHECK(r.distances[i * r.pitch + other] == r.distances[j * r.pitch + other]);
        }
      }
    }
  }
}

void rows_that_are_no_numbers() {
  for (FloatType type : kTypes) {
    auto value = normal(6);
    const Matrix x(type, 100, 24, 0, [&](int64_t r, int64_t c) {
      const float v = value(r, c);
      if (r == 3 && c == 5) return kNan;
      if ((r == 15 || r == 16) && c == 7) return kInf;
      return r == 30 ? kNan : v;
    });
    const Result r = check_case({"NaN", {0, 30, 31, 100}, {4, 1, 3}}, x, 2, 64);
    for (int64_t i = 0; i < 30; ++i) {
      CHECK(r.distances[3 * r.pitch + i] == (i == 3 ? 0.0f : kInf));
      CHECK(r.distances[15 * r.pitch + i] == (i == 15 ? 0.0f : kInf));
    }
    // Alone, a row of NaN has the density of any row alone.
    CHECK(r.density[30] == 1.0f && r.delta[30] == 0.0f && r.ids[30] == 0);
    // The sampled rows of the segment's middle, all of them.
    check_case({"NaN in the middle", {0, 6}, {2}}, Matrix(type, 6, 8, 0, [&](int64_t row, int64_t) {
                 return row == 1 || row == 3 || row == 4 ? kNan : value(0, 0);
               }));
  }
}

void neighbours_clusters_and_capacity() {
  const Matrix x(FloatType::kFloat32, 150, 8, 0, normal(8));
  const std::vector<int32_t> cu_seqlens{0, 9, 9, 90, 150};
  for (int64_t k : {1, 2, 7, 8, 9, 40, 81, 100000}) {
    check_case({"k " + std::to_string(k), cu_seqlens, {2, 2, 2, 2}, k}, x, k == 40 ? 3 : 1,
               k == 9 ? 70 : 0);
  }
  check_case({"counts", cu_seqlens, {0, 5, 1000, -7}}, x);
  for (int64_t capacity : {0, 3, 4, 20, 84, 85}) {
    check_case({"capacity " + std::to_string(capacity), cu_seqlens, {3, 2, 80, 1}, 3, capacity}, x,
               1, capacity == 20 ? 64 : 0);
  }
  Case noisy{"noise", cu_seqlens, {3, 1, 20, 5}};
  noisy.with_noise = true;
  check_case(noisy, x, 2, 64);
  check_case(noisy, Matrix(FloatType::kFloat32, 150, 8, 0,
                           [](int64_t r, int64_t) { return static_cast<float>(r % 3); }));
}

void ties_go_to_the_lower_row_and_the_better_center() {
  // A grid on a line: equal distances, densities and scores all over, also at the k-th neighbour.
  for (FloatType type : kTypes) {
    const Matrix x(type, 64, 1, 0, [](int64_t r, int64_t) { return static_cast<float>(r % 16); });
    check_case({"many ties", {0, 64}, {3}, 14}, x);
    const Result r =
        check_case({"ties", {0, 64}, {20}, 5}, x, type == FloatType::kFloat32 ? 4 : 1, 64);
    for (int64_t i = 0; i < 64; ++i) {
      for (int64_t m = 0; m < r.ids[i]; ++m) {
        // Exact in every type: no better centre is as near, unless the row is its own.
        CHECK(r.centers[r.ids[i]] == i ||
              x.distance(i, r.centers[m]) > x.distance(i, r.centers[r.ids[i]]));
      }
    }
  }
}

void many_segments_and_boundaries_that_lie() {
  std::mt19937 random(7);
  Case many{"many segments", {0}, {}};
  for (int b = 0; b < 150; ++b) {
    many.cu_seqlens.push_back(many.cu_seqlens.back() + static_cast<int32_t>(random() % 4));
    many.num_clusters.push_back(static_cast<int32_t>(random() % 4) - 1);
  }
  const Matrix x(FloatType::kFloat32, many.cu_seqlens.back() + 2, 4, 0, normal(3));
  check_case(many, x, 1, 130);

  const Matrix y(FloatType::kBFloat16, 150, 8, 0, normal(4));
  const std::vector<int32_t> counts{2, 5, 1, 9, 1, 3};
  const int32_t least = std::numeric_limits<int32_t>::min();
  const int32_t most = std::numeric_limits<int32_t>::max();
  check_case({"lies", {5, -3, 80, 1000000, 4, 12, 12}, counts}, y, 3, 64);
  check_case({"lies, reversed", {150, 90, 0}, counts}, y);
  check_case({"lies, huge", {least, 20, most, least, 90, 140}, counts}, y);
  check_case({"lies, outside", {-9, -4}, counts}, y);
  // An upper bound that is none.
  Case cut{"cut", {0, 100, 150}, {3, 3}};
  cut.max_seqlen = 67;
  check_case(cut, y, 1, 64);
  cut.max_seqlen = 0;
  check_case(cut, y);
}

void long_segments_have_a_panel_of_bounded_size() {
  for (int64_t n : {1, 4095, 4096}) CHECK(pruneops::plan_dpc_knn(3 * n, n).whole);
  for (int64_t n : {4097, 10000, 65536, 1 << 20}) {
    const pruneops::DpcKnnPlan plan = pruneops::plan_dpc_knn(n, n);
    CHECK(!plan.whole && plan.pitch >= n && plan.panel_rows >= 64 && plan.panel_rows < n);
    CHECK(plan.distance_floats() <= std::max<int64_t>(4096 * 4096, 64 * n));
  }
  CHECK(pruneops::plan_dpc_knn(100, 1 << 20).whole);
}

struct MergeCase {
  std::string name;
  std::vector<int32_t> cu_seqlens, num_clusters;
  int64_t capacity;
};

void check_merge(const MergeCase& c, const Matrix& x, bool weighted, size_t num_schedules = 1) {
  std::mt19937 random(3);
  std::vector<int32_t> ids(x.total);
  std::vector<float> weights(x.total);
  for (int64_t i = 0; i < x.total; ++i) {
    ids[i] = static_cast<int32_t>(random() % 9) - 1;
    weights[i] = ids[i] == 2 ? 0.0f : static_cast<float>(random() % 16) * 0.25f;
  }
  const int64_t num = static_cast<int64_t>(c.cu_seqlens.size());
  std::vector<int32_t> bounds(num);
  pruneops::sanitize_cu_seqlens(c.cu_seqlens.data(), num, x.total, bounds.data());
  // In float and in the order of rows, as the kernel is to do it.
  std::vector<float> sums(c.capacity * x.channels, 0.0f), totals(c.capacity, 0.0f);
  std::vector<int32_t> counts(c.capacity, 0);
  int64_t first = 0;
  for (int64_t b = 0; b + 1 < num; ++b) {
    for (int64_t i = bounds[b]; i < bounds[b + 1]; ++i) {
      if (ids[i] < 0 || ids[i] >= c.num_clusters[b] || first + ids[i] >= c.capacity) continue;
      const int64_t slot = first + ids[i];
      const float weight = weighted ? weights[i] : 1.0f;
      ++counts[slot];
      totals[slot] += weight;
      for (int64_t ch = 0; ch < x.channels; ++ch) {
        const float product = weight * x.at(i, ch);
        sums[slot * x.channels + ch] += product;
      }
    }
    first += std::max(c.num_clusters[b], 0);
  }
  const Matrix want(x.type, c.capacity, x.channels, 0, [&](int64_t slot, int64_t ch) {
    return totals[slot] == 0.0f ? 0.0f : sums[slot * x.channels + ch] / totals[slot];
  });
  for (size_t s = 0; s < num_schedules; ++s) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    std::vector<float> merged(c.capacity * x.channels, kNan);
    std::vector<uint16_t> halves(merged.size(), 0xffff);
    std::vector<int32_t> got(c.capacity, -1), scratch_bounds(num, -1);
    std::vector<int64_t> offsets(num, -1);
    pruneops::CudaMergeMeanParams p{};
    p.x = x.view();
    p.cluster_ids = ids.data();
    p.cu_seqlens = c.cu_seqlens.data();
    p.num_clusters = c.num_clusters.data();
    p.weights = weighted ? weights.data() : nullptr;
    p.num_segments = num - 1;
    p.capacity = c.capacity;
    p.merged = x.type == FloatType::kFloat32 ? static_cast<void*>(merged.data()) : halves.data();
    p.counts = got.data();
    p.offsets = offsets.data();
    p.bounds = scratch_bounds.data();
    CHECK(pruneops::launch_merge_mean(p, nullptr) == cudaSuccess);
    CHECK_FOR(c.name, got == counts);
    if (x.type == FloatType::kFloat32) {
      CHECK_FOR(c.name, same_bits(merged, want.values));
    } else {
      CHECK_FOR(c.name, halves == want.halves);
    }
  }
  cuda_on_host::schedule = {};
}

void means_are_sums_in_the_order_of_rows() {
  const std::vector<int32_t> cu_seqlens{0, 40, 40, 41, 400}, clusters{5, 3, 8, 8};
  for (FloatType type : kTypes) {
    for (bool weighted : {false, true}) {
      check_merge({"means", cu_seqlens, clusters, 26}, Matrix(type, 410, 20, 0, normal(1)),
                  weighted, 6);
      for (int64_t channels : {0, 1, 3, 64, 259, 1030}) {
        check_merge({"channels " + std::to_string(channels), {0, 30}, {8}, 8},
                    Matrix(type, 30, channels, channels % 2, normal(2)), weighted);
      }
    }
  }
  const Matrix x(FloatType::kFloat32, 2500, 4, 0, normal(3));
  check_merge({"long", {0, 2500}, {8}, 9}, x, true, 2);
  for (int64_t capacity : {0, 1, 9, 16, 17, 40}) {
    check_merge({"capacity", {0, 50, 1000}, {8, 8}, capacity}, x, false);
  }
  check_merge({"counts", {0, 50, 60, 70, 80}, {-3, 0, 2000000000, 2000000000}, 30}, x, false);
  check_merge({"lies", {5, -3, 80, 1000000, 4, 12}, {3, 2, 8, 4, 4}, 30}, x, true, 3);
  check_merge({"no segments", {0}, {}, 3}, x, false);
  check_merge({"no rows", {0, 0}, {4}, 4}, Matrix(FloatType::kFloat32, 0, 4, 0, normal(1)), false);
}

}  // namespace

int main() {
  lengths_dtypes_and_strides();
  numbers_that_cancel();
  rounding_does_not_grow_with_the_number_of_channels();
  equal_rows_are_equally_far_from_others_in_every_tile();
  rows_that_are_no_numbers();
  neighbours_clusters_and_capacity();
  ties_go_to_the_lower_row_and_the_better_center();
  many_segments_and_boundaries_that_lie();
  long_segments_have_a_panel_of_bounded_size();
  means_are_sums_in_the_order_of_rows();
  return 0;
}
