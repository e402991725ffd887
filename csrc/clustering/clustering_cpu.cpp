// Torch wrappers of the clustering kernels, CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "clustering/clustering.h"
#include "common/parallel_torch.h"
#include "common/segments.h"
#include "common/tensor_checks.h"

namespace pruneops {
namespace {

// [total, channels], with unit stride within a row.
Tensor checked_x(const Tensor& x) {
  check_cpu(x, "x");
  check_dim(x, 2, "x");
  check_floating(x, "x");
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x has ", x.size(0), " rows; at most ", kMaxRows,
                  " are supported");
  STD_TORCH_CHECK(x.size(1) <= kMaxRows, "x has ", x.size(1), " channels; at most ", kMaxRows,
                  " are supported");
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

void check_capacity(int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0 && capacity <= kMaxRows, "capacity must be between 0 and ",
                  kMaxRows, ", got ", capacity);
}

// Segment boundaries that can be relied on. [num_segments + 1]
std::unique_ptr<int32_t[]> sane_boundaries(const Tensor& cu_seqlens, int64_t total) {
  const int64_t entries = cu_seqlens.size(0);
  std::unique_ptr<int32_t[]> out(new int32_t[entries]);
  sanitize_cu_seqlens(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), entries, total,
                      out.get());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dpc_knn_cpu(
    const Tensor& x_in, const Tensor& cu_seqlens, const Tensor& num_clusters, int64_t k,
    int64_t /*max_seqlen*/, int64_t capacity, const std::optional<Tensor>& noise) {
  const Tensor x = checked_x(x_in);
  const int64_t total = x.size(0);
  const Tensor bounds = checked_cu_seqlens(cu_seqlens, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor counts = checked_vector(num_clusters, ScalarType::Int, num_segments, "num_clusters");
  const auto draws = checked_vector(noise, ScalarType::Float, total, "noise");
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  check_capacity(capacity);
  const std::unique_ptr<int32_t[]> starts = sane_boundaries(bounds, total);

  const Tensor cluster_ids = empty_cpu_like_dtype(bounds, {total});
  const Tensor centers = empty_cpu_like_dtype(bounds, {capacity});
  const Tensor cu_clusters = empty_cpu_like_dtype(bounds, {num_segments + 1});
  const Tensor density = empty_float32({total});
  const Tensor delta = empty_float32({total});
  const Tensor score = empty_float32({total});

  const int32_t* wanted = static_cast<const int32_t*>(counts.const_data_ptr());
  int32_t* ends = data_of<int32_t>(cu_clusters);
  ends[0] = 0;
  for (int64_t b = 0; b < num_segments; ++b) {
    const int64_t kept = ends[b] + clamped_clusters(wanted[b], starts[b + 1] - starts[b]);
    ends[b + 1] = static_cast<int32_t>(std::min(kept, capacity));
  }
  // Rows outside all segments: those behind the last one and, in malformed boundaries, those before
  // the first.
  const auto reset = [&](int64_t begin, int64_t end) {
    std::fill(data_of<int32_t>(cluster_ids) + begin, data_of<int32_t>(cluster_ids) + end, -1);
    for (const Tensor& t : {density, delta, score}) {
      std::fill(data_of<float>(t) + begin, data_of<float>(t) + end, 0.0f);
    }
  };
  reset(0, starts[0]);
  reset(starts[num_segments], total);
  std::fill(data_of<int32_t>(centers) + ends[num_segments], data_of<int32_t>(centers) + capacity,
            -1);

  DpcParams params{};
  params.x = x.const_data_ptr();
  params.type = float_type(x);
  params.row_stride = x.stride(0);
  params.channels = x.size(1);
  params.cu_seqlens = starts.get();
  params.num_segments = num_segments;
  params.cu_clusters = ends;
  params.noise = draws ? static_cast<const float*>(draws->const_data_ptr()) : nullptr;
  params.k = k;
  params.max_stored_rows = kMaxStoredRows;
  params.cluster_ids = data_of<int32_t>(cluster_ids);
  params.center_indices = data_of<int32_t>(centers);
  params.density = data_of<float>(density);
  params.delta = data_of<float>(delta);
  params.score = data_of<float>(score);
  dpc_knn(params, cluster_kernels(active_isa()), torch_parallel());
  return {cluster_ids, centers, cu_clusters, density, delta, score};
}

std::tuple<Tensor, Tensor> merge_mean_cpu(const Tensor& x_in, const Tensor& cluster_ids,
                                          const Tensor& cu_seqlens, const Tensor& num_clusters,
                                          int64_t capacity, const std::optional<Tensor>& weights) {
  const Tensor x = checked_x(x_in);
  const int64_t total = x.size(0);
  const Tensor ids = checked_vector(cluster_ids, ScalarType::Int, total, "cluster_ids");
  const Tensor bounds = checked_cu_seqlens(cu_seqlens, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor wanted = checked_vector(num_clusters, ScalarType::Int, num_segments, "num_clusters");
  const auto shares = checked_vector(weights, ScalarType::Float, total, "weights");
  check_capacity(capacity);
  const std::unique_ptr<int32_t[]> starts = sane_boundaries(bounds, total);

  const Tensor merged = empty_cpu_like_dtype(x, {capacity, x.size(1)});
  const Tensor counts = empty_cpu_like_dtype(bounds, {capacity});
  // The rows of each cluster behind each other: counted, then filed in ascending order.
  const std::unique_ptr<int32_t[]> slots(new int32_t[total]);
  const std::unique_ptr<int32_t[]> members(new int32_t[total]);
  const std::unique_ptr<int32_t[]> begin(new int32_t[capacity + 1]);
  const std::unique_ptr<int32_t[]> next(new int32_t[capacity]);
  int32_t* sizes = data_of<int32_t>(counts);
  std::fill(sizes, sizes + capacity, 0);
  const int32_t* id = static_cast<const int32_t*>(ids.const_data_ptr());
  const int32_t* clusters = static_cast<const int32_t*>(wanted.const_data_ptr());
  int64_t first = 0;
  for (int64_t b = 0; b < num_segments; ++b) {
    for (int64_t i = starts[b]; i < starts[b + 1]; ++i) {
      const int64_t slot = first + id[i];
      const bool inside = id[i] >= 0 && id[i] < clusters[b] && slot < capacity;
      slots[i] = inside ? static_cast<int32_t>(slot) : -1;
      if (inside) ++sizes[slot];
    }
    first += std::max(clusters[b], 0);
  }
  begin[0] = 0;
  for (int64_t c = 0; c < capacity; ++c) {
    next[c] = begin[c];
    begin[c + 1] = begin[c] + sizes[c];
  }
  for (int64_t i = starts[0]; i < starts[num_segments]; ++i) {
    if (slots[i] >= 0) members[next[slots[i]]++] = static_cast<int32_t>(i);
  }

  MeanParams params{};
  params.x = x.const_data_ptr();
  params.type = float_type(x);
  params.row_stride = x.stride(0);
  params.channels = x.size(1);
  params.weights = shares ? static_cast<const float*>(shares->const_data_ptr()) : nullptr;
  params.member_begin = begin.get();
  params.members = members.get();
  params.clusters = capacity;
  params.merged = merged.mutable_data_ptr();
  merge_mean(params, cluster_kernels(active_isa()), torch_parallel());
  return {merged, counts};
}

std::tuple<Tensor, Tensor> position_means_cpu(const Tensor& x_in, const Tensor& cu_seqlens,
                                              const Tensor& num_positions, int64_t capacity) {
  const Tensor x = checked_x(x_in);
  const Tensor bounds = checked_cu_seqlens(cu_seqlens, "cu_seqlens");
  const int64_t num_segments = bounds.size(0) - 1;
  const Tensor wanted =
      checked_vector(num_positions, ScalarType::Int, num_segments, "num_positions");
  check_capacity(capacity);
  const std::unique_ptr<int32_t[]> starts = sane_boundaries(bounds, x.size(0));

  const Tensor means = empty_cpu_like_dtype(x, {capacity, x.size(1)});
  const Tensor similarity = empty_float32({capacity});
  const int32_t* positions = static_cast<const int32_t*>(wanted.const_data_ptr());
  const std::unique_ptr<PositionRun[]> runs(new PositionRun[num_segments]);
  int64_t rows = 0;
  for (int64_t b = 0; b < num_segments; ++b) {
    const int64_t frame_rows = std::max<int64_t>(positions[b], 1);
    PositionRun& run = runs[b];
    run.first_row = starts[b];
    run.first_out = rows;
    run.positions = std::clamp<int64_t>(positions[b], 0, capacity - rows);
    run.frame_rows = frame_rows;
    run.frames = (starts[b + 1] - starts[b]) / frame_rows;
    rows += run.positions;
  }
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  std::fill_n(data_of<char>(means) + rows * row_bytes, (capacity - rows) * row_bytes, char{0});
  std::fill(data_of<float>(similarity) + rows, data_of<float>(similarity) + capacity, 0.0f);

  PositionParams params{};
  params.x = x.const_data_ptr();
  params.type = float_type(x);
  params.row_stride = x.stride(0);
  params.channels = x.size(1);
  params.means = means.mutable_data_ptr();
  params.similarity = data_of<float>(similarity);
  position_means(params, runs.get(), num_segments, cluster_kernels(active_isa()), torch_parallel());
  return {means, similarity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn_cpu));
  m.impl("merge_mean", TORCH_BOX(&merge_mean_cpu));
  m.impl("position_means", TORCH_BOX(&position_means_cpu));
}

}  // namespace pruneops
