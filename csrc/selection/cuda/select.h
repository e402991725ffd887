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
  int32_t* indices;         // out [capacity]: kept rows, ascending; -1 behind the last
  int32_t* cu_seqlens_out;  // out [num_segments + 1]
};

// Sizes of a launch. They follow from the parameters that the host knows, not from lengths.
struct CudaSelectPlan {
  int32_t num_threads;      // of a block, a power of two from 32 to 1024
  int64_t key_capacity;     // rows of a segment that one block takes; several share a longer one
  int64_t stretch_rows;     // rows of a longer one that a block takes, at most key_capacity
  int64_t max_long;         // most segments that may be longer
  int64_t max_stretches;    // most blocks that they may need
  int64_t workspace_bytes;  // 0 if none is needed
};

CudaSelectPlan plan_select(const CudaSelectParams& params);

// Two launches, or one where no workspace is needed; all on `stream`.
//   workspace  scratch of plan.workspace_bytes, 16-byte aligned
cudaError_t launch_select(const CudaSelectParams& params, const CudaSelectPlan& plan,
                          void* workspace, cudaStream_t stream);

}  // namespace pruneops
