// Attention of one new token a row against its cache slots, on a CUDA device: the torch-free
// interface. Lengths are known to the device only, so the host plans with the capacity and blocks
// find their keys themselves.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "attention/attention.h"

namespace pruneops {

struct CudaDecodeParams {
  RowView q;     // [batch, num_heads_q, head_dim]
  RowView k, v;  // slots [batch, capacity, num_heads_k, head_dim]
  RowView out;   // out [batch, num_heads_q, head_dim]
  Heads heads;
  const int32_t* lengths;  // [batch] keys in use, any values: clamped to [0, capacity]
  int64_t batch;
  int64_t capacity;
  float softmax_scale;
  float* softmax_lse;  // out [num_heads_q, batch]
  float* scores;       // out [batch, capacity]: every entry is written; or null
  float* workspace;    // scratch [DecodePlan::workspace_floats], 16-byte aligned
};

// How the work is cut; a function of sizes alone, so that results do not depend on the device.
struct DecodePlan {
  int32_t num_splits;  // of a row's keys
  int64_t partial_out_floats;
  int64_t partial_lse_floats;
  int64_t logits_floats;
  int64_t workspace_floats;
};

// Reads the sizes in `params`, and whether scores is null.
//   num_splits  as the caller wishes, cut to what makes sense; 0: chosen
DecodePlan plan_decode(const CudaDecodeParams& params, int64_t num_splits);

// One or two launches on `stream`, no synchronisation; the same for every content of the tensors.
cudaError_t launch_decode(const CudaDecodeParams& params, const DecodePlan& plan,
                          cudaStream_t stream);

}  // namespace pruneops
