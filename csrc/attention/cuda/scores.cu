// Launches of the score kernels.

#include "attention/cuda/column_scores.cuh"
#include "attention/cuda/few_query_scores.cuh"
#include "attention/cuda/flash_schedule.cuh"
#include "attention/cuda/tile_scores.h"

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
  const bool k_vectors = begins_on_16_bytes(p.k);
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

cudaError_t launch_finish(const CudaScoreParams& p, int64_t num_partial_sums, const float* sums,
                          cudaStream_t stream) {
  return launch_kernel(
      finish_scores_kernel, dim3(static_cast<unsigned>(ceil_div(p.total_k, kFinishThreads))),
      dim3(kFinishThreads), 0, stream, p, static_cast<int32_t>(num_partial_sums), sums);
}

template <class T>
cudaError_t launch_plain(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  const bool q_vectors = begins_on_16_bytes(p.q), k_vectors = begins_on_16_bytes(p.k);
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
  return launch_finish(p, plan.num_splits, sums, stream);
}

template <class T>
cudaError_t launch_all(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  const cudaError_t error =
      launch_kernel(bounds_kernel, dim3(2), dim3(kBoundsThreads), 0, stream, p.cu_seqlens_q,
                    p.cu_seqlens_k, p.num_segments + 1, p.total_q, p.total_k, p.bounds);
  if (error != cudaSuccess) return error;
  if (!plan.few_queries) return launch_plain<T>(p, plan, stream);
  if (p.heads.head_dim <= 8 * kVector) return launch_few<T, 8>(p, plan, stream);
  if (p.heads.head_dim <= 16 * kVector) return launch_few<T, 16>(p, plan, stream);
  return launch_few<T, 32>(p, plan, stream);
}

bool runs_on_tensor_cores(const CudaScoreParams& p) {
  return flash_supports(p.q.type, p.heads.head_dim) && flash_reads(p.q) && flash_reads(p.k);
}

// Whether heads must be reduced before queries.
bool is_nested(const CudaScoreParams& p) {
  return (p.head_reduce == Reduce::kMax) != (p.query_reduce == Reduce::kMax);
}

// Key heads whose sums the tensor-core kernels leave apart.
int64_t heads_apart(const CudaScoreParams& p) { return is_nested(p) ? 1 : p.heads.num_heads_k; }

cudaError_t launch_on_tensor_cores(const CudaScoreParams& p, const ScorePlan& plan,
                                   cudaStream_t stream) {
  const int64_t schedule_ints = flash_schedule_ints(p.num_segments);
  int32_t* schedules = reinterpret_cast<int32_t*>(p.workspace);
  TileScoreParams t{};
  t.scores = p;
  t.segments = {p.cu_seqlens_q, p.cu_seqlens_k, nullptr, 0, p.num_segments, p.total_q, p.total_k};
  t.keys = {true, kScoreTileRows, 1, schedules};
  t.rows = {false, kScoreTileRows, static_cast<int32_t>(p.heads.group), schedules + schedule_ints};
  t.nested = is_nested(p);
  t.num_splits = plan.num_splits;
  t.sums = p.workspace + 2 * schedule_ints;
  t.lse = t.sums + plan.num_splits * heads_apart(p) * p.total_k;
  const FlashOrder orders[] = {t.keys, t.rows};
  cudaError_t error =
      launch_flash_schedule(t.segments, orders, p.softmax_lse == nullptr ? 2 : 1, stream);
  if (error != cudaSuccess) return error;
  switch (p.heads.head_dim) {
    case 64:
      error = launch_tile_scores<64>(t, stream);
      break;
    case 80:
      error = launch_tile_scores<80>(t, stream);
      break;
    case 96:
      error = launch_tile_scores<96>(t, stream);
      break;
    default:
      error = launch_tile_scores<128>(t, stream);
  }
  if (error != cudaSuccess) return error;
  CudaScoreParams finish = p;
  finish.bounds = FlashSchedule(schedules, p.num_segments).bounds;
  return launch_finish(finish, plan.num_splits * heads_apart(p), t.sums, stream);
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
  plan.on_tensor_cores = runs_on_tensor_cores(p);
  const bool tensor = plan.on_tensor_cores;
  const int64_t key_blocks =
      tensor ? ceil_div(p.total_k, kScoreTileRows) * heads_apart(p) : ceil_div(p.total_k, kTile);
  const int64_t rows = tensor && !is_nested(p) ? p.total_q * p.heads.group : p.total_q;
  const int64_t wanted = ceil_div(kEnoughBlocks, at_least(key_blocks, 1));
  const int64_t most = at_most(ceil_div(rows, kTile), 32);
  plan.num_splits = static_cast<int32_t>(at_least(at_most(wanted, most), 1));
  plan.workspace_floats = plan.num_splits * p.total_k * (tensor ? heads_apart(p) : 1);
  if (p.softmax_lse == nullptr) plan.workspace_floats += p.heads.num_heads_q * p.total_q;
  if (tensor) plan.workspace_floats += 2 * flash_schedule_ints(p.num_segments);
  return plan;
}

cudaError_t launch_scores(const CudaScoreParams& p, const ScorePlan& plan, cudaStream_t stream) {
  if (p.total_k == 0) return cudaSuccess;
  if (plan.on_tensor_cores) return launch_on_tensor_cores(p, plan, stream);
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
