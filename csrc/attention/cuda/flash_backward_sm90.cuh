// Launches of the backward pass on Hopper.

#pragma once

#include "attention/cuda/flash_backward_sm90_keys.cuh"
#include "attention/cuda/flash_backward_sm90_queries.cuh"
#include "attention/cuda/flash_delta.cuh"

namespace pruneops {

template <MmaType kType, int kHeadDim>
cudaError_t launch_flash_gradients_sm90(const FlashBackwardParams& p, const FlashOrder& of_keys,
                                        const FlashOrder& of_rows, cudaStream_t stream) {
  using Keys = KeyGradientsSm90<kHeadDim>;
  using Queries = QueryGradientsSm90<kHeadDim>;
  const FlashSegments& s = p.segments;
  const auto grid = [&](const FlashOrder& order, int64_t total) {
    return dim3(flash_blocks(p.heads.num_heads_k, total, s.num_segments, order));
  };
  BackwardMapsSm90 maps;
  TensorMap k_map, v_map;  // for the tiles that the queries go through
  const cudaError_t errors[] = {
      make_packed_map<typename Keys::Streamed>(&maps.q, p.q, s.total_q, p.heads.num_heads_q),
      make_packed_map<typename Keys::Streamed>(&maps.dout, p.dout, s.total_q, p.heads.num_heads_q),
      make_packed_map<typename Keys::Held>(&maps.k, p.k, s.total_k, p.heads.num_heads_k),
      make_packed_map<typename Keys::Held>(&maps.v, p.v, s.total_k, p.heads.num_heads_k),
      make_packed_map<typename Queries::Streamed>(&k_map, p.k, s.total_k, p.heads.num_heads_k),
      make_packed_map<typename Queries::Streamed>(&v_map, p.v, s.total_k, p.heads.num_heads_k)};
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error =
      launch_kernel(flash_key_gradients_sm90_kernel<kType, kHeadDim>, grid(of_keys, s.total_k),
                    dim3(Keys::kThreads), Keys::kSharedBytes, stream, p, of_keys, maps);
  if (error != cudaSuccess) return error;
  return launch_kernel(flash_query_gradients_sm90_kernel<kType, kHeadDim>, grid(of_rows, s.total_q),
                       dim3(Queries::kThreads), Queries::kSharedBytes, stream, p, of_rows, k_map,
                       v_map);
}

template <int kHeadDim>
cudaError_t launch_flash_backward_sm90(const FlashBackwardParams& p, const FlashDevice&,
                                       cudaStream_t stream) {
  const FlashOrder orders[] = {
      {true, kKeyGradientTileSm90.held, 1, p.schedule},
      {false, kQueryGradientTileSm90.held, static_cast<int32_t>(p.heads.group),
       p.schedule + flash_schedule_ints(p.segments.num_segments)}};
  cudaError_t error = launch_flash_schedule(p.segments, orders, 2, stream);
  if (error != cudaSuccess) return error;
  const bool bfloat16 = p.q.type == FloatType::kBFloat16;
  error = bfloat16 ? launch_flash_row_terms<BFloat16, kHeadDim>(p, stream)
                   : launch_flash_row_terms<Half, kHeadDim>(p, stream);
  if (error != cudaSuccess) return error;
  const auto launch = bfloat16 ? launch_flash_gradients_sm90<MmaType::kBFloat16, kHeadDim>
                               : launch_flash_gradients_sm90<MmaType::kFloat16, kHeadDim>;
  return launch(p, orders[0], orders[1], stream);
}

}  // namespace pruneops
