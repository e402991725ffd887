// Gather and its inverse, for every row length class and for indices that must be ignored.

#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "compaction/compaction.h"

namespace {

void check_gather(int64_t row_bytes, int64_t padding, const pruneops::ParallelFor& parallel) {
  const int64_t num_src = 50;
  const int64_t stride = row_bytes + padding;
  std::vector<char> src(num_src * stride);
  for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<char>(i * 31 + 1);
  std::vector<int32_t> indices = {3, 4, 5, -1, -1, 49, 50, INT32_MIN, INT32_MAX, 0, 0, 7};
  std::mt19937 random(3);
  for (int i = 0; i < 500; ++i) indices.push_back(static_cast<int32_t>(random() % 60) - 5);
  const int64_t num_rows = static_cast<int64_t>(indices.size());
  std::vector<char> dst(num_rows * row_bytes, 99);
  const pruneops::RowCopy copy{src.data(), stride, dst.data(), row_bytes};
  pruneops::gather_rows({&copy, 1, indices.data(), num_rows, num_src}, parallel);
  for (int64_t i = 0; i < num_rows; ++i) {
    const bool valid = indices[i] >= 0 && indices[i] < num_src;
    for (int64_t b = 0; b < row_bytes; ++b) {
      CHECK(dst[i * row_bytes + b] == (valid ? src[indices[i] * stride + b] : 0));
    }
  }
}

void check_inverse() {
  const int32_t indices[6] = {2, -1, 0, 2, 9, INT32_MAX};
  int32_t inverse[4];
  pruneops::invert_indices(indices, 6, inverse, 4);
  const int32_t expected[4] = {2, -1, 3, -1};
  CHECK(std::memcmp(inverse, expected, sizeof(expected)) == 0);
}

}  // namespace

int main() {
  for (int64_t row_bytes : {0, 1, 2, 3, 4, 8, 12, 16, 40, 1000}) {
    for (int64_t padding : {0, 5}) {
      check_gather(row_bytes, padding, pruneops::testing::serial());
      check_gather(row_bytes, padding, pruneops::testing::two_threads());
    }
  }
  check_inverse();
  return 0;
}
