// Means over frames on every instruction set: right within rounding, and the same bytes on one
// thread and on two.

#include <cstring>

#include "clustering/clustering.h"
#include "common/cpu_features.h"
#include "position_means_case.h"

namespace {

using pruneops::ClusterKernels;
using pruneops::FloatType;
using pruneops::Isa;
using pruneops::ParallelFor;
using pruneops::PositionRun;
using pruneops::testing::PositionCase;
using pruneops::testing::PositionRowsOf;

// Of one segment that starts at row 0.
std::vector<float> check(const PositionCase& c, const ClusterKernels& kernels,
                         const ParallelFor& parallel) {
  const PositionRowsOf x(c);
  const bool single = c.type == FloatType::kFloat32;
  const size_t size = static_cast<size_t>(c.capacity * c.channels);
  std::vector<float> means(single ? size : 0, -7.0f), similarity(c.capacity, -7.0f);
  std::vector<uint16_t> halves(single ? 0 : size, 0xffff);
  pruneops::PositionParams p{};
  p.x = x.data();
  p.type = c.type;
  p.row_stride = x.stride;
  p.channels = c.channels;
  p.means = single ? static_cast<void*>(means.data()) : halves.data();
  p.similarity = similarity.data();
  const PositionRun run{0, 0, c.capacity, c.num_positions[0], c.cu_seqlens[1] / c.num_positions[0]};
  pruneops::position_means(p, &run, 1, kernels, parallel);
  check_positions(c, x, means, halves, similarity);
  return similarity;
}

void check_isa(const ClusterKernels& kernels) {
  for (const FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
    for (const int64_t channels : {0, 1, 7, 16, 129, 500}) {
      for (const int32_t positions : {1, 5, 40}) {
        // More rows of a position than are taken at once, a frame that is not whole, no frame.
        for (const int32_t rows : {0, positions - 1, positions, 7 * positions + 3, 600}) {
          const PositionCase c{"rows " + std::to_string(rows),
                               {0, rows},
                               {positions},
                               positions,
                               rows,
                               channels,
                               channels % 3,
                               type};
          const std::vector<float> one = check(c, kernels, pruneops::testing::serial());
          const std::vector<float> two = check(c, kernels, pruneops::testing::two_threads());
          CHECK(std::memcmp(one.data(), two.data(), one.size() * sizeof(float)) == 0);
        }
      }
    }
  }
  // Too wide for the rows of one position to be in the cache together.
  check({"wide", {0, 27}, {3}, 3, 27, 20001, 0}, kernels, pruneops::testing::two_threads());
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > pruneops::best_isa()) continue;
    check_isa(pruneops::cluster_kernels(isa));
  }
  return 0;
}
