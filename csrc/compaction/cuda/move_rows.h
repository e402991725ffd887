// Moving rows of packed tensors on a CUDA device: the torch-free interface.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneops {

// As many tensors share one launch; they travel in the kernel's parameters.
constexpr int kMaxMovedTensors = 32;
// Up to this many indices a scatter finds its rows by itself; above, inverse is needed.
constexpr int64_t kMaxScannedIndices = 2048;

// One tensor that takes part. The caller fills the first block, the launchers the second.
struct MovedTensor {
  const char* src;         // [source rows] rows of row_bytes each, src_row_stride bytes apart
  int64_t src_row_stride;  // bytes; 0 and overlapping rows are fine
  char* dst;               // [num_rows, row_bytes], dense
  int64_t row_bytes;

  int32_t unit_bytes;       // what one thread moves at once: 16, or less where the alignment asks
  int32_t lanes_log2;       // 2^lanes_log2 neighbouring threads share a row
  int64_t row_units;        // row_bytes / unit_bytes
  int64_t tiles_per_group;  // tiles that a group of rows is cut into
  int64_t end_tile;         // number of tiles of this tensor and all before it
};

struct MoveParams {
  MovedTensor tensors[kMaxMovedTensors];
  int32_t num_tensors;     // 0 <= num_tensors <= kMaxMovedTensors
  const int32_t* indices;  // [num_indices]
  int64_t num_indices;
  int64_t num_rows;      // rows of every dst
  int64_t num_src_rows;  // rows of every src
};

// dst[i] = src[indices[i]]; a zero row where indices[i] is not a source row. num_rows =
// num_indices. One launch.
cudaError_t launch_gather_rows(MoveParams params, cudaStream_t stream);

// dst[indices[i]] = src[i], zero rows elsewhere; indices outside dst are ignored, of equal ones the
// last wins. num_src_rows = num_indices. One launch, or three with `inverse`.
//   inverse  scratch [num_rows], for more than kMaxScannedIndices indices; else unused
cudaError_t launch_scatter_rows(MoveParams params, int32_t* inverse, cudaStream_t stream);

}  // namespace pruneops
