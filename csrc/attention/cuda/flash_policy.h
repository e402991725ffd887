// Launches of policy attention on tensor cores: bf16 and fp16 of the head dims of the flash
// kernels, rows as those read them. Each head dim is a file of its own.

#pragma once

#include "attention/cuda/flash.h"
#include "attention/cuda/policy.h"

namespace pruneops {

struct FlashPolicyForwardParams {
  CudaPolicyParams policy;  // bounds and sums filled
  FlashSegments segments;   // of queries and keys alike
  FlashOrder rows;          // in tiles of forward_tile_sm80, its scratch filled
};

struct FlashPolicyBackwardParams {
  CudaPolicyBackwardParams policy;  // bounds filled, and sums with those of dout / (sum + epsilon)
  FlashSegments segments;
  FlashOrder keys;  // in tiles of key_gradient_tile_sm80, its scratch filled
  FlashOrder rows;  // likewise in tiles of query_gradient_tile_sm80
};

template <int kHeadDim>
cudaError_t launch_flash_policy_forward_sm80(const FlashPolicyForwardParams& params,
                                             cudaStream_t stream);
// Three launches; dpolicy itself is left to be put together from its parts.
template <int kHeadDim>
cudaError_t launch_flash_policy_backward_sm80(const FlashPolicyBackwardParams& params,
                                              cudaStream_t stream);

}  // namespace pruneops
