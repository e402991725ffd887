// How much attention each key receives, on a CUDA device: the torch-free interface. Lengths are
// known to the device only, so the host plans with totals and kernels find their segments
// themselves.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "attention/attention.h"

namespace pruneops {

struct CudaScoreParams {
  RowView q;  // [total_q, num_heads_q, head_dim]
  RowView k;  // [total_k, num_heads_k, head_dim]
  Heads heads;
  const int32_t* cu_seqlens_q;  // [num_segments + 1] any values: clamped, made non-decreasing
  const int32_t* cu_seqlens_k;  // [num_segments + 1] likewise
  int64_t num_segments;
  int64_t total_q;
  int64_t total_k;
  Visibility visibility;
  float softmax_scale;
  Reduce head_reduce;
  Reduce query_reduce;
  const float* softmax_lse;  // [num_heads_q, total_q], or null: computed. Unused with few queries
  float* scores;             // out [total_k]: every entry is written
  int32_t* bounds;           // scratch [2, num_segments + 1]
  float* workspace;          // scratch [ScorePlan::workspace_floats], 16-byte aligned
};

// How the work is cut; a function of sizes alone, so that results do not depend on the device.
struct ScorePlan {
  bool few_queries;      // the kernels for a few query rows a segment, which read keys in place
  bool on_tensor_cores;  // of the others, those of tile_scores.h
  int32_t num_splits;    // few: of a segment's keys; else: of its query tiles
  int32_t tile_keys;     // few: packed keys of a block in the second pass
  int64_t workspace_floats;
};

// Reads the sizes, types and strides in `params`, how it reduces, and whether softmax_lse is null.
//   often_few_queries  query rows were chosen: last_query_scores
ScorePlan plan_scores(const CudaScoreParams& params, bool often_few_queries);

// Three to four launches on `stream`, no synchronisation; the same for every content of the
// tensors.
cudaError_t launch_scores(const CudaScoreParams& params, const ScorePlan& plan,
                          cudaStream_t stream);

struct CudaPositions {
  const void* data;  // [total], int64 or int32
  bool is_int64;
};

// kv_limit[i] = number of keys of the query's segment whose position is at most the query's own; 0
// for rows without a segment. Key positions ascend within a segment; if they do not, the result is
// within [0, k_len].
struct CudaKvLimitParams {
  CudaPositions positions_q;    // [total_q]
  CudaPositions positions_k;    // [total_k]
  const int32_t* cu_seqlens_q;  // [num_segments + 1] any values
  const int32_t* cu_seqlens_k;  // [num_segments + 1] any values
  int64_t num_segments;
  int64_t total_q;
  int64_t total_k;
  int32_t* bounds;    // scratch [2, num_segments + 1]
  int32_t* kv_limit;  // out [total_q]
};

cudaError_t launch_kv_limit(const CudaKvLimitParams& params, cudaStream_t stream);

}  // namespace pruneops
