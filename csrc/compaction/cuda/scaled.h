// Putting computed rows back among skipped ones on a CUDA device: the torch-free interface.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/float_types.h"
#include "common/rows.h"

namespace pruneops {

struct CudaScatterScaledParams {
  Rows x;                  // [total, columns], of `type`; not read where an index points
  Rows residual;           // [kept, columns], of `type`
  Rows branch;             // [kept, columns], of `type`
  const float* weights;    // [total]
  const int32_t* indices;  // [kept]; out of range: ignored, of equal ones the last counts
  void* out;               // [total, columns], dense, of `type`
  FloatType type;
  int64_t total;
  int64_t kept;
  int64_t columns;
};

// out[t] = residual[i] + weights[t] * branch[i] where t = indices[i], weights[t] * x[t] elsewhere.
// One launch. The result does not depend on num_sms, which decides how rows share blocks.
cudaError_t launch_scatter_scaled(const CudaScatterScaledParams& params, int num_sms,
                                  cudaStream_t stream);

struct CudaScatterScaledGradParams {
  Rows dout;               // [total, columns], of `type`
  Rows x;                  // [total, columns], of `type`
  Rows branch;             // [kept, columns], of `type`
  const float* weights;    // [total]
  const int32_t* indices;  // [kept], as above
  void* dx;                // [total, columns], dense, of `type`
  void* dresidual;         // [kept, columns], dense, of `type`
  void* dbranch;           // [kept, columns], dense, of `type`
  float* dweights;         // [total]
  FloatType type;
  int64_t total;
  int64_t kept;
  int64_t columns;
};

// The gradients of the above; rows that the forward pass did not read get 0. One launch.
cudaError_t launch_scatter_scaled_backward(const CudaScatterScaledGradParams& params, int num_sms,
                                           cudaStream_t stream);

}  // namespace pruneops
