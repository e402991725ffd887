#include "attention/cuda/tile_scores_launch.cuh"

namespace pruneops {

template cudaError_t launch_tile_scores<64>(const TileScoreParams&, cudaStream_t);

}  // namespace pruneops
