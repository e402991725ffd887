// Launches of the score kernels.

#include "attention/cuda/column_scores.cuh"
#include "attention/cuda/few_query_scores.cuh"

namespace pruneops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }

// Blocks that fill any present GPU a few times over.
constexpr int64_t kEnoughBlocks = 528;
// Blocks go on to further work items beyond this many.
constexpr int64_t kMostBlocks = int64_t{1} << 20;

// Average query rows of a segment up to which its keys are better read in place.
constexpr int64_t kFewQueries = 8;

dim3 grid_of(int64_t items) { return dim3(static_cast<unsigned>(at_most(items, kMostBlocks))); }

template <class T, int kLanes>
cudaError_t launch_few(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  const bool k_vectors = reads_vectors(p.k);
  PartialLse* partial = reinterpret_cast<PartialLse*>(p.workspace);
  const cudaError_t error =
      launch_kernel(partial_lse_kernel<T, kLanes>,
                    grid_of(p.num_segments * p.heads.num_heads_k * plan.num_splits),
                    dim3(kPartialThreads), 0, stream, p, plan.num_splits, k_vectors, partial);
  if (error != cudaSuccess) return error;
  return launch_kernel(few_query_scores_kernel<T, kLanes>,
                       dim3(static_cast<unsigned>(ceil_div(p.total_k, plan.tile_keys))),
                       dim3(kFewThreads), 0, stream, p, plan.num_splits, plan.tile_keys, k_vectors,
                       partial);
}

template <class T>
cudaError_t launch_all(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  if (plan.few_queries) {
    if (p.heads.head_dim <= 8 * kVector) return launch_few<T, 8>(p, plan, stream);
    if (p.heads.head_dim <= 16 * kVector) return launch_few<T, 16>(p, plan, stream);
    return launch_few<T, 32>(p, plan, stream);
  }
  const bool q_vectors = reads_vectors(p.q), k_vectors = reads_vectors(p.k);
  float* sums = p.workspace;
  const float* lse = p.softmax_lse;
  cudaError_t error = cudaSuccess;
  if (lse == nullptr) {
    float* computed = p.workspace + plan.num_splits * p.total_k;
    error = launch_kernel(lse_kernel<T>, grid_of(ceil_div(p.total_q, kTile) * p.heads.num_heads_q),
                          dim3(kTileThreads), 0, stream, p, q_vectors, k_vectors, computed);
    lse = computed;
  }
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.total_k, kTile)),
                  static_cast<unsigned>(plan.num_splits));
  error = launch_kernel(column_scores_kernel<T>, grid, dim3(kTileThreads), 0, stream, p, q_vectors,
                        k_vectors, lse, sums);
  if (error != cudaSuccess) return error;
  return launch_kernel(finish_scores_kernel,
                       dim3(static_cast<unsigned>(ceil_div(p.total_k, kFinishThreads))),
                       dim3(kFinishThreads), 0, stream, p, plan.num_splits, sums);
}

}  // namespace

ScorePlan plan_scores(const CudaScoreParams& p, bool often_few_queries) {
  ScorePlan plan{};
  plan.few_queries = often_few_queries && p.total_q <= kFewQueries * p.num_segments;
  if (plan.few_queries) {
    const int64_t wanted =
        ceil_div(2 * kEnoughBlocks, at_least(p.num_segments * p.heads.num_heads_k, 1));
    const int64_t most = at_most(ceil_div(p.total_k, kPartialKeys), 64);
    plan.num_splits = static_cast<int32_t>(at_least(at_most(wanted, most), 1));
    plan.tile_keys = 16;
    while (plan.tile_keys < kFewMaxKeys && p.total_k > plan.tile_keys * kEnoughBlocks)
      plan.tile_keys *= 2;
    plan.workspace_floats = p.total_q * plan.num_splits * p.heads.num_heads_q * 2;
    return plan;
  }
  const int64_t wanted = ceil_div(kEnoughBlocks, at_least(ceil_div(p.total_k, kTile), 1));
  const int64_t most = at_most(ceil_div(p.total_q, kTile), 32);
  plan.num_splits = static_cast<int32_t>(at_least(at_most(wanted, most), 1));
  plan.workspace_floats = plan.num_splits * p.total_k;
  if (p.softmax_lse == nullptr) plan.workspace_floats += p.heads.num_heads_q * p.total_q;
  return plan;
}

cudaError_t launch_scores(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  if (p.total_k == 0) return cudaSuccess;
  const cudaError_t error =
      launch_kernel(bounds_kernel, dim3(2), dim3(kBoundsThreads), 0, stream, p.cu_seqlens_q,
                    p.cu_seqlens_k, p.num_segments + 1, p.total_q, p.total_k, p.bounds);
  if (error != cudaSuccess) return error;
  switch (p.q.type) {
    case FloatType::kBFloat16:
      return launch_all<BFloat16>(p, plan, stream);
    case FloatType::kFloat16:
      return launch_all<Half>(p, plan, stream);
    default:
      return launch_all<float>(p, plan, stream);
  }
}

}  // namespace pruneops
