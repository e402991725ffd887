// What every tile_scores_hd*.cu instantiates.

#pragma once

#include "attention/cuda/tile_lse.cuh"
#include "attention/cuda/tile_scores.cuh"
#include "attention/cuda/tile_scores.h"

namespace pruneops {

static_assert(kScoreTileRows == kHeldRows);

template <int kHeadDim, MmaType kType>
cudaError_t launch_tile_scores(const TileScoreParams& p, cudaStream_t stream) {
  constexpr size_t kSharedBytes = ScoreShared<kHeadDim>::kBytes;
  const CudaScoreParams& s = p.scores;
  const float* lse = s.softmax_lse;
  if (lse == nullptr && s.total_q > 0) {
    const dim3 grid(flash_blocks(s.heads.num_heads_k, s.total_q, s.num_segments, p.rows));
    const cudaError_t error =
        launch_kernel(tile_lse_kernel<kHeadDim, kType>, grid, dim3(kScoreThreads), kSharedBytes,
                      stream, s, p.segments, p.rows, p.lse);
    if (error != cudaSuccess) return error;
    lse = p.lse;
  }
  const auto kernel = p.nested ? tile_scores_kernel<kHeadDim, kType, true>
                               : tile_scores_kernel<kHeadDim, kType, false>;
  const dim3 grid(
      flash_blocks(p.nested ? 1 : s.heads.num_heads_k, s.total_k, s.num_segments, p.keys),
      static_cast<unsigned>(p.num_splits));
  return launch_kernel(kernel, grid, dim3(kScoreThreads), kSharedBytes, stream, s, p.segments,
                       p.keys, lse, p.sums);
}

template <int kHeadDim>
cudaError_t launch_tile_scores(const TileScoreParams& p, cudaStream_t stream) {
  return p.scores.q.type == FloatType::kBFloat16
             ? launch_tile_scores<kHeadDim, MmaType::kBFloat16>(p, stream)
             : launch_tile_scores<kHeadDim, MmaType::kFloat16>(p, stream);
}

}  // namespace pruneops
