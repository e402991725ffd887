// Attention under a key policy on a CUDA device, forward and backward: the torch-free interface.
// See PolicyForwardParams in attention/attention.h for what it computes.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "attention/attention.h"

namespace pruneops {

struct CudaPolicyParams {
  RowView q;    // [total, num_heads_q, head_dim]
  RowView k;    // [total, num_heads_k, head_dim]
  RowView v;    // [total, num_heads_k, head_dim]
  RowView out;  // [total, num_heads_q, head_dim]
  Heads heads;
  const float* policy;        // [total]
  const int32_t* cu_seqlens;  // [num_segments + 1] any values: clamped, made non-decreasing
  int64_t num_segments;
  int64_t total;
  float softmax_scale;
  float epsilon;
  float* softmax_max;  // [num_heads_q, total] largest scaled score times log2(e), -inf without keys
  float* softmax_sum;  // [num_heads_q, total] without epsilon
  int32_t* bounds;     // scratch [2, num_segments + 1]
  int32_t* schedule;   // scratch [flash_schedule_ints(num_segments)], twice that in the backward
                       // pass, 16-byte aligned
  float* sums;         // scratch [num_segments, num_heads_k, head_dim]
};

// In the backward pass out, softmax_max and softmax_sum are inputs.
struct CudaPolicyBackwardParams {
  CudaPolicyParams forward;
  RowView dout;             // as forward.out
  RowView dq, dk, dv;       // as q, k and v: every row is written
  float* dpolicy;           // [total]: every entry is written
  float* dpolicy_of_heads;  // scratch [num_heads_k, total]
  float* delta;             // scratch [2 * flash_row_terms(total, num_heads_q)], 16-byte aligned
};

// Three launches, or six, on `stream`, no synchronisation; the same for every content of the
// tensors. On tensor cores for bf16 and fp16 of the head dims of the flash kernels, where rows
// begin on 16 bytes; otherwise on plain multiply-adds.
cudaError_t launch_policy_forward(const CudaPolicyParams& params, cudaStream_t stream);
cudaError_t launch_policy_backward(const CudaPolicyBackwardParams& params, cudaStream_t stream);

}  // namespace pruneops
