// Row gather. The work is memcpy, which libc already specialises for the machine, so there is one
// variant: long rows go through libc, runs of neighbouring rows become one copy, and rows as short
// as one scalar (positions, labels, masks) use fixed-size moves.

#include <algorithm>
#include <cstring>

#include "compaction/compaction.h"

namespace pruneops {
namespace {

// Below this much data a second thread costs more than it brings.
constexpr int64_t kBytesPerTask = 64 * 1024;

bool in_range(int32_t index, int64_t num_rows) {
  return static_cast<uint32_t>(index) < static_cast<uint64_t>(num_rows);
}

// Rows [begin, end) of one tensor whose rows are kBytes long.
template <int kBytes>
void copy_short_rows(const RowCopy& copy, const GatherParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    char row[kBytes] = {};
    if (in_range(p.indices[i], p.num_src_rows)) {
      std::memcpy(row, copy.src + p.indices[i] * copy.src_row_stride, kBytes);
    }
    std::memcpy(copy.dst + i * kBytes, row, kBytes);
  }
}

// Rows [begin, end) of one tensor with rows of any length.
void copy_rows(const RowCopy& copy, const GatherParams& p, int64_t begin, int64_t end) {
  const bool dense = copy.src_row_stride == copy.row_bytes;
  for (int64_t i = begin; i < end;) {
    const int64_t first = p.indices[i];
    char* dst = copy.dst + i * copy.row_bytes;
    int64_t run = 1;
    if (!in_range(p.indices[i], p.num_src_rows)) {
      while (i + run < end && !in_range(p.indices[i + run], p.num_src_rows)) ++run;
      std::memset(dst, 0, static_cast<size_t>(run * copy.row_bytes));
    } else {
      while (dense && i + run < end && p.indices[i + run] == first + run &&
             first + run < p.num_src_rows) {
        ++run;
      }
      std::memcpy(dst, copy.src + first * copy.src_row_stride,
                  static_cast<size_t>(run * copy.row_bytes));
    }
    i += run;
  }
}

void copy_tensor(const RowCopy& copy, const GatherParams& p, int64_t begin, int64_t end) {
  switch (copy.row_bytes) {
    case 0:
      return;
    case 1:
      return copy_short_rows<1>(copy, p, begin, end);
    case 2:
      return copy_short_rows<2>(copy, p, begin, end);
    case 4:
      return copy_short_rows<4>(copy, p, begin, end);
    case 8:
      return copy_short_rows<8>(copy, p, begin, end);
    case 16:
      return copy_short_rows<16>(copy, p, begin, end);
    default:
      return copy_rows(copy, p, begin, end);
  }
}

}  // namespace

void gather_rows(const GatherParams& p, const ParallelFor& parallel) {
  int64_t bytes_per_row = 1;
  for (int64_t t = 0; t < p.num_copies; ++t) bytes_per_row += p.copies[t].row_bytes;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / bytes_per_row);
  parallel_for(parallel, 0, p.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < p.num_copies; ++t) copy_tensor(p.copies[t], p, begin, end);
  });
}

void invert_indices(const int32_t* indices, int64_t num_indices, int32_t* inverse, int64_t total) {
  std::fill(inverse, inverse + total, -1);
  for (int64_t i = 0; i < num_indices; ++i) {
    if (in_range(indices[i], total)) inverse[indices[i]] = static_cast<int32_t>(i);
  }
}

}  // namespace pruneops
