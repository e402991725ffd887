// The CUDA gather and scatter move every byte of every row, whatever the row lengths and
// alignments, and touch no other.

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "compaction/cuda/move_rows.cu"

namespace {

using pruneops::MoveParams;

// A tensor whose rows lie row_bytes + padding apart, `shift` bytes behind a 16-byte boundary.
struct Rows {
  int64_t row_bytes;
  int64_t padding;
  int64_t shift;
};

struct alignas(16) Aligned {
  char bytes[16];
};

struct Buffer {
  std::vector<Aligned> storage;
  int64_t shift;

  Buffer(int64_t size, int64_t shift) : storage((size + shift + 15) / 16), shift(shift) {}
  char* data() { return reinterpret_cast<char*>(storage.data()) + shift; }
};

struct Moved {
  Rows rows;
  Buffer src;
  std::vector<char> expected;
  Buffer dst;
};

Moved make(const Rows& rows, int64_t num_src, int64_t num_dst) {
  const int64_t stride = rows.row_bytes + rows.padding;
  Moved m{rows, Buffer(num_src * stride, rows.shift), std::vector<char>(num_dst * rows.row_bytes),
          Buffer(num_dst * rows.row_bytes, rows.shift)};
  for (int64_t i = 0; i < num_src * stride; ++i)
    m.src.data()[i] = static_cast<char>(i * 31 + i / 256 + 1);
  for (Aligned& block : m.dst.storage) std::memset(block.bytes, 99, sizeof(block.bytes));
  return m;
}

const char* src_row(Moved& m, int64_t row) {
  return m.src.data() + row * (m.rows.row_bytes + m.rows.padding);
}

enum class Direction { kGather, kScatter };

void check(Direction direction, const std::vector<Rows>& shapes,
           const std::vector<int32_t>& indices, int64_t num_src, int64_t num_dst) {
  std::vector<Moved> moved;
  for (const Rows& rows : shapes) moved.push_back(make(rows, num_src, num_dst));
  MoveParams p{};
  p.num_tensors = static_cast<int32_t>(moved.size());
  p.indices = indices.data();
  p.num_indices = static_cast<int64_t>(indices.size());
  p.num_rows = num_dst;
  p.num_src_rows = num_src;
  for (size_t t = 0; t < moved.size(); ++t) {
    Moved& m = moved[t];
    p.tensors[t].src = m.src.data();
    p.tensors[t].src_row_stride = m.rows.row_bytes + m.rows.padding;
    p.tensors[t].dst = m.dst.data();
    p.tensors[t].row_bytes = m.rows.row_bytes;
    for (size_t i = 0; i < indices.size(); ++i) {
      const int64_t source = direction == Direction::kGather ? indices[i] : static_cast<int64_t>(i);
      const int64_t target = direction == Direction::kGather ? static_cast<int64_t>(i) : indices[i];
      if (source < 0 || source >= num_src || target < 0 || target >= num_dst) continue;
      std::copy_n(src_row(m, source), m.rows.row_bytes,
                  m.expected.data() + target * m.rows.row_bytes);
    }
  }
  std::vector<int32_t> inverse(num_dst, -7);
  CHECK((direction == Direction::kGather
             ? pruneops::launch_gather_rows(p, nullptr)
             : pruneops::launch_scatter_rows(p, inverse.data(), nullptr)) == cudaSuccess);
  for (Moved& m : moved) {
    CHECK(std::equal(m.expected.begin(), m.expected.end(), m.dst.data()));
    // Nothing before or behind the rows was written.
    const char* storage = reinterpret_cast<const char*>(m.dst.storage.data());
    const int64_t end = m.rows.shift + static_cast<int64_t>(m.expected.size());
    for (int64_t i = 0; i < m.rows.shift; ++i) CHECK(storage[i] == 99);
    for (int64_t i = end; i < static_cast<int64_t>(m.dst.storage.size() * sizeof(Aligned)); ++i)
      CHECK(storage[i] == 99);
  }
}

std::vector<int32_t> some_indices(int64_t count, int64_t limit) {
  std::vector<int32_t> indices = {3, 4, 5, -1, -1, INT32_MIN, INT32_MAX, 0, 0, 7};
  std::mt19937 random(3);
  while (static_cast<int64_t>(indices.size()) < count) {
    indices.push_back(static_cast<int32_t>(random() % (limit + 10)) - 5);
  }
  indices.resize(count);
  return indices;
}

void check_shapes() {
  std::vector<Rows> all;
  for (int64_t row_bytes : {0, 1, 2, 3, 4, 8, 12, 16, 40, 48, 1000, 4096}) {
    check(Direction::kGather, {{row_bytes, 0, 0}}, some_indices(37, 50), 50, 37);
    check(Direction::kGather, {{row_bytes, 5, 0}}, some_indices(12, 50), 50, 12);
    check(Direction::kGather, {{row_bytes, 0, 4}}, some_indices(12, 50), 50, 12);
    check(Direction::kScatter, {{row_bytes, 0, 0}}, some_indices(37, 50), 37, 50);
    all.push_back({row_bytes, 16, row_bytes % 16});
  }
  check(Direction::kGather, all, some_indices(37, 50), 50, 37);
  check(Direction::kScatter, all, some_indices(37, 50), 37, 50);
}

// Tiles end inside the tensors: many rows of narrow ones, long rows of wide ones.
void check_tiles() {
  check(Direction::kGather, {{8, 0, 0}, {1, 0, 0}, {16, 0, 0}}, some_indices(2600, 3000), 3000,
        2600);
  check(Direction::kGather, {{40000, 0, 0}, {8, 0, 0}}, some_indices(6, 10), 10, 6);
  check(Direction::kScatter, {{20000, 0, 0}, {8, 0, 0}}, some_indices(6, 10), 6, 10);
  // Both ways of a scatter: the blocks look through the indices, or read them inverted.
  for (int64_t count : {pruneops::kMaxScannedIndices, pruneops::kMaxScannedIndices + 1}) {
    check(Direction::kScatter, {{4, 0, 0}, {80, 0, 0}}, some_indices(count, 1500), count, 1500);
  }
}

void check_nothing_to_do() {
  check(Direction::kGather, {{16, 0, 0}}, {}, 10, 0);
  check(Direction::kGather, {{16, 0, 0}}, {0, -1, 3}, 0, 3);
  check(Direction::kScatter, {{16, 0, 0}}, {}, 0, 7);
  check(Direction::kScatter, {{16, 0, 0}}, {0, 1}, 2, 0);
  check(Direction::kGather, {}, {0, 1}, 4, 2);
}

void check_as_many_tensors_as_fit() {
  check(Direction::kGather, std::vector<Rows>(pruneops::kMaxMovedTensors, Rows{24, 0, 0}),
        some_indices(20, 30), 30, 20);
}

}  // namespace

int main() {
  for (const cuda_on_host::Schedule& schedule : cuda_on_host::all_schedules()) {
    cuda_on_host::schedule = schedule;
    check_shapes();
    check_nothing_to_do();
    check_as_many_tensors_as_fit();
  }
  check_tiles();
  return 0;
}
