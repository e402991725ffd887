// Selection on a CUDA device: the torch-free interface.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/float_types.h"

namespace pruneops {

struct CudaSelectParams {
  const void* scores;  // [total], of score_type
  FloatType score_type;
  const uint8_t* protect;  // [total], nonzero = always kept; or null
  const int32_t*
      cu_seqlens;  // [num_segments + 1], any values: clamped to [0, total], made monotone
  const int32_t* keep_counts;  // [num_segments], unprotected rows to keep at least; or null for 0
  bool use_threshold;          // also keep every score > threshold
  float threshold;
  int32_t num_sms;           // of the device
  int64_t max_shared_bytes;  // that a block on the device may have if it asks
  int64_t total;
  int64_t num_segments;
  int64_t capacity;
  int32_t* bounds;               // scratch [num_segments + 1]; unused for fewer than 2 segments
  unsigned long long* progress;  // scratch [num_segments + 1]; unused likewise
  int32_t* indices;              // out [capacity]: kept rows, ascending; -1 behind the last
  int32_t* cu_seqlens_out;       // out [num_segments + 1]
};

// Two launches, or one where there are fewer than two segments; all on `stream`.
cudaError_t launch_select(const CudaSelectParams& params, cudaStream_t stream);

}  // namespace pruneops
