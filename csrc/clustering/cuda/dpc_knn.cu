// Launches of DPC-kNN.

#include "clustering/cuda/distances.cuh"
#include "clustering/cuda/peaks.cuh"

namespace pruneops {
namespace {

// Longest segment whose distances are all kept, and floats of a panel where they are not.
constexpr int64_t kLongestWhole = 4096;
constexpr int64_t kPanelFloats = kLongestWhole * kLongestWhole;
// Blocks go on to further tiles beyond this many, which fill any present GPU a few times over.
constexpr int64_t kMostTileBlocks = 1056;

int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

struct Launcher {
  const CudaDpcKnnParams& p;
  const DpcKnnPlan& plan;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  // Nothing is launched after an error.
  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) {
    if (error != cudaSuccess) return;
    error = launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream,
                          arguments...);
  }

  template <class T>
  void compute_distances(const Panel& panel, bool vectors) {
    // Tiles of the panel if it were one segment, and one more for each of many short ones.
    const int64_t row_tiles = blocks_for(panel.end - panel.begin, kTile) + p.num_segments;
    const int64_t column_tiles = blocks_for(p.max_seqlen, kTile) + 1;
    const int64_t most = row_tiles < kMostTileBlocks && column_tiles < kMostTileBlocks
                             ? row_tiles * column_tiles
                             : kMostTileBlocks;
    run(distances_kernel<T>, most < kMostTileBlocks ? most : kMostTileBlocks, kTileThreads, p,
        panel, plan.whole, plan.pitch, vectors);
  }

  // One step for all rows, panel by panel; distances are computed if they are not in the buffer.
  template <class T>
  void step(void (*kernel)(CudaDpcKnnParams, Panel, int64_t), bool kept, bool vectors) {
    for (int64_t begin = 0; begin < p.x.total; begin += plan.panel_rows) {
      const int64_t end = begin + plan.panel_rows;
      const Panel panel{begin, end < p.x.total ? end : p.x.total};
      if (!kept) compute_distances<T>(panel, vectors);
      run(kernel, blocks_for(panel.end - panel.begin, kRowWarps), kRowThreads, p, panel,
          plan.pitch);
    }
  }

  template <class T>
  void all() {
    const bool vectors = reads_quads(p.x), whole = plan.whole;
    const int64_t row_blocks = blocks_for(p.x.total, kRowWarps);
    run(dpc_knn_layout_kernel, 1, kLayoutThreads, p, whole);
    run(prepare_rows_kernel<T>, row_blocks > 0 ? row_blocks : 1, kRowThreads, p, vectors);
    step<T>(density_kernel, false, vectors);
    step<T>(delta_kernel, whole, vectors);
    run(rank_kernel, row_blocks, kRowThreads, p);
    step<T>(assign_kernel, whole, vectors);
  }
};

}  // namespace

DpcKnnPlan plan_dpc_knn(int64_t total, int64_t max_seqlen) {
  DpcKnnPlan plan{};
  const int64_t longest = max_seqlen < total ? max_seqlen : total;
  plan.pitch = (longest + 3) / 4 * 4;
  plan.whole = longest <= kLongestWhole;
  plan.panel_rows = total;
  if (!plan.whole) {
    const int64_t rows = kPanelFloats / plan.pitch / kTile * kTile;
    plan.panel_rows = rows > kTile ? rows : kTile;
    if (plan.panel_rows > total) plan.panel_rows = total;
  }
  return plan;
}

cudaError_t launch_dpc_knn(const CudaDpcKnnParams& p, const DpcKnnPlan& plan, cudaStream_t stream) {
  Launcher launcher{p, plan, stream};
  switch (p.x.type) {
    case FloatType::kBFloat16:
      launcher.all<BFloat16>();
      break;
    case FloatType::kFloat16:
      launcher.all<Half>();
      break;
    default:
      launcher.all<float>();
  }
  return launcher.error;
}

}  // namespace pruneops
