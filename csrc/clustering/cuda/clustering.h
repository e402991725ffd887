// Clustering on a CUDA device: the torch-free interface. Lengths are known to the device only, so
// the host plans with totals and upper bounds.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/float_types.h"

namespace pruneops {

// Rows of fp32, bf16 or fp16 with contiguous elements.
struct CudaRows {
  const void* data;  // [total, channels], of type
  FloatType type;
  int64_t row_stride;  // elements
  int64_t total;
  int64_t channels;
};

// How distances are kept; a function of sizes alone.
struct DpcKnnPlan {
  // Every distance is computed once and kept, for one triangle of a segment's matrix. Otherwise the
  // buffer has a panel of rows, and each pass computes its panels anew.
  bool whole;
  int64_t panel_rows;
  int64_t pitch;  // floats between rows of the buffer
  int64_t distance_floats() const { return panel_rows * pitch; }
};

struct CudaDpcKnnParams {
  CudaRows x;
  const int32_t* cu_seqlens;    // [num_segments + 1] any values: clamped, made non-decreasing
  const int32_t* num_clusters;  // [num_segments] clamped to between 1 and the length
  const float* noise;           // [total] or null
  int64_t num_segments;
  int64_t k;           // at least 1
  int64_t max_seqlen;  // rows of a segment past this many belong to no segment
  int64_t capacity;

  int32_t* cluster_ids;     // out [total]
  int32_t* center_indices;  // out [capacity]
  int32_t* cu_clusters;     // out [num_segments + 1]
  float* density;           // out [total]
  float* delta;             // out [total]
  float* score;             // out [total]

  int64_t* items;          // scratch [num_segments + 1] work items of the segments before
  float* distances;        // scratch [plan.panel_rows, plan.pitch], 16-byte aligned
  float* norms;            // scratch [2, total]
  int32_t* ranks;          // scratch [total] by score, within the segment
  int32_t* bounds;         // scratch [num_segments + 1]
  int32_t* votes;          // scratch [num_segments] rows for which shifting pays off
  uint32_t* max_distance;  // scratch [num_segments] bits of a float that is not negative
};

DpcKnnPlan plan_dpc_knn(int64_t total, int64_t max_seqlen);

// Seven launches where all distances are kept, else three and six for every panel; on `stream`, the
// same for every content of the tensors.
cudaError_t launch_dpc_knn(const CudaDpcKnnParams& params, const DpcKnnPlan& plan,
                           cudaStream_t stream);

struct CudaMergeMeanParams {
  CudaRows x;
  const int32_t* cluster_ids;   // [total] any values: rows outside the segment's clusters are left
  const int32_t* cu_seqlens;    // [num_segments + 1] any values
  const int32_t* num_clusters;  // [num_segments] negative counts act as 0
  const float* weights;         // [total] or null
  int64_t num_segments;
  int64_t capacity;
  void* merged;      // out [capacity, channels], of x.type, 16-byte aligned
  int32_t* counts;   // out [capacity]
  int64_t* offsets;  // scratch [num_segments + 1] clusters of the segments before
  int32_t* bounds;   // scratch [num_segments + 1]
};

// Two launches on `stream`.
cudaError_t launch_merge_mean(const CudaMergeMeanParams& params, cudaStream_t stream);

}  // namespace pruneops
