// Torch wrappers of the compaction kernels, CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "compaction/compaction_torch.h"
#include "compaction/cuda/move_rows.h"
#include "selection/selection_cuda.h"

namespace pruneops {
namespace {

enum class Direction { kGather, kScatter };

// For each tensor a new dense one with num_rows rows, moved by `indices`. One launch for up to
// kMaxMovedTensors tensors; a scatter of many indices needs two more.
//   indices  [num_indices], int32
std::vector<Tensor> move_rows(Direction direction, const std::vector<Tensor>& tensors,
                              const Tensor& indices, int64_t num_rows, int32_t device) {
  std::vector<Tensor> sources;
  std::vector<Tensor> outputs;
  sources.reserve(tensors.size());
  outputs.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    check_cuda(tensor, device, "every tensor of tensors");
    sources.push_back(rows_are_dense(tensor) ? tensor : torch::stable::contiguous(tensor));
    outputs.push_back(empty_cuda_like_dtype(tensor, sizes_with_rows(tensor, num_rows)));
  }
  if (tensors.empty() || num_rows == 0) return outputs;

  MoveParams params{};
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.num_indices = indices.size(0);
  params.num_rows = num_rows;
  params.num_src_rows = tensors[0].size(0);
  std::optional<Tensor> inverse;
  int32_t* inverse_data = nullptr;
  if (direction == Direction::kScatter && params.num_indices > kMaxScannedIndices) {
    inverse = empty_cuda_int32({num_rows}, device);
    inverse_data = static_cast<int32_t*>(inverse->mutable_data_ptr());
  }
  const cudaStream_t stream = current_cuda_stream(device);
  for (size_t first = 0; first < sources.size(); first += kMaxMovedTensors) {
    const size_t last = std::min(sources.size(), first + kMaxMovedTensors);
    params.num_tensors = static_cast<int32_t>(last - first);
    for (size_t i = first; i < last; ++i) {
      const Tensor& source = sources[i];
      MovedTensor& moved = params.tensors[i - first];
      moved.src = static_cast<const char*>(source.const_data_ptr());
      moved.src_row_stride = source.stride(0) * static_cast<int64_t>(source.element_size());
      moved.dst = static_cast<char*>(outputs[i].mutable_data_ptr());
      moved.row_bytes = bytes_per_row(source);
    }
    STD_CUDA_CHECK(direction == Direction::kGather
                       ? launch_gather_rows(params, stream)
                       : launch_scatter_rows(params, inverse_data, stream));
  }
  return outputs;
}

std::vector<Tensor> gather_rows_cuda(const std::vector<Tensor>& tensors, const Tensor& indices) {
  check_same_rows(tensors);
  check_cuda(indices, "indices");
  const int32_t device = indices.get_device_index();
  const DeviceGuard guard(device);
  const Tensor idx = cuda_vector(indices, ScalarType::Int, -1, device, "indices");
  return move_rows(Direction::kGather, tensors, idx, idx.size(0), device);
}

std::vector<Tensor> scatter_rows_cuda(const std::vector<Tensor>& tensors, const Tensor& indices,
                                      int64_t total) {
  const int64_t num_rows = check_same_rows(tensors);
  check_cuda(indices, "indices");
  const int32_t device = indices.get_device_index();
  const DeviceGuard guard(device);
  const Tensor idx = cuda_vector(indices, ScalarType::Int, num_rows, device, "indices");
  STD_TORCH_CHECK(total >= 0 && total <= kMaxRows, "total must be in [0, ", kMaxRows, "], got ",
                  total);
  return move_rows(Direction::kScatter, tensors, idx, total, device);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_compact_cuda(
    const Tensor& scores, const std::vector<Tensor>& tensors, const Tensor& cu_seqlens,
    const Tensor& keep_counts, int64_t capacity, const std::optional<Tensor>& protect) {
  check_cuda(scores, "scores");
  if (check_same_rows(tensors) >= 0) {
    check_size(tensors[0], 0, scores.numel(), "every tensor of tensors");
  }
  const int32_t device = scores.get_device_index();
  const DeviceGuard guard(device);
  auto [indices, cu_seqlens_out] =
      segment_topk_cuda(scores, cu_seqlens, keep_counts, capacity, protect);
  std::vector<Tensor> rows = move_rows(Direction::kGather, tensors, indices, capacity, device);
  return {std::move(rows), indices, cu_seqlens_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows_cuda));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows_cuda));
  m.impl("select_compact", TORCH_BOX(&select_compact_cuda));
}

}  // namespace pruneops
