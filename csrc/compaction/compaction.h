// Moving rows of packed tensors: the torch-free interface.

#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace pruneops {

// One tensor that takes part in a gather: rows are dimension 0, everything behind it is contiguous.
struct RowCopy {
  const char* src;         // [num_src_rows] rows of row_bytes each, src_row_stride bytes apart
  int64_t src_row_stride;  // bytes; 0 and overlapping rows are fine
  char* dst;               // [num_rows, row_bytes], dense
  int64_t row_bytes;
};

struct GatherParams {
  const RowCopy* copies;  // [num_copies]
  int64_t num_copies;
  const int32_t* indices;  // [num_rows]; anything outside [0, num_src_rows) yields a zero row
  int64_t num_rows;
  int64_t num_src_rows;
};

// dst[i] = src[indices[i]] for every tensor in one parallel launch; deterministic.
void gather_rows(const GatherParams& params, const ParallelFor& parallel);

// inverse[indices[i]] = i, -1 where no index points. Entries outside [0, total) are ignored, and of
// equal entries the last one wins. A scatter is a gather with the inverse.
//   indices  [num_indices], int32
//   inverse  [total], int32
void invert_indices(const int32_t* indices, int64_t num_indices, int32_t* inverse, int64_t total);

}  // namespace pruneops
