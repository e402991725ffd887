// The CUDA kernel of means over frames, run on the CPU: any lengths, dtypes and strides, boundaries
// and counts that lie, outputs and scratch full of poison, in several orders of threads and blocks.

#include "clustering/cuda/position_means.cu"
#include "position_means_case.h"

namespace {

using pruneops::FloatType;
using pruneops::testing::PositionCase;
using pruneops::testing::PositionRowsOf;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

void check(const PositionCase& c, size_t num_schedules = 1) {
  const PositionRowsOf x(c);
  const size_t num = c.cu_seqlens.size(), size = static_cast<size_t>(c.capacity * c.channels);
  for (size_t s = 0; s < num_schedules; ++s) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const bool single = c.type == FloatType::kFloat32;
    std::vector<float> means(single ? size : 0, kNan), inverse_norms(c.total, kNan);
    std::vector<uint16_t> halves(single ? 0 : size, 0xffff);
    std::vector<float> similarity(c.capacity, -7.0f);
    std::vector<int32_t> bounds(num, -1);
    std::vector<int64_t> offsets(num, -1);
    pruneops::CudaPositionMeansParams p{};
    p.x = {x.data(), c.type, x.stride, c.total, c.channels};
    p.cu_seqlens = c.cu_seqlens.data();
    p.num_positions = c.num_positions.data();
    p.num_segments = static_cast<int64_t>(num) - 1;
    p.capacity = c.capacity;
    p.means = single ? static_cast<void*>(means.data()) : halves.data();
    p.similarity = similarity.data();
    p.offsets = offsets.data();
    p.bounds = bounds.data();
    p.inverse_norms = inverse_norms.data();
    CHECK(pruneops::launch_position_means(p, nullptr) == cudaSuccess);
    check_positions(c, x, means, halves, similarity);
  }
  cuda_on_host::schedule = {};
}

}  // namespace

int main() {
  for (const FloatType type : kTypes) {
    check({"frames", {0, 20, 20, 27, 100}, {5, 3, 7, 2}, 17, 103, 40, 0, type}, 6);
    for (const int64_t channels : {0, 1, 3, 64, 259, 1030}) {
      check({"channels", {0, 30}, {4}, 4, 30, channels, channels % 2, type});
    }
    check({"many frames", {0, 90}, {1}, 1, 90, 20, 4, type}, 2);
  }
  for (const int64_t capacity : {0, 1, 4, 5, 9}) {
    check({"capacity", {0, 12, 20}, {4, 4}, capacity, 20, 8, 0});
  }
  check({"counts", {0, 5, 6, 7, 8}, {-3, 0, 2000000000, 2000000000}, 6, 8, 8, 0});
  check({"lies", {5, -3, 8, 1000000, 4, 12}, {3, 2, 4, 4, 4}, 20, 30, 8, 0}, 3);
  check({"no segments", {0}, {}, 3, 5, 8, 0});
  check({"no rows", {0, 0}, {2}, 2, 0, 8, 0});
  return 0;
}
