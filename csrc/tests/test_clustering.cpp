// Clustering on every instruction set: right within rounding, and the same bytes whether distances
// are stored or not, on one thread or two.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "clustering/clustering.h"
#include "common/cpu_features.h"

namespace {

using pruneops::ClusterKernels;
using pruneops::DpcParams;
using pruneops::FloatType;
using pruneops::Isa;
using pruneops::MeanParams;
using pruneops::ParallelFor;

// Vectors of exactly the size that is written, so that the sanitizers see any step outside.
struct Result {
  std::vector<int32_t> ids, centers;
  std::vector<float> density, delta, score;

  bool operator==(const Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return ids == other.ids && centers == other.centers && same(density, other.density) &&
           same(delta, other.delta) && same(score, other.score);
  }
};

struct Case {
  std::vector<float> x;  // [rows, stride]
  std::vector<float> noise;
  std::vector<int32_t> cu_seqlens, cu_clusters;
  int64_t channels, stride, k;
};

Result cluster(const Case& c, const ClusterKernels& kernels, int64_t max_stored_rows,
               const ParallelFor& parallel) {
  const size_t rows = static_cast<size_t>(c.cu_seqlens.back());
  Result r;
  r.ids.assign(rows, -7);
  r.centers.assign(static_cast<size_t>(c.cu_clusters.back()), -7);
  r.density.assign(rows, -7.0f);
  r.delta.assign(rows, -7.0f);
  r.score.assign(rows, -7.0f);
  DpcParams p{};
  p.x = c.x.data();
  p.type = FloatType::kFloat32;
  p.row_stride = c.stride;
  p.channels = c.channels;
  p.cu_seqlens = c.cu_seqlens.data();
  p.num_segments = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
  p.cu_clusters = c.cu_clusters.data();
  p.noise = c.noise.empty() ? nullptr : c.noise.data();
  p.k = c.k;
  p.max_stored_rows = max_stored_rows;
  p.cluster_ids = r.ids.data();
  p.center_indices = r.centers.data();
  p.density = r.density.data();
  p.delta = r.delta.data();
  p.score = r.score.data();
  pruneops::dpc_knn(p, kernels, parallel);
  return r;
}

double squared_distance(const Case& c, int64_t i, int64_t j) {
  double sum = 0.0;
  for (int64_t d = 0; d < c.channels; ++d) {
    const double difference = static_cast<double>(c.x[i * c.stride + d]) - c.x[j * c.stride + d];
    sum += difference * difference;
  }
  return std::isnan(sum) && i != j ? std::numeric_limits<double>::infinity()
         : i == j                  ? 0.0
                                   : sum / static_cast<double>(c.channels);
}

// Everything that follows from the densities found, checked against double arithmetic.
void check_values(const Case& c, const Result& r) {
  for (size_t b = 0; b + 1 < c.cu_seqlens.size(); ++b) {
    const int64_t begin = c.cu_seqlens[b], end = c.cu_seqlens[b + 1];
    double largest = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = begin; j < end; ++j) largest = std::max(largest, squared_distance(c, i, j));
    }
    const double slack = 1e-6 * std::sqrt(largest);
    for (int64_t i = begin; i < end; ++i) {
      std::vector<double> row;
      double delta = std::numeric_limits<double>::infinity();
      for (int64_t j = begin; j < end; ++j) {
        row.push_back(squared_distance(c, i, j));
        const bool tie = c.noise.empty() && r.density[j] == r.density[i] && j < i;
        if (r.density[j] > r.density[i] || tie) delta = std::min(delta, std::sqrt(row.back()));
      }
      std::sort(row.begin(), row.end());
      const size_t k = static_cast<size_t>(std::min(c.k, end - begin));
      double sum = 0.0;
      for (size_t n = 0; n < k; ++n) sum += row[n];
      const double noise = c.noise.empty() ? 0.0 : c.noise[i] * 1e-6;
      CHECK(std::fabs(r.density[i] - (std::exp(-sum / static_cast<double>(k)) + noise)) < 2e-6);
      if (!(delta < std::numeric_limits<double>::infinity())) delta = std::sqrt(largest);
      CHECK(r.delta[i] == delta || std::fabs(r.delta[i] - delta) <= slack);
      const int32_t first = c.cu_clusters[b], last = c.cu_clusters[b + 1];
      if (first == last) {
        CHECK(r.ids[i] == -1);
        continue;
      }
      CHECK(r.ids[i] >= 0 && r.ids[i] < last - first);
      const int64_t own = r.centers[first + r.ids[i]];
      bool is_center = false;
      for (int32_t n = first; n < last; ++n) is_center = is_center || r.centers[n] == i;
      CHECK(!is_center || own == i);
      for (int32_t n = first; n < last && !is_center; ++n) {
        const double other = std::sqrt(squared_distance(c, i, r.centers[n]));
        CHECK(std::sqrt(squared_distance(c, i, own)) <= other + slack);
      }
    }
  }
}

Case make_case(const std::vector<int32_t>& lengths, int64_t channels, int64_t k, int kind,
               std::mt19937& random) {
  Case c;
  c.channels = channels;
  c.stride = channels + 3;
  c.k = k;
  c.cu_seqlens = {0};
  c.cu_clusters = {0};
  for (size_t b = 0; b < lengths.size(); ++b) {
    c.cu_seqlens.push_back(c.cu_seqlens.back() + lengths[b]);
    // Also segments that keep no centre.
    const int32_t clusters = b % 4 == 3 ? 0 : std::min(lengths[b], 1 + lengths[b] / 3);
    c.cu_clusters.push_back(c.cu_clusters.back() + clusters);
  }
  std::normal_distribution<float> normal;
  const int64_t rows = c.cu_seqlens.back();
  c.x.resize(static_cast<size_t>(rows * c.stride));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < c.stride; ++d) {
      float& value = c.x[static_cast<size_t>(i * c.stride + d)];
      if (kind == 0) value = normal(random);
      if (kind == 1) value = static_cast<float>(random() % 3);
      if (kind == 2) value = 50.0f + static_cast<float>((i * 7 + d) % 5) + 0.01f * normal(random);
      if (kind == 3) value = i % 6 == 2 ? NAN : normal(random);
    }
  }
  if (kind == 0) {
    for (int64_t i = 0; i < rows; ++i) c.noise.push_back(static_cast<float>(random() % 16) / 16);
  }
  return c;
}

void check_clustering(const ClusterKernels& kernels) {
  std::mt19937 random(3);
  const std::vector<std::vector<int32_t>> batches = {
      {}, {0}, {1}, {2, 0, 5, 9, 1, 3}, {15, 16, 17, 31, 33}, {130}, {70, 4, 3, 0, 49, 64}};
  for (const std::vector<int32_t>& lengths : batches) {
    for (int kind = 0; kind < 4; ++kind) {
      for (const int64_t channels : {1, 5, 48, 300}) {
        for (const int64_t k : {1, 7, 40}) {
          const Case c = make_case(lengths, channels, k, kind, random);
          const Result stored =
              cluster(c, kernels, pruneops::kMaxStoredRows, pruneops::testing::serial());
          check_values(c, stored);
          const ParallelFor two = pruneops::testing::two_threads();
          CHECK(stored == cluster(c, kernels, pruneops::kMaxStoredRows, two));
          CHECK(stored == cluster(c, kernels, 0, pruneops::testing::serial()));
          CHECK(stored == cluster(c, kernels, 0, two));
          CHECK(stored == cluster(c, kernels, 32, two));
        }
      }
    }
  }
}

void check_means(const ClusterKernels& kernels) {
  std::mt19937 random(5);
  for (const int64_t channels : {0, 1, 7, 16, 150}) {
    constexpr int64_t kRows = 23;
    std::vector<float> x(static_cast<size_t>(kRows * channels)), weights(kRows);
    for (float& value : x) value = static_cast<float>(random() % 100);
    for (float& value : weights) value = static_cast<float>(random() % 3);
    const std::vector<int32_t> begin = {0, 4, 4, 5, 20};
    std::vector<int32_t> members;
    for (int32_t i = 0; i < 20; ++i) members.push_back(i + i / 8);
    for (const bool weighted : {false, true}) {
      std::vector<float> merged(static_cast<size_t>(4 * channels), -7.0f);
      MeanParams p{};
      p.x = x.data();
      p.type = FloatType::kFloat32;
      p.row_stride = channels;
      p.channels = channels;
      p.weights = weighted ? weights.data() : nullptr;
      p.member_begin = begin.data();
      p.members = members.data();
      p.clusters = 4;
      p.merged = merged.data();
      pruneops::merge_mean(p, kernels, pruneops::testing::two_threads());
      for (int64_t cluster = 0; cluster < 4; ++cluster) {
        for (int64_t c = 0; c < channels; ++c) {
          float sum = 0.0f, weight = 0.0f;
          for (int32_t n = begin[cluster]; n < begin[cluster + 1]; ++n) {
            const float w = weighted ? weights[members[n]] : 1.0f;
            sum += w * x[members[n] * channels + c];
            weight += w;
          }
          // Whole numbers: the sums are exact.
          CHECK(merged[cluster * channels + c] == (weight == 0.0f ? 0.0f : sum / weight));
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > pruneops::best_isa()) continue;
    check_clustering(pruneops::cluster_kernels(isa));
    check_means(pruneops::cluster_kernels(isa));
  }
  return 0;
}
