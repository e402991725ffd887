// Launches of the backward pass with mma.sync.

#pragma once

#include "attention/cuda/flash_backward_keys.cuh"
#include "attention/cuda/flash_backward_queries.cuh"
#include "attention/cuda/flash_delta.cuh"

namespace pruneops {

// The passes over rows and keys, whose scratch is filled.
template <int kHeadDim, MmaType kType, class Weights>
cudaError_t launch_flash_gradients_sm80(const FlashBackwardParams& p, const FlashOrder& of_keys,
                                        const FlashOrder& of_rows, const Weights& weights,
                                        cudaStream_t stream) {
  const FlashSegments& s = p.segments;
  const auto grid = [&](const FlashOrder& order, int64_t total) {
    return dim3(flash_blocks(p.heads.num_heads_k, total, s.num_segments, order));
  };
  using Keys = KeyGradients<kHeadDim>;
  using Queries = QueryGradients<kHeadDim>;
  const cudaError_t error = launch_kernel(
      flash_key_gradients_kernel<kHeadDim, kType, Weights>, grid(of_keys, s.total_k),
      dim3(Keys::kThreads), sizeof(typename Keys::Shared), stream, p, of_keys, weights);
  if (error != cudaSuccess) return error;
  return launch_kernel(flash_query_gradients_kernel<kHeadDim, kType, Weights>,
                       grid(of_rows, s.total_q), dim3(Queries::kThreads),
                       sizeof(typename Queries::Shared), stream, p, of_rows, weights);
}

template <int kHeadDim>
cudaError_t launch_flash_backward_sm80(const FlashBackwardParams& p, const FlashDevice&,
                                       cudaStream_t stream) {
  const FlashOrder orders[] = {
      {true, KeyGradients<kHeadDim>::kKeys, 1, p.schedule},
      {false, QueryGradients<kHeadDim>::kRows, static_cast<int32_t>(p.heads.group),
       p.schedule + flash_schedule_ints(p.segments.num_segments)}};
  cudaError_t error = launch_flash_schedule(p.segments, orders, 2, stream);
  if (error != cudaSuccess) return error;
  const bool bfloat16 = p.q.type == FloatType::kBFloat16;
  error = bfloat16 ? launch_flash_row_terms<BFloat16, kHeadDim>(p, stream)
                   : launch_flash_row_terms<Half, kHeadDim>(p, stream);
  if (error != cudaSuccess) return error;
  const auto launch = bfloat16
                          ? launch_flash_gradients_sm80<kHeadDim, MmaType::kBFloat16, EqualKeys>
                          : launch_flash_gradients_sm80<kHeadDim, MmaType::kFloat16, EqualKeys>;
  return launch(p, orders[0], orders[1], EqualKeys{}, stream);
}

}  // namespace pruneops
