// Launches of the score kernels on tensor cores: bf16 and fp16 of the head dims of the flash
// kernels, rows that begin on 16 bytes. Each head dim is a file of its own.

#pragma once

#include "attention/cuda/flash.h"
#include "attention/cuda/scores.h"

namespace pruneops {

struct TileScoreParams {
  CudaScoreParams scores;  // bounds and workspace are not used
  FlashSegments segments;
  FlashOrder rows, keys;  // in tiles of kScoreTileRows, their scratch filled
  bool nested;            // heads and queries are not one reduction; see tile_scores.cuh
  int32_t num_splits;     // of a segment's tiles of rows
  float* lse;             // scratch [num_heads_q, total_q]; unused if scores.softmax_lse is given
  float* sums;            // out [num_splits, num_heads_k, total_k], nested [num_splits, total_k]
};

constexpr int32_t kScoreTileRows = 128;

template <int kHeadDim>
cudaError_t launch_tile_scores(const TileScoreParams& params, cudaStream_t stream);

}  // namespace pruneops
