// Torch wrappers of the clustering kernels, CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "clustering/cuda/clustering.h"
#include "clustering/cuda/position_means.h"
#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"

namespace pruneops {
namespace {

// fp32, bf16 or fp16 rows on a device, each row's elements contiguous.
Tensor cuda_rows(const Tensor& x) {
  check_cuda(x, "x");
  check_dim(x, 2, "x");
  check_floating(x, "x");
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x has ", x.size(0), " rows; at most ", kMaxRows,
                  " are supported");
  constexpr int64_t kMaxChannels = int64_t{1} << 30;
  STD_TORCH_CHECK(x.size(1) <= kMaxChannels, "x has ", x.size(1), " channels; at most ",
                  kMaxChannels, " are supported");
  const bool unit = x.size(1) <= 1 || x.stride(1) == 1;
  return unit ? x : torch::stable::contiguous(x);
}

CudaRows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x), x.stride(0), x.size(0), x.size(1)};
}

void check_capacity(int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0 && capacity <= kMaxRows, "capacity must be in [0, ", kMaxRows,
                  "] on a CUDA device, got ", capacity);
}

// One allocation, cut into pieces that are aligned to 16 bytes.
class Scratch {
 public:
  template <typename T>
  void ask(T** piece, int64_t count) {
    pieces_[num_pieces_++] = {reinterpret_cast<void**>(piece), words_};
    words_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 4;
  }

  // Hands out the pieces, which live as long as this.
  void allocate(int32_t device) {
    memory_ = empty_cuda_int32({words_}, device);
    for (int i = 0; i < num_pieces_; ++i) {
      *pieces_[i].pointer = data_of<int32_t>(*memory_) + pieces_[i].first_word;
    }
  }

 private:
  struct Piece {
    void** pointer;
    int64_t first_word;
  };
  Piece pieces_[8];
  int num_pieces_ = 0;
  int64_t words_ = 0;
  std::optional<Tensor> memory_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dpc_knn_cuda(
    const Tensor& x_in, const Tensor& cu_seqlens, const Tensor& num_clusters, int64_t k,
    int64_t max_seqlen, int64_t capacity, const std::optional<Tensor>& noise) {
  const Tensor x = cuda_rows(x_in);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const int64_t total = x.size(0);
  const Tensor bounds = cuda_cu_seqlens(cu_seqlens, device, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor counts =
      cuda_vector(num_clusters, ScalarType::Int, num_segments, device, "num_clusters");
  const auto of_rows = cuda_vector(noise, ScalarType::Float, total, device, "noise");
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  STD_TORCH_CHECK(max_seqlen >= 0, "max_seqlen must not be negative, got ", max_seqlen);
  check_capacity(capacity);

  const Tensor cluster_ids = empty_cuda_int32({total}, device);
  const Tensor center_indices = empty_cuda_int32({capacity}, device);
  const Tensor cu_clusters = empty_cuda_int32({num_segments + 1}, device);
  const Tensor density = empty_cuda_float32({total}, device);
  const Tensor delta = empty_cuda_float32({total}, device);
  const Tensor score = empty_cuda_float32({total}, device);

  CudaDpcKnnParams params{};
  params.x = rows_of(x);
  params.cu_seqlens = const_data_of<int32_t>(bounds);
  params.num_clusters = const_data_of<int32_t>(counts);
  params.noise = const_data_of<float>(of_rows);
  params.num_segments = num_segments;
  params.k = k;
  params.max_seqlen = std::min(max_seqlen, total);
  params.capacity = capacity;
  params.cluster_ids = data_of<int32_t>(cluster_ids);
  params.center_indices = data_of<int32_t>(center_indices);
  params.cu_clusters = data_of<int32_t>(cu_clusters);
  params.density = data_of<float>(density);
  params.delta = data_of<float>(delta);
  params.score = data_of<float>(score);
  const DpcKnnPlan plan = plan_dpc_knn(total, params.max_seqlen);
  Scratch scratch;
  scratch.ask(&params.items, num_segments + 1);
  scratch.ask(&params.distances, plan.distance_floats());
  scratch.ask(&params.norms, 2 * total);
  scratch.ask(&params.ranks, total);
  scratch.ask(&params.bounds, num_segments + 1);
  scratch.ask(&params.votes, num_segments);
  scratch.ask(&params.max_distance, num_segments);
  scratch.allocate(device);
  STD_CUDA_CHECK(launch_dpc_knn(params, plan, current_cuda_stream(device)));
  return {cluster_ids, center_indices, cu_clusters, density, delta, score};
}

std::tuple<Tensor, Tensor> merge_mean_cuda(const Tensor& x_in, const Tensor& cluster_ids,
                                           const Tensor& cu_seqlens, const Tensor& num_clusters,
                                           int64_t capacity, const std::optional<Tensor>& weights) {
  const Tensor x = cuda_rows(x_in);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const int64_t total = x.size(0);
  const Tensor ids = cuda_vector(cluster_ids, ScalarType::Int, total, device, "cluster_ids");
  const Tensor bounds = cuda_cu_seqlens(cu_seqlens, device, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor clusters =
      cuda_vector(num_clusters, ScalarType::Int, num_segments, device, "num_clusters");
  const auto of_rows = cuda_vector(weights, ScalarType::Float, total, device, "weights");
  check_capacity(capacity);

  const Tensor merged = empty_cuda_like_dtype(x, {capacity, x.size(1)});
  const Tensor counts = empty_cuda_int32({capacity}, device);

  CudaMergeMeanParams params{};
  params.x = rows_of(x);
  params.cluster_ids = const_data_of<int32_t>(ids);
  params.cu_seqlens = const_data_of<int32_t>(bounds);
  params.num_clusters = const_data_of<int32_t>(clusters);
  params.weights = const_data_of<float>(of_rows);
  params.num_segments = num_segments;
  params.capacity = capacity;
  params.merged = merged.mutable_data_ptr();
  params.counts = data_of<int32_t>(counts);
  Scratch scratch;
  scratch.ask(&params.offsets, num_segments + 1);
  scratch.ask(&params.bounds, num_segments + 1);
  scratch.allocate(device);
  STD_CUDA_CHECK(launch_merge_mean(params, current_cuda_stream(device)));
  return {merged, counts};
}

std::tuple<Tensor, Tensor> position_means_cuda(const Tensor& x_in, const Tensor& cu_seqlens,
                                               const Tensor& num_positions, int64_t capacity) {
  const Tensor x = cuda_rows(x_in);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor bounds = cuda_cu_seqlens(cu_seqlens, device, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor positions =
      cuda_vector(num_positions, ScalarType::Int, num_segments, device, "num_positions");
  check_capacity(capacity);

  const Tensor means = empty_cuda_like_dtype(x, {capacity, x.size(1)});
  const Tensor similarity = empty_cuda_float32({capacity}, device);

  CudaPositionMeansParams params{};
  params.x = rows_of(x);
  params.cu_seqlens = const_data_of<int32_t>(bounds);
  params.num_positions = const_data_of<int32_t>(positions);
  params.num_segments = num_segments;
  params.capacity = capacity;
  params.means = means.mutable_data_ptr();
  params.similarity = data_of<float>(similarity);
  Scratch scratch;
  scratch.ask(&params.offsets, num_segments + 1);
  scratch.ask(&params.bounds, num_segments + 1);
  scratch.ask(&params.inverse_norms, x.size(0));
  scratch.allocate(device);
  STD_CUDA_CHECK(launch_position_means(params, current_cuda_stream(device)));
  return {means, similarity};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("dpc_knn", TORCH_BOX(&pruneops::dpc_knn_cuda));
  m.impl("merge_mean", TORCH_BOX(&pruneops::merge_mean_cuda));
  m.impl("position_means", TORCH_BOX(&pruneops::position_means_cuda));
}
