// The weight of a row from a learned logit on a CUDA device: the torch-free interface.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/float_types.h"
#include "common/rows.h"
#include "routing/routing.h"

namespace pruneops {

struct CudaRouterParams {
  Rows x;                 // [total, columns], of `type`; not read where target is 0
  const void* weight;     // [columns], dense, of `type`
  const void* bias;       // [1], of `type`, or null
  const uint8_t* target;  // [total], nonzero = routed; or null for all
  Activation activation;
  float scale;
  float shift;
  float* logits;   // [total], -inf where target is 0
  float* weights;  // [total], 1 where target is 0
  FloatType type;
  int64_t total;
  int64_t columns;
};

// logits[t] = x[t] . weight + bias, weights[t] = scale * activation(logits[t]) + shift. One launch.
cudaError_t launch_router_weights(const CudaRouterParams& params, cudaStream_t stream);

struct CudaRouterGradParams {
  const float* dweights;  // [total]
  const float* logits;    // [total], from the forward pass
  Rows x;                 // [total, columns], of `type`
  const void* weight;     // [columns], dense, of `type`
  const uint8_t* target;  // [total] or null, as above
  Activation activation;
  float scale;
  void* dx;         // [total, columns], dense, of `type`; 0 where target is 0
  void* dweight;    // [columns], of `type`
  void* dbias;      // [1], of `type`
  float* partials;  // scratch [router_partials(total, columns)], 16-byte aligned
  FloatType type;
  int64_t total;
  int64_t columns;
};

// Floats of scratch that the backward pass needs.
int64_t router_partials(int64_t total, int64_t columns);

// The gradients of the above, in two launches: sums over blocks of rows, then over the blocks.
// Where blocks begin depends on `total` alone.
cudaError_t launch_router_weights_backward(const CudaRouterGradParams& params, cudaStream_t stream);

}  // namespace pruneops
