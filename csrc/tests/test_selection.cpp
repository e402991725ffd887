// Every instruction set keeps exactly what a sort by the documented order keeps.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/cpu_features.h"
#include "common/segments.h"
#include "selection/selection.h"

namespace {

using pruneops::Isa;
using pruneops::SegmentCut;
using pruneops::SelectKernels;
using pruneops::SelectParams;

// a before b: higher score first, NaN last, ties by index.
struct BestFirst {
  const std::vector<float>& scores;
  bool operator()(int a, int b) const {
    const float x = scores[a];
    const float y = scores[b];
    if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
    if (!std::isnan(x) && x != y) return x > y;
    return a < b;
  }
};

std::vector<int32_t> expected_rows(const std::vector<float>& scores,
                                   const std::vector<uint8_t>& protect, int keep,
                                   bool use_threshold, float threshold) {
  std::vector<int> free_rows;
  std::vector<int32_t> kept;
  for (int i = 0; i < static_cast<int>(scores.size()); ++i) {
    if (!protect.empty() && protect[i] != 0) {
      kept.push_back(i);
    } else {
      free_rows.push_back(i);
    }
  }
  std::sort(free_rows.begin(), free_rows.end(), BestFirst{scores});
  for (int rank = 0; rank < static_cast<int>(free_rows.size()); ++rank) {
    const int row = free_rows[rank];
    if (rank < keep || (use_threshold && scores[row] > threshold)) kept.push_back(row);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

void check_case(const SelectKernels& kernels, const std::vector<float>& scores,
                const std::vector<uint8_t>& protect, int32_t keep, bool use_threshold,
                float threshold) {
  const int32_t n = static_cast<int32_t>(scores.size());
  const int32_t cu_seqlens[2] = {0, n};
  std::vector<int32_t> keys(n);
  SegmentCut cut{};
  SelectParams p{};
  p.scores = scores.data();
  p.score_type = pruneops::FloatType::kFloat32;
  p.protect = protect.empty() ? nullptr : protect.data();
  p.cu_seqlens = cu_seqlens;
  p.keep_counts = &keep;
  p.use_threshold = use_threshold;
  p.threshold = threshold;
  p.num_segments = 1;
  p.keys = keys.data();
  p.cuts = &cut;
  cut = kernels.cut(p, 0);

  const std::vector<int32_t> expected =
      expected_rows(scores, protect, keep, use_threshold, threshold);
  CHECK(cut.count == static_cast<int32_t>(expected.size()));
  for (int32_t limit : {cut.count, cut.count / 2, std::max(0, cut.count - 1)}) {
    // Exactly `limit` entries, so that the sanitizers see any write past them.
    std::vector<int32_t> out(limit, -7);
    kernels.emit(p, 0, out.data(), limit);
    CHECK(std::equal(out.begin(), out.end(), expected.begin()));
  }
}

void check_isa(const SelectKernels& kernels) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-42f, -1e-42f, 1.0f, -1.0f};
  std::mt19937 random(7);
  for (int n : {0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 100, 257}) {
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<float> scores(n);
      for (float& s : scores) {
        const int r = static_cast<int>(random() % 1000);
        s = kind == 0   ? std::sin(static_cast<float>(r))
            : kind == 1 ? special[r % 10]
                        : float(r % 3);
      }
      std::vector<uint8_t> protect(n);
      for (uint8_t& flag : protect) flag = random() % 4 == 0;
      for (int keep : {-3, 0, 1, n / 3, n / 2, n - 1, n, n + 5}) {
        for (const auto& mask : {std::vector<uint8_t>(), protect, std::vector<uint8_t>(n, 1)}) {
          check_case(kernels, scores, mask, keep, false, 0.0f);
          for (float threshold : {0.0f, 0.3f, inf, -inf, nan}) {
            check_case(kernels, scores, mask, keep, true, threshold);
          }
        }
      }
    }
  }
}

void check_boundaries_and_tail() {
  const float scores[6] = {5, 1, 4, 2, 3, 0};
  const int32_t bounds[5] = {0, 4, 2, 99, -1};
  int32_t cu_seqlens[5];
  pruneops::sanitize_cu_seqlens(bounds, 5, 6, cu_seqlens);
  const int32_t sane[5] = {0, 4, 4, 6, 6};
  CHECK(std::equal(sane, sane + 5, cu_seqlens));

  const int32_t keep[4] = {2, 1, 1, 1};
  int32_t keys[6];
  SegmentCut cuts[4];
  SelectParams p{};
  p.scores = scores;
  p.score_type = pruneops::FloatType::kFloat32;
  p.cu_seqlens = cu_seqlens;
  p.keep_counts = keep;
  p.num_segments = 4;
  p.keys = keys;
  p.cuts = cuts;
  pruneops::select_cuts(p, pruneops::testing::two_threads());
  int32_t offsets[5];
  CHECK(pruneops::select_offsets(p, 5, offsets) == 3);
  int32_t indices[5];
  pruneops::select_emit(p, offsets, indices, 5, pruneops::testing::two_threads());
  const int32_t expected[5] = {0, 2, 4, -1, -1};
  CHECK(std::equal(expected, expected + 5, indices));

  CHECK(pruneops::select_offsets(p, 1, offsets) == 3);
  pruneops::select_emit(p, offsets, indices, 1, pruneops::testing::serial());
  CHECK(offsets[4] == 1 && indices[0] == 0);
}

}  // namespace

int main() {
  check_isa(pruneops::select_kernels_scalar());
#if defined(PRUNEOPS_HAVE_AVX2)
  if (pruneops::best_isa() >= Isa::kAvx2) check_isa(pruneops::select_kernels_avx2());
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
  if (pruneops::best_isa() >= Isa::kAvx512) check_isa(pruneops::select_kernels_avx512());
#endif
  check_boundaries_and_tail();
  return 0;
}
