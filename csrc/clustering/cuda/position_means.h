// Means over frames on a CUDA device: the torch-free interface.

#pragma once

#include "clustering/cuda/clustering.h"

namespace pruneops {

struct CudaPositionMeansParams {
  CudaRows x;
  const int32_t* cu_seqlens;     // [num_segments + 1] any values
  const int32_t* num_positions;  // [num_segments] negative numbers act as 0
  int64_t num_segments;
  int64_t capacity;
  void* means;           // out [capacity, channels], of x.type, 16-byte aligned
  float* similarity;     // out [capacity]
  int64_t* offsets;      // scratch [num_segments + 1] positions of the segments before
  int32_t* bounds;       // scratch [num_segments + 1]
  float* inverse_norms;  // scratch [total]
};

// Two launches on `stream`.
cudaError_t launch_position_means(const CudaPositionMeansParams& params, cudaStream_t stream);

}  // namespace pruneops
